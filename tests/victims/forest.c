/* A random tree of processes, made by random calls of its members; then every member checks itself for ever.
 * argv[3] is the seed.
 *
 * The root tells members what to do, one after the other, through memory they all share: fork, setsid, setpgid, end
 * with any status, collect a child or leave it, become a subreaper, open pipes with data in them, duplicate and close
 * descriptors, map, change and share memory, start threads, block, ignore and get signals. What each has is noted in
 * its own memory, which children inherit with the things themselves. At the end some stop, some pause, and the
 * others go round: ids, memory, signals, descriptors and pipes must be as noted, cells in shared memory must hold what
 * their owner counted, and numbered tokens wander through pipes that several members read and write. */
#include "check.h"
#include <dirent.h>
#include <linux/futex.h>
#include <sys/ioctl.h>
#include <sys/wait.h>

enum { MEMBERS = 64, LIVING = 22, FDS = 64, AREAS = 12, PAGES = 24, SHARES = 4, THREADS = 3, TOKENS = 8, RINGS = 3 };
enum op { FORK, SETSID, SETPGID, EXIT, COLLECT, SUBREAPER, PIPE, DUP, CLOSE, MAP, CHANGE, PROTECT, DROP, UNMAP, SHARE, THREAD, MASK, ACTION, RAISE, SETTLE };
enum mode { RUN, PAUSE, STOP };
enum what { NOTHING, REST_READ, REST_WRITE, RING_READ, RING_WRITE, LOG, SCRATCH_READ, SCRATCH_WRITE };
struct command { int op, a, b; uint64_t seed; };

/* Shared by all. */
struct slot { uint32_t asked, done; struct command command; int pid, living, mode; long result; };
static struct board {
    struct slot slots[MEMBERS];
    int used;
    uint64_t passed[TOKENS]; /* how often each token was passed on */
    uint32_t go;
} *board;

/* Each member's own, passed on by fork. */
static int me;
static pid_t pid, ppid, pgid, sid;
static struct { int what, cloexec, length; uint64_t seed; } fds[FDS];
static struct { char *at; int pages; uint64_t seed[PAGES]; } areas[AREAS]; /* seed 0: zeros, 1: not mapped */
static struct { char *at; int pages; uint64_t seed, count; } shares[SHARES];
static struct { pthread_t thread; int tid; uint64_t count; } threads[THREADS];
static int thread_count, subreaper, actions[3];
static uint64_t mask, pending;
static volatile int woken;
static __thread uint64_t own;

static uint64_t state;
static uint64_t next(void) { return mix(state += 0x9e3779b97f4a7c15); }
static int below(int n) { return n > 0 ? (int)(next() % (uint64_t)n) : 0; }
static void futex(uint32_t *word, int what, uint32_t value) { struct timespec t = {1, 0}; syscall(SYS_futex, word, what, value, &t, 0, 0); }
static void set(uint32_t *word, uint32_t value) { __atomic_store_n(word, value, __ATOMIC_RELEASE); futex(word, FUTEX_WAKE, MEMBERS); }
static void await(uint32_t *word, uint32_t value) { uint32_t now; while ((now = __atomic_load_n(word, __ATOMIC_ACQUIRE)) < value) futex(word, FUTEX_WAIT, now); }
static void on_wake(int s) { (void)s; woken = 1; }
static void on_signal(int s) { (void)s; }
static const int signals[] = {SIGUSR1, SIGUSR2, SIGWINCH};

static void *thread(void *p) {
    long n = (long)p;
    own = n * 77 + 5;
    __atomic_store_n(&threads[n].tid, own_tid(), __ATOMIC_RELAXED);
    for (;;) {
        if (own != (uint64_t)n * 77 + 5 || threads[n].tid != own_tid()) bad("thread %ld of %d", n, getpid());
        __atomic_add_fetch(&threads[n].count, 1, __ATOMIC_RELAXED);
        nap(20);
    }
    return 0;
}

/* Takes the lowest number after `least` that is free. */
static int put(int fd, int least, int cloexec, int what, int length, uint64_t seed) {
    int got = fcntl(fd, cloexec ? F_DUPFD_CLOEXEC : F_DUPFD, least);
    CHECK(got >= 0 && got < FDS);
    fds[got].what = what; fds[got].cloexec = cloexec; fds[got].length = length; fds[got].seed = seed;
    return got;
}

