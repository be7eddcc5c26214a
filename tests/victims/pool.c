/* Shared memory of every kind: a memfd, a System V segment, MAP_SHARED | MAP_ANONYMOUS, a file of tmpfs. Each page knows which
 * generation of it this is; DIR/turn-N makes a turn, DIR/turned-N tells that it was made. What a turn changes is told by
 * the table in tests/system/content.rs. argv[3]: a place on tmpfs. */
#include "check.h"
#include <sys/ipc.h>
#include <sys/shm.h>
#include <sys/wait.h>
#define PAGE 4096ul
enum { MEMFD, SYSV, ANON, NAMED, KINDS };
static struct { char *at; size_t pages; unsigned generation[2048]; } pool[KINDS];
static int fd, named;
static uint64_t seed(int kind, size_t page, unsigned g) { return ((uint64_t)kind << 56) + ((uint64_t)page << 32) + ((uint64_t)g << 16); }
static void make(int kind, size_t page) { fill(pool[kind].at + page * PAGE, PAGE, seed(kind, page, ++pool[kind].generation[page])); }
static void check(void) {
    for (int k = 0; k < KINDS; k++) for (size_t p = 0; p < pool[k].pages; p++) {
        const char *page = pool[k].at + p * PAGE; unsigned g = pool[k].generation[p];
        if (!(g ? same(page, PAGE, seed(k, p, g)) : zero(page, PAGE))) bad("page %zu of kind %d is not of generation %u", p, k, g);
    }
    SAME(lseek(fd, 0, SEEK_END), pool[MEMFD].pages * PAGE);
}
static void turn(int n) {
    if (n == 1) {
        /* Not by way of the mapping: nothing in its page tables tells. */
        for (size_t p = 100; p < 105; p++) { static uint64_t page[512]; fill(page, PAGE, seed(MEMFD, p, ++pool[MEMFD].generation[p])); CHECK(pwrite(fd, page, PAGE, p * PAGE) == (ssize_t)PAGE); }
        for (size_t p = 0; p < 5; p++) make(MEMFD, p);
        /* By another process. */
        pid_t child = fork(); CHECK(child >= 0);
        if (!child) { for (size_t p = 40; p < 43; p++) make(SYSV, p); _exit(0); }
        int st; CHECK(waitpid(child, &st, 0) == child && !st); for (size_t p = 40; p < 43; p++) pool[SYSV].generation[p]++;
        for (size_t p = 508; p < 512; p++) make(ANON, p);
        make(NAMED, 7);
        /* Given back, and written with what was there. */
        CHECK(!fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 200 * PAGE, 8 * PAGE)); for (size_t p = 200; p < 208; p++) pool[MEMFD].generation[p] = 0;
        memset(pool[ANON].at + 9 * PAGE, 0, PAGE); pool[ANON].generation[9] = 0;
        for (size_t p = 300; p < 400; p++) if (pool[MEMFD].generation[p]) fill(pool[MEMFD].at + p * PAGE, PAGE, seed(MEMFD, p, pool[MEMFD].generation[p]));
    } else if (n == 2) {
        /* It grows, and what was given back comes again; one page is another generation once more, one as it was first. */
        CHECK(!ftruncate(fd, 1100 * PAGE)); pool[MEMFD].at = mremap(pool[MEMFD].at, 1024 * PAGE, 1100 * PAGE, MREMAP_MAYMOVE); CHECK(pool[MEMFD].at != MAP_FAILED); pool[MEMFD].pages = 1100;
        for (size_t p = 1050; p < 1060; p++) make(MEMFD, p);
        make(MEMFD, 204); make(MEMFD, 0);
        pool[ANON].generation[508] = 0; make(ANON, 508);
        make(SYSV, 511);
    }
}
int main(int argc, char **argv) {
    begin(argc, argv);
    CHECK(argc > 3);
    for (int k = 0; k < KINDS; k++) pool[k].pages = k == MEMFD ? 1024 : 512;
    fd = memfd_create("pool", MFD_CLOEXEC); CHECK(fd >= 0 && !ftruncate(fd, 1024 * PAGE));
    pool[MEMFD].at = map(1024 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    int id = shmget(IPC_PRIVATE, 512 * PAGE, IPC_CREAT | 0600); CHECK(id >= 0);
    pool[SYSV].at = shmat(id, 0, 0); CHECK(pool[SYSV].at != (void *)-1 && !shmctl(id, IPC_RMID, 0));
    pool[ANON].at = map(512 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    named = open(argv[3], O_RDWR | O_CREAT | O_CLOEXEC, 0600); CHECK(named >= 0 && !ftruncate(named, 512 * PAGE));
    pool[NAMED].at = map(512 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, named, 0);
    /* Some was never written to. */
    for (int k = 0; k < KINDS; k++) for (size_t p = 0; p < pool[k].pages; p++) if (p % 64 != 63) make(k, p);
    for (int n = 1;;) {
        char name[32]; snprintf(name, sizeof name, "turn-%d", n);
        if (!access(in_dir(name), F_OK)) { turn(n); snprintf(name, sizeof name, "turned-%d", n++); close(open(in_dir(name), O_CREAT | O_WRONLY, 0600)); }
        check(); tick(); nap(5);
    }
}
