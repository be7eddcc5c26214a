/* Twenty processes in a ring, each with a channel from the one before it and one to the next: pipes, unix sockets, tcp
 * connections, terminals, shared memory. Numbered tokens go round; whoever loses, doubles or misses one says so, and
 * one that is deaf stops them all. argv[3] has the kinds of channels, a letter each: p pipe, u and q unix stream and
 * seqpacket, t tcp, y pseudo terminal, m shared memory. */
#include "check.h"
#include <linux/futex.h>
#include <netinet/in.h>
#include <sys/ioctl.h>
#include <termios.h>

enum { N = 20, TOKENS = 3 };
struct token { uint64_t id, hop; };
struct cell { uint32_t written, taken; struct token tokens[4]; };
static struct { uint64_t passed[TOKENS]; uint32_t ready; struct cell cells[N]; } *board;
static struct channel { char kind; int in, to, owing; struct cell *cell; const char *terminal; } channels[N];
static int me;

/* Only a dumper that is killed may make a call fail so (the harness lists which did). */
static int again(const char *call) { if (errno != EINTR) return 0; dprintf(out, "EINTR %s\n", call); return getenv("VICTIM_TOLERATES_EINTR") != 0; }
static void transfer(int fd, void *p, size_t n, int give, const char *call) {
    for (size_t at = 0; at < n;) {
        ssize_t got = give ? write(fd, (char *)p + at, n - at) : read(fd, (char *)p + at, n - at);
        if (got < 0 && again(call)) continue;
        if (got <= 0) bad("%s of %d in ring place %d gives %zd", call, fd, me, got);
        at += got;
    }
}
static void wait_for(uint32_t *word, uint32_t value) { uint32_t now; while ((now = __atomic_load_n(word, __ATOMIC_ACQUIRE)) < value) if (syscall(SYS_futex, word, FUTEX_WAIT, now, 0, 0, 0) && errno == EINTR) again("futex"); }
static void advance(uint32_t *word) { __atomic_add_fetch(word, 1, __ATOMIC_RELEASE); syscall(SYS_futex, word, FUTEX_WAKE, N, 0, 0, 0); }
static int both_ways(char kind) { return kind == 'u' || kind == 'q' || kind == 't' || kind == 'y'; }

static void give(struct channel *c, struct token t) {
    char ack;
    if (c->cell) { uint32_t n = c->cell->written; if (n >= 4) wait_for(&c->cell->taken, n - 3); c->cell->tokens[n % 4] = t; advance(&c->cell->written); return; }
    if (c->owing) { transfer(c->to, &ack, 1, 0, "read"); CHECK(ack == 'a'); c->owing = 0; }
    transfer(c->to, &t, sizeof t, 1, "write");
    c->owing = both_ways(c->kind);
}
static struct token take(struct channel *c) {
    struct token t;
    if (c->cell) { uint32_t n = c->cell->taken; wait_for(&c->cell->written, n + 1); t = c->cell->tokens[n % 4]; advance(&c->cell->taken); return t; }
    transfer(c->in, &t, sizeof t, 0, "read");
    if (both_ways(c->kind)) transfer(c->in, "a", 1, 1, "write");
    return t;
}

static void open_channel(struct channel *c, int i, char kind) {
    int p[2];
    c->kind = kind;
    switch (kind) {
    case 'p': CHECK(!pipe(p)); c->in = p[0]; c->to = p[1]; return;
    case 'u': case 'q': CHECK(!socketpair(AF_UNIX, kind == 'u' ? SOCK_STREAM : SOCK_SEQPACKET, 0, p)); c->in = p[0]; c->to = p[1]; return;
    case 't': {
        int l = socket(AF_INET, SOCK_STREAM, 0); struct sockaddr_in a = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)}; socklen_t n = sizeof a;
        CHECK(!bind(l, (void *)&a, n)); CHECK(!listen(l, 1)); CHECK(!getsockname(l, (void *)&a, &n));
        c->to = socket(AF_INET, SOCK_STREAM, 0); CHECK(!connect(c->to, (void *)&a, n)); c->in = accept(l, 0, 0); CHECK(c->in >= 0); close(l); return;
    }
    case 'y': {
        c->to = posix_openpt(O_RDWR | O_NOCTTY); CHECK(c->to >= 0); CHECK(!unlockpt(c->to));
        c->terminal = strdup(ptsname(c->to)); c->in = open(c->terminal, O_RDWR | O_NOCTTY); CHECK(c->in >= 0);
        struct termios t; CHECK(!tcgetattr(c->in, &t)); cfmakeraw(&t); CHECK(!tcsetattr(c->in, TCSANOW, &t)); return;
    }
    case 'm': c->in = c->to = -1; c->cell = &board->cells[i]; return;
    default: bad("no channels of kind %c", kind);
    }
}

static void *beside(void *p) { uint64_t own[64]; fill(own, sizeof own, (long)p); for (;;) { CHECK(same(own, sizeof own, (long)p)); nap(3); } return 0; }
static void live(void) {
    struct channel *before = &channels[(me + N - 1) % N], *after = &channels[me];
    for (int i = 0; i < N; i++) {
        if (&channels[i] != before && channels[i].in >= 0) close(channels[i].in);
        if (&channels[i] != after && channels[i].to >= 0) close(channels[i].to);
    }
    if (before->terminal && me % 2) { CHECK(setsid() == getpid()); CHECK(!ioctl(before->in, TIOCSCTTY, 0)); }
    else if (me % 5 == 4) CHECK(!setpgid(0, 0));
    char *own = map(64 * 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0); fill(own, 64 * 4096, me);
    if (me % 7 == 3) for (long i = 1; i <= 2; i++) spawn(beside, (void *)(me * 10 + i));
    pid_t pid = getpid(), above = getppid(), group = getpgrp(), session = getsid(0);
    advance(&board->ready); wait_for(&board->ready, N);
    if (!me) for (uint64_t t = 0; t < TOKENS; t++) give(after, (struct token){t, 1});
    for (uint64_t n = 0;; n++) {
        struct token t = take(before);
        CHECK(t.id < TOKENS); SAME(t.hop % N, me); SAME(board->passed[t.id], t.hop - 1);
        board->passed[t.id] = t.hop++;
        SAME(getpid(), pid); if (me) SAME(getppid(), above); /* the root's is who restores it, for a moment */ SAME(getpgrp(), group); SAME(getsid(0), session);
        if (n % 16 == 0) CHECK(same(own, 64 * 4096, me));
        if (!me) { if (t.id == 0) tick(); nap(2); } else if (me % 6 == 2) nap(1);
        give(after, t);
    }
}
int main(int argc, char **argv) {
    begin(argc, argv);
    const char *kinds = argc > 3 ? argv[3] : "puqym";
    board = map(sizeof *board, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    for (int i = 0; i < N; i++) open_channel(&channels[i], i, kinds[i % strlen(kinds)]);
    /* Who is below whom: three below each. */
    for (int next = 1; next < N; next++) if ((next - 1) / 3 == me) { pid_t child = fork(); CHECK(child >= 0); if (!child) me = next; }
    live();
}