/* Does one thing. A number for the root: what came of it, or negative if it cannot be done now. */
static long act(struct command c) {
    uint64_t s = c.seed;
    static char buffer[65536];
    switch (c.op) {
    case FORK: {
        /* b: 0 as usual, 1 with CLONE_PARENT, 2 with another signal, 3 with none */
        static const int flags[] = {SIGCHLD, SIGCHLD | CLONE_PARENT, SIGURG, 0};
        if (c.b == 1 && me == 0) return -1;
        long child = c.b ? syscall(SYS_clone, flags[c.b], 0, 0, 0, 0) : fork();
        if (child < 0) bad("fork");
        if (child) return child;
        me = c.a; thread_count = 0; subreaper = 0; pending = 0;
        memset(threads, 0, sizeof threads);
        for (int i = 0; i < SHARES; i++) shares[i].count = 0;
        board->slots[me].pid = getpid();
        return 0;
    }
    case SETSID: return setsid() < 0 ? -1 : 0;
    case SETPGID: return setpgid(0, c.a);
    case EXIT:
        if (c.a >= 128) { struct rlimit none = {0, 0}; setrlimit(RLIMIT_CORE, &none); prctl(PR_SET_DUMPABLE, 0); signal(c.a - 128, SIG_DFL); sigset_t all; sigfillset(&all); sigdelset(&all, c.a - 128); sigprocmask(SIG_SETMASK, &all, 0); kill(getpid(), c.a - 128); }
        _exit(c.a);
    case COLLECT: { int status; return waitpid(c.a, &status, __WALL) == c.a ? 0 : -1; }
    case SUBREAPER: CHECK(!prctl(PR_SET_CHILD_SUBREAPER, c.a)); subreaper = c.a; return 0;
    case PIPE: {
        int p[2], length = s % 3 == 0 ? 0 : s % 3 == 1 ? (int)(s % 2000) & ~7 : (int)(s % 40000) & ~7;
        CHECK(!pipe2(p, s & 64 ? O_NONBLOCK : 0));
        fill(buffer, length, s);
        CHECK(write(p[1], buffer, length) == length || !length);
        int used = 0;
        for (int i = 3; i < FDS; i++) used += fds[i].what != NOTHING;
        if (used < FDS / 2) { put(p[0], 20 + s % 20, (s >> 8) & 1, REST_READ, length, s); put(p[1], 20 + (s >> 16) % 20, (s >> 9) & 1, REST_WRITE, length, s); }
        close(p[0]); close(p[1]);
        return 0;
    }
    case DUP: case CLOSE: {
        int from[FDS], n = 0;
        for (int i = 3; i < FDS; i++) if (fds[i].what != NOTHING && fds[i].what != LOG && (c.op == DUP || me || fds[i].what < RING_READ)) from[n++] = i;
        if (!n) return -1;
        int fd = from[s % n], to = 20 + (s >> 8) % (FDS - 22);
        if (c.op == CLOSE) { close(fd); fds[fd].what = NOTHING; return 0; }
        if (fd == to || fds[to].what == LOG || (!me && fds[to].what >= RING_READ)) return -1;
        CHECK(dup3(fd, to, (s >> 16) & 1 ? O_CLOEXEC : 0) == to);
        fds[to] = fds[fd]; fds[to].cloexec = (s >> 16) & 1;
        return 0;
    }
    case MAP:
        for (int i = 0; i < AREAS; i++) if (!areas[i].at) {
            areas[i].pages = 1 + s % PAGES;
            areas[i].at = map(areas[i].pages * 4096L, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
            for (int p = 0; p < areas[i].pages; p++) { areas[i].seed[p] = mix(s + p) % 3 ? mix(s + p) | 2 : 0; if (areas[i].seed[p]) fill(areas[i].at + p * 4096L, 4096, areas[i].seed[p]); }
            return 0;
        }
        return -1;
    case CHANGE: case PROTECT: case DROP: case UNMAP: {
        int i = s % AREAS;
        if (!areas[i].at) return -1;
        int first = (s >> 8) % areas[i].pages, count = 1 + (s >> 16) % (areas[i].pages - first);
        if (c.op == UNMAP && count > 2) count = 2;
        for (int p = first; p < first + count; p++) {
            char *at = areas[i].at + p * 4096L;
            if (areas[i].seed[p] == 1) continue;
            if (c.op == PROTECT) { CHECK(!mprotect(at, 4096, PROT_READ)); continue; }
            if (c.op == UNMAP) { CHECK(!munmap(at, 4096)); areas[i].seed[p] = 1; continue; }
            CHECK(!mprotect(at, 4096, PROT_READ | PROT_WRITE));
            if (c.op == DROP) { CHECK(!madvise(at, 4096, MADV_DONTNEED)); areas[i].seed[p] = 0; }
            else { areas[i].seed[p] = mix(s + p) | 2; fill(at, 4096, areas[i].seed[p]); }
        }
        return 0;
    }
    case SHARE:
        for (int i = 0; i < SHARES; i++) if (!shares[i].at) {
            shares[i].pages = 1 + s % 20; shares[i].seed = s | 2;
            shares[i].at = map(shares[i].pages * 4096L, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
            for (int p = 1; p < shares[i].pages; p += 1 + s % 3) fill(shares[i].at + p * 4096L, 4096, shares[i].seed + p);
            return 0;
        }
        return -1;
    case THREAD:
        if (thread_count == THREADS) return -1;
        threads[thread_count].thread = spawn(thread, (void *)(long)thread_count);
        while (!__atomic_load_n(&threads[thread_count].tid, __ATOMIC_RELAXED)) usleep(20);
        thread_count++;
        return 0;
    case MASK: {
        if (thread_count) return -1;
        sigset_t set; sigemptyset(&set); mask = 0;
        for (int i = 0; i < 3; i++) if ((s >> i) & 1) { sigaddset(&set, signals[i]); mask |= 1u << i; }
        CHECK(!sigprocmask(SIG_SETMASK, &set, 0)); pending &= mask;
        return 0;
    }
    case ACTION: { int i = s % 3; actions[i] = (s >> 8) & 1; signal(signals[i], actions[i] ? SIG_IGN : on_signal); if (actions[i]) pending &= ~(1ull << i); return 0; }
    case RAISE: { int i = s % 3; if (thread_count) return -1; kill(getpid(), signals[i]); pending |= mask & 1ull << i; return 0; }
    case SETTLE: {
        pid = getpid(); ppid = getppid(); pgid = getpgrp(); sid = getsid(0);
        int p[2]; CHECK(!pipe2(p, O_NONBLOCK)); put(p[0], 50, 0, SCRATCH_READ, 0, 0); put(p[1], 50, 1, SCRATCH_WRITE, 0, 0); close(p[0]); close(p[1]);
        return 0;
    }
    }
    return -1;
}

static int find(int what, int skip) { for (int i = 3; i < FDS; i++) if (fds[i].what == what && !skip--) return i; return -1; }

static void check_pipes(void) {
    static char buffer[65536];
    int in = find(SCRATCH_READ, 0), to = find(SCRATCH_WRITE, 0);
    for (int i = 3; i < FDS; i++) {
        if (fds[i].what == NOTHING || fds[i].what == LOG) continue;
        SAME(fcntl(i, F_GETFD), fds[i].cloexec ? FD_CLOEXEC : 0);
        if (fds[i].what != REST_READ) continue;
        int there; CHECK(!ioctl(i, FIONREAD, &there)); SAME(there, fds[i].length);
        if (!there) continue;
        /* tee(2) takes nothing out. */
        ssize_t n = syscall(SYS_tee, i, to, sizeof buffer, 2);
        SAME(n, there); SAME(read(in, buffer, sizeof buffer), there);
        CHECK(same(buffer, there, fds[i].seed));
    }
}
static void pass_tokens(void) {
    for (int n = 0; n < 3; n++) {
        int in = find(RING_READ, below(4)), to = find(RING_WRITE, below(4));
        uint64_t token[2];
        if (in < 0 || to < 0) continue;
        ssize_t got = read(in, token, sizeof token);
        if (got < 0 && errno == EAGAIN) continue;
        SAME(got, sizeof token); CHECK(token[0] < TOKENS);
        SAME(board->passed[token[0]], token[1]);
        board->passed[token[0]] = ++token[1];
        SAME(write(to, token, sizeof token), sizeof token);
    }
}
static void check(void) {
    SAME(getpid(), pid); if (me) SAME(getppid(), ppid); /* the root's is who restores it, for a moment */ SAME(getpgrp(), pgid); SAME(getsid(0), sid);
    int is; CHECK(!prctl(PR_GET_CHILD_SUBREAPER, &is)); SAME(is, subreaper);
    for (int i = 0; i < AREAS && areas[i].at; i++) for (int p = 0; p < areas[i].pages; p++) {
        char *at = areas[i].at + p * 4096L; uint64_t seed = areas[i].seed[p];
        if (seed != 1 && !(seed ? same(at, 4096, seed) : zero(at, 4096))) bad("page %d of area %d of %d", p, i, pid);
    }
    for (int i = 0; i < SHARES && shares[i].at; i++) {
        uint64_t *cell = (uint64_t *)shares[i].at + me;
        SAME(*cell, shares[i].count); *cell = ++shares[i].count;
        for (int p = 1; p < shares[i].pages; p++) {
            char *at = shares[i].at + p * 4096L;
            if (*(uint64_t *)at ? !same(at, 4096, shares[i].seed + p) : !zero(at, 4096)) bad("page %d of shared area %d of %d", p, i, pid);
        }
    }
    sigset_t set, waiting; CHECK(!sigprocmask(SIG_SETMASK, 0, &set)); CHECK(!sigpending(&waiting));
    for (int i = 0; i < 3; i++) {
        SAME(sigismember(&set, signals[i]), (mask >> i) & 1); SAME(sigismember(&waiting, signals[i]), (pending >> i) & 1);
        struct sigaction a; CHECK(!sigaction(signals[i], 0, &a)); CHECK(a.sa_handler == (actions[i] ? SIG_IGN : on_signal));
    }
    for (int i = 0; i < thread_count; i++) CHECK(!syscall(SYS_tgkill, pid, threads[i].tid, 0));
    check_pipes(); pass_tokens();
}

static void go_round(int mode) {
    if (mode == STOP) kill(pid, SIGSTOP);
    if (mode == PAUSE) while (!woken) pause();
    state = mix(pid);
    uint64_t last[TOKENS] = {0}; int idle[TOKENS] = {0};
    for (;;) {
        check();
        dprintf(out, "tick %d\n", me);
        /* The root has every ring, so that no token may rest for long. */
        for (int t = 0; t < TOKENS && !me; t++) { idle[t] = board->passed[t] == last[t] ? idle[t] + 1 : 0; last[t] = board->passed[t]; if (idle[t] > 2000) bad("token %d is lost", t); }
        nap(me ? 15 + below(15) : 5);
    }
}
static void obey(void) {
    for (uint32_t n = 1;; n++) {
        struct slot *slot = &board->slots[me];
        await(&slot->asked, n);
        int before = me;
        long result = act(slot->command);
        if (me != before) { n = 0; continue; }
        int settled = slot->command.op == SETTLE && result == 0, mode = slot->command.a;
        slot->result = result;
        set(&slot->done, n);
        if (settled) { await(&board->go, 1); go_round(mode); }
    }
}

/* The root's view of others. */
static int field(int of, int n) { /* proc_pid_stat(5); the state is 3 */
    char path[64], text[1024]; snprintf(path, sizeof path, "/proc/%d/stat", of);
    int f = open(path, O_RDONLY); if (f < 0) return -1;
    ssize_t got = read(f, text, sizeof text - 1); close(f); if (got <= 0) return -1; text[got] = 0;
    char *p = strrchr(text, ')') + 2;
    for (int i = 3; i < n; i++) p = strchr(p, ' ') + 1;
    return n == 3 ? *p : atoi(p);
}
static int state_of(int of) { return field(of, 3); }
static long ask(int who, int op, int a, int b) {
    struct slot *slot = &board->slots[who];
    slot->command = (struct command){op, a, b, next()};
    if (!who) { long result = act(slot->command); if (me) obey(); return result; }
    uint32_t n = slot->asked + 1;
    set(&slot->asked, n);
    /* A first thread that has ended leaves children to the others for as long as these are there. */
    if (op == EXIT) { int s; while ((s = state_of(slot->pid)) > 0 && (s != 'Z' || field(slot->pid, 20) > 1)) usleep(50); return 0; }
    uint32_t now; for (int i = 0; (now = __atomic_load_n(&slot->done, __ATOMIC_ACQUIRE)) < n; i++) { if (i > 15 || state_of(slot->pid) == 'Z') bad("member %d, pid %d, does not answer to %d, state %c, status %#x", who, slot->pid, op, state_of(slot->pid), field(slot->pid, 52)); futex(&slot->done, FUTEX_WAIT, now); }
    return slot->result;
}
static int slot_of(int of) { for (int i = 0; i < board->used; i++) if (board->slots[i].pid == of) return i; return -1; }

static void grow(void) {
    int count = 40 + below(200), most = 2 + below(LIVING - 2);
    for (int n = 0; n < count; n++) {
        int living[MEMBERS], l = 0;
        for (int i = 0; i < board->used; i++) if (board->slots[i].living) living[l++] = i;
        int who = living[below(3) ? below(l) : l - 1 - below(l > 3 ? 3 : l)];
        switch (below(27)) {
        case 0: case 1: case 2: case 3: case 4: case 5: case 24: case 25: case 26:
            if (l < most && board->used < MEMBERS) {
                int slot = board->used, how = below(20); how = how < 17 ? 0 : how - 16;
                long child = ask(who, FORK, slot, how);
                if (child > 0) { board->slots[slot].pid = child; board->slots[slot].living = 1; board->used++; }
            }
            break;
        case 6: case 7: ask(who, SETSID, 0, 0); break;
        case 8: ask(who, SETPGID, 0, 0); break;
        case 9: ask(who, SETPGID, getpgid(board->slots[living[below(l)]].pid), 0); break;
        case 10: if (who) ask(who, SUBREAPER, below(4) > 0, 0); break;
        case 11: case 12: case 13:
            if (who) {
                static const int ends[] = {0, 1, 255, 128 + SIGKILL, 128 + SIGTERM, 128 + SIGSEGV, 128 + SIGABRT, 128 + SIGUSR1};
                int parent = field(board->slots[who].pid, 4);
                ask(who, EXIT, ends[below(8)], 0);
                board->slots[who].living = 0;
                if (below(3)) ask(slot_of(parent), COLLECT, board->slots[who].pid, 0);
            }
            break;
        case 14: ask(who, PIPE, 0, 0); break;
        case 15: case 16: ask(who, DUP, 0, 0); break;
        case 17: ask(who, CLOSE, 0, 0); break;
        case 18: ask(who, MAP, 0, 0); break;
        case 19: { static const int ops[] = {CHANGE, CHANGE, PROTECT, DROP, UNMAP}; ask(who, ops[below(5)], 0, 0); break; }
        case 20: ask(who, SHARE, 0, 0); break;
        case 21: if (below(3) == 0) ask(who, THREAD, 0, 0); break;
        case 22: { static const int ops[] = {MASK, ACTION, RAISE, RAISE}; ask(who, ops[below(4)], 0, 0); break; }
        default: ask(who, CHANGE, 0, 0);
        }
    }
}

int main(int argc, char **argv) {
    begin(argc, argv);
    if (argc < 4) return 2;
    state = mix(strtoull(argv[3], 0, 0));
    dup3(out, 60, O_CLOEXEC); close(out); out = 60; fds[out].what = LOG;
    board = map(sizeof *board, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    board->used = 1; board->slots[0].pid = getpid(); board->slots[0].living = 1;
    struct sigaction wake = {.sa_handler = on_wake}; sigaction(SIGRTMIN + 1, &wake, 0);
    for (int i = 0; i < 3; i++) signal(signals[i], on_signal);
    ask(0, SUBREAPER, 1, 0);
    for (int r = 0; r < RINGS; r++) { int p[2]; CHECK(!pipe2(p, O_NONBLOCK)); put(p[0], 3, 0, RING_READ, 0, 0); put(p[1], 3, 0, RING_WRITE, 0, 0); close(p[0]); close(p[1]); }
    for (uint64_t t = 0; t < TOKENS; t++) { uint64_t token[2] = {t, 0}; CHECK(write(find(RING_WRITE, t % RINGS), token, sizeof token) == sizeof token); }
    grow();
    if (below(4) == 0) ask(0, SUBREAPER, 0, 0);
    for (int i = board->used - 1; i >= 0; i--) if (board->slots[i].living) {
        int mode = !i ? RUN : below(10) < 7 ? RUN : below(2) ? PAUSE : STOP;
        board->slots[i].mode = mode;
        CHECK(ask(i, SETTLE, mode, 0) == 0);
    }
    set(&board->go, 1);
    for (int i = 1; i < board->used; i++) {
        struct slot *s = &board->slots[i];
        if (s->living && s->mode == STOP) while (state_of(s->pid) != 'T') usleep(100);
        if (s->living) dprintf(out, "member %d %d %s\n", i, s->pid, s->mode == RUN ? "runs" : s->mode == STOP ? "stops" : "pauses");
    }
    dprintf(out, "member 0 %d runs\nsettled\n", getpid());
    go_round(RUN);
}
