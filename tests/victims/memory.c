/* Memory of every kind, with what smaps shows of it. */
#include "check.h"
#ifndef MADV_GUARD_INSTALL
#define MADV_GUARD_INSTALL 102
#endif
/* Looking at /proc takes a descriptor that cannot be dumped: only now and then. */
static unsigned round_;
#define vm_flag(p, f) (round_ % 8 == 7 ? vm_flag(p, f) : -2)
static int seen(int flag, int wanted) { return flag == -2 || flag == wanted; }
static volatile sig_atomic_t faults;
static void *touched;
static void on_fault(int s, siginfo_t *i, void *c) {
    (void)s; (void)c;
    faults++;
    if (i->si_addr != touched || faults > 1) bad("fault at %p instead of %p", i->si_addr, touched);
    /* Whoever set the trap opens it again: the access is repeated. */
    CHECK(!mprotect((void *)((uintptr_t)touched & ~4095ul), 4096, PROT_READ | PROT_WRITE));
}
static void guarded(char *p) {
    faults = 0; touched = p;
    *(volatile char *)p = 1;
    SAME(faults, 1);
    CHECK(!mprotect(p, 4096, PROT_NONE));
}
/* A guard page cannot be opened by mprotect: ask the kernel instead of touching it. */
static int is_guard(int mem, char *p) { char c; errno = 0; return pread(mem, &c, 1, (off_t)p) < 0 && (errno == EIO || errno == EFAULT); }
int main(int argc, char **argv) {
    begin(argc, argv);
    int rw = PROT_READ | PROT_WRITE, anon = MAP_PRIVATE | MAP_ANONYMOUS;
    struct sigaction sa = {.sa_sigaction = on_fault, .sa_flags = SA_SIGINFO}; sigaction(SIGSEGV, &sa, 0);
    int mem = open("/proc/thread-self/mem", O_RDONLY); (void)mem;
    close(mem);
    /* anonymous: full, sparse, thrown away in the middle, read-only, execute-only code */
    size_t big = 16 << 20;
    char *full = map(big, rw, anon, -1, 0); fill(full, big, 1);
    CHECK(!madvise(full + (4 << 20), 1 << 20, MADV_DONTNEED)); CHECK(!mprotect(full, 1 << 20, PROT_READ));
    char *sparse = map(64 << 20, rw, anon, -1, 0); for (int i = 0; i < 64; i++) fill(sparse + ((size_t)i << 20) + (i % 256) * 4096, 4096, 100 + i);
    char *none = map(1 << 20, rw, anon, -1, 0); fill(none, 1 << 20, 2); CHECK(!mprotect(none, 1 << 20, PROT_NONE));
    unsigned char *code = map(4096, rw, anon, -1, 0); memcpy(code, "\xb8\x39\x05\x00\x00\xc3", 6); CHECK(!mprotect(code, 4096, PROT_READ | PROT_EXEC)); /* mov eax, 1337; ret */
    char *reserve = map(1ul << 40, PROT_NONE, anon | MAP_NORESERVE, -1, 0);
    CHECK(!mprotect(reserve + (1ul << 39), 1 << 20, rw)); fill(reserve + (1ul << 39), 1 << 20, 3);
    /* a file, mapped private with some pages changed, and shared, and read-only although open for writing */
    char *path = in_dir("file"); int fd = open(path, O_CREAT | O_RDWR | O_TRUNC | O_CLOEXEC, 0600); CHECK(!ftruncate(fd, 2 << 20));
    char *fshared = map(2 << 20, rw, MAP_SHARED, fd, 0); fill(fshared, 2 << 20, 4);
    char *fprivate = map(2 << 20, rw, MAP_PRIVATE, fd, 0); for (int i = 0; i < 512; i += 7) fill(fprivate + i * 4096, 4096, 5 + i);
    char *fro = map(1 << 20, PROT_READ, MAP_SHARED, fd, 1 << 20); char *fpro = map(8192, PROT_READ, MAP_PRIVATE, fd, 4096);
    close(fd);
    /* longer than its file: the rest gives SIGBUS, the tail of the last page is zero */
    int shortfd = open(in_dir("short"), O_CREAT | O_RDWR | O_CLOEXEC, 0600); CHECK(write(shortfd, "short", 5) == 5); char *shortmap = map(4 * 4096, rw, MAP_PRIVATE, shortfd, 0); close(shortfd); shortmap[100] = 'x';
    /* shared anonymous, in two views that are one */
    char *shared = map(1 << 20, rw, MAP_SHARED | MAP_ANONYMOUS, -1, 0); char *view = mremap(shared, 0, 1 << 20, MREMAP_MAYMOVE); CHECK(view != MAP_FAILED); fill(shared, 1 << 20, 6);
    char *part = mremap(shared + 65536, 0, 65536, MREMAP_MAYMOVE); CHECK(part != MAP_FAILED); CHECK(!mprotect(part, 65536, PROT_READ));
    /* memfd with seals, mapped twice, one of them private with changes */
    int memfd = memfd_create("victim memfd", MFD_ALLOW_SEALING | MFD_CLOEXEC); CHECK(!ftruncate(memfd, (1 << 20) + 100)); char *mm = map(1 << 20, rw, MAP_SHARED, memfd, 0); fill(mm, 1 << 20, 7); char *mp = map(1 << 20, rw, MAP_PRIVATE, memfd, 0); fill(mp + 8192, 4096, 8);
    CHECK(!fcntl(memfd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW));
    int sealed = memfd_create("sealed", MFD_ALLOW_SEALING); CHECK(write(sealed, "sealed", 6) == 6); CHECK(!fcntl(sealed, F_ADD_SEALS, F_SEAL_WRITE | F_SEAL_SEAL)); char *sm = map(4096, PROT_READ, MAP_PRIVATE, sealed, 0);
    /* a file that is gone and only mapped */
    char *gonepath = in_dir("gone"); int gone = open(gonepath, O_CREAT | O_RDWR | O_CLOEXEC, 0600); CHECK(!ftruncate(gone, 65536)); char *gm = map(65536, rw, MAP_SHARED, gone, 0), *gp = map(65536, rw, MAP_PRIVATE, gone, 0); fill(gm, 65536, 9); fill(gp + 4096, 4096, 10); close(gone); unlink(gonepath);
    /* heap by brk */
    void *brk0 = sbrk(0); char *heap = sbrk(5 << 20); CHECK(heap == brk0); fill(heap, 5 << 20, 11); brk0 = sbrk(0);
    /* advice and locks */
    struct { int advice; const char *flag; char *p; } advice[] = {
        {MADV_DONTFORK, "dc", 0}, {MADV_DONTDUMP, "dd", 0}, {MADV_WIPEONFORK, "wf", 0}, {MADV_SEQUENTIAL, "sr", 0}, {MADV_RANDOM, "rr", 0}, {MADV_HUGEPAGE, "hg", 0}, {MADV_NOHUGEPAGE, "nh", 0}, {MADV_MERGEABLE, "mg", 0}};
    size_t n = sizeof advice / sizeof *advice;
    for (size_t i = 0; i < n; i++) { advice[i].p = map(3 << 20, rw, anon, -1, 0); fill(advice[i].p, 65536, 200 + i); if (madvise(advice[i].p, 3 << 20, advice[i].advice)) advice[i].flag = 0; }
    char *locked = map(65536, rw, anon, -1, 0); fill(locked, 65536, 12); CHECK(!mlock(locked, 65536));
    char *later = map(65536, rw, anon, -1, 0); int onfault = !mlock2(later, 65536, MLOCK_ONFAULT); fill(later, 4096, 13);
    char *down = map(65536, rw, anon | MAP_GROWSDOWN, -1, 0); fill(down, 65536, 14);
    char *trap = map(4096, PROT_NONE, anon, -1, 0);
    char *guard = map(16 * 4096, rw, anon, -1, 0); fill(guard, 16 * 4096, 15); int guards = !madvise(guard + 4 * 4096, 2 * 4096, MADV_GUARD_INSTALL);
    prctl(0x53564d41, 0, locked, 65536, "victim area"); /* PR_SET_VMA, PR_SET_VMA_ANON_NAME */
    CHECK(!prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0));
    prctl(PR_SET_DUMPABLE, 1);
    char stack[3 << 20]; fill(stack, sizeof stack, 16); /* a big stack */
    char buf[64];
    for (;; tick()) {
        CHECK(same(full, 4 << 20, 1)); CHECK(zero(full + (4 << 20), 1 << 20)); CHECK(same(full + (5 << 20), big - (5 << 20), 1 + (5 << 20) / 8));
        CHECK(seen(vm_flag(full, "wr"), 0) && seen(vm_flag(full + (2 << 20), "wr"), 1));
        for (int i = 0; i < 64; i++) { char *p = sparse + ((size_t)i << 20); CHECK(same(p + (i % 256) * 4096, 4096, 100 + i)); CHECK(zero(p + (i % 256 + 1) * 4096, 4096)); }
        CHECK(seen(vm_flag(none, "rd"), 0)); CHECK(!mprotect(none, 1 << 20, PROT_READ)); CHECK(same(none, 1 << 20, 2)); CHECK(!mprotect(none, 1 << 20, PROT_NONE));
        SAME(((int (*)(void))code)(), 1337);
        CHECK(same(reserve + (1ul << 39), 1 << 20, 3)); CHECK(seen(vm_flag(reserve, "nr"), 1));
        CHECK(same(fshared, 2 << 20, 4)); CHECK(same(fro, 1 << 20, 4 + (1 << 20) / 8)); CHECK(same(fpro, 8192, 4 + 512)); CHECK(seen(vm_flag(fro, "mw"), 1));
        for (int i = 0; i < 512; i++) CHECK(same(fprivate + i * 4096, 4096, i % 7 == 0 ? 5 + i : 4 + i * 512));
        fprivate[3 * 4096]++; CHECK(same(fshared, 2 << 20, 4)); fprivate[3 * 4096]--;
        fshared[0]++; CHECK(fprivate[0] == (char)mix(5)); fshared[0]--;
        CHECK(!memcmp(shortmap, "short", 6) && shortmap[100] == 'x' && shortmap[101] == 0);
        CHECK(same(shared, 1 << 20, 6)); shared[70000]++; CHECK(view[70000] == shared[70000] && part[70000 - 65536] == shared[70000]); shared[70000]--; CHECK(same(view, 1 << 20, 6));
        CHECK(same(mm, 1 << 20, 7)); CHECK(same(mp + 8192, 4096, 8)); CHECK(same(mp, 8192, 7)); mm[0]++; CHECK(pread(memfd, buf, 1, 0) == 1 && buf[0] == mm[0] && mp[0] == mm[0]); mm[0]--;
        SAME(fcntl(memfd, F_GET_SEALS), F_SEAL_SHRINK | F_SEAL_GROW); SAME(lseek(memfd, 0, SEEK_END), (1 << 20) + 100);
        SAME(fcntl(sealed, F_GET_SEALS), F_SEAL_WRITE | F_SEAL_SEAL); CHECK(!memcmp(sm, "sealed", 6)); CHECK(pwrite(sealed, "x", 1, 0) < 0 && errno == EPERM);
        CHECK(same(gm, 65536, 9)); CHECK(same(gp + 4096, 4096, 10)); CHECK(same(gp, 4096, 9)); gm[0]++; CHECK(gp[0] == gm[0]); gm[0]--;
        CHECK(sbrk(0) == brk0); CHECK(same(heap, 5 << 20, 11)); CHECK(sbrk(4096) == brk0); CHECK(zero(brk0, 4096)); CHECK(sbrk(-4096) != (void *)-1); CHECK(sbrk(0) == brk0);
        for (size_t i = 0; i < n; i++) { CHECK(same(advice[i].p, 65536, 200 + i)); if (advice[i].flag && !seen(vm_flag(advice[i].p, advice[i].flag), 1)) bad("advice %s is gone", advice[i].flag); }
        CHECK(same(locked, 65536, 12)); CHECK(seen(vm_flag(locked, "lo"), 1)); CHECK(same(later, 4096, 13)); if (onfault) CHECK(seen(vm_flag(later, "lo"), 1) && zero(later + 8192, 1));
        CHECK(same(down, 65536, 14)); CHECK(seen(vm_flag(down, "gd"), 1));
        guarded(trap);
        int m = round_ % 8 == 7 ? open("/proc/self/mem", O_RDONLY) : -1;
        CHECK(same(guard, 4 * 4096, 15)); if (guards && m >= 0) { CHECK(is_guard(m, guard + 4 * 4096) && is_guard(m, guard + 5 * 4096)); CHECK(!is_guard(m, guard + 6 * 4096)); } CHECK(same(guard + 6 * 4096, 10 * 4096, 15 + 6 * 512));
        if (m >= 0) close(m);
        CHECK(same(stack, sizeof stack, 16));
        SAME(prctl(PR_GET_THP_DISABLE, 0, 0, 0, 0), 1); SAME(prctl(PR_GET_DUMPABLE), 1);
        round_++;
        nap(20);
    }
}
