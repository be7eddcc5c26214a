/* Threads that do to their memory all that can be done to memory, and know of every page what must be in it.
 * lazy LOG DIR [MIB] */
#include "check.h"
#include <sys/wait.h>
#define THREADS 4
#define BLOCK 128 /* pages */
#define MOST 2048
static int blocks;
struct own {
    int number;
    uint64_t random;
    char *at[MOST];
    uint32_t seed[MOST][BLOCK]; /* of each page; 0: it is zero */
    volatile uint64_t rounds;
};
static struct own *own[THREADS];

static uint64_t any(struct own *o, uint64_t below) { return mix(o->random += 0x9e3779b97f4a7c15) % below; }
static void check_page(struct own *o, int b, int p, const char *after) {
    char *page = o->at[b] + p * 4096;
    uint32_t seed = o->seed[b][p];
    if (seed ? !same(page, 4096, seed) : !zero(page, 4096))
        bad("thread %d block %d page %d (seed %u) is wrong %s: %016lx", o->number, b, p, seed, after, *(uint64_t *)page);
}
static void put_page(struct own *o, int b, int p) {
    o->seed[b][p] = (uint32_t)any(o, 1u << 30) + 1;
    fill(o->at[b] + p * 4096, 4096, o->seed[b][p]);
}
static void check_all(struct own *o, const char *after) {
    for (int b = 0; b < blocks; b++) for (int p = 0; p < BLOCK; p++) check_page(o, b, p, after);
}
static char *fresh(void) { return map(BLOCK * 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0); }

static void step(struct own *o) {
    int b = any(o, blocks), from = any(o, BLOCK), n = 1 + any(o, BLOCK - from);
    char *at = o->at[b] + from * 4096;
    size_t size = n * 4096;
    switch (any(o, 11)) {
    case 0: case 1: /* thrown away */
        CHECK(!madvise(at, size, MADV_DONTNEED));
        memset(&o->seed[b][from], 0, n * sizeof o->seed[b][0]);
        for (int p = from; p < from + n; p++) check_page(o, b, p, "after MADV_DONTNEED");
        break;
    case 2: /* thrown away, and looked at later */
        CHECK(!madvise(at, size, MADV_DONTNEED));
        memset(&o->seed[b][from], 0, n * sizeof o->seed[b][0]);
        break;
    case 3: { /* moved to where the kernel wants */
        char *to = fresh();
        void *moved = mremap(o->at[b], BLOCK * 4096, BLOCK * 4096, MREMAP_MAYMOVE | MREMAP_FIXED, to);
        /* A block that was dumped in pieces, some of them empty, may stay so (docs/support.md). */
        if (moved == MAP_FAILED && errno == EFAULT) { CHECK(!munmap(to, BLOCK * 4096)); break; }
        CHECK(moved == to);
        o->at[b] = to;
        for (int p = 0; p < BLOCK; p += 7) check_page(o, b, p, "after mremap");
        break;
    }
    case 4: /* unmapped, and mapped anew */
        CHECK(!munmap(o->at[b], BLOCK * 4096));
        o->at[b] = fresh();
        memset(o->seed[b], 0, sizeof o->seed[b]);
        check_page(o, b, from, "after munmap");
        break;
    case 5: /* no access for a while */
        CHECK(!mprotect(at, size, PROT_NONE));
        CHECK(!mprotect(at, size, PROT_READ));
        check_page(o, b, from, "after mprotect");
        CHECK(!mprotect(at, size, PROT_READ | PROT_WRITE));
        break;
    case 6: { /* a child sees the same, and may change its own */
        if (any(o, 8)) break;
        pid_t child = fork();
        CHECK(child >= 0);
        if (!child) {
            for (int i = 0; i < 100; i++) {
                int c = any(o, blocks), p = any(o, BLOCK);
                check_page(o, c, p, "in a child");
                if (i % 4 == 0) {
                    CHECK(!madvise(o->at[c], 8 * 4096, MADV_DONTNEED));
                    memset(o->seed[c], 0, 8 * sizeof o->seed[c][0]);
                }
            }
            if (any(o, 2)) execl("/bin/true", "true", (char *)0);
            _exit(0);
        }
        int status;
        CHECK(waitpid(child, &status, 0) == child);
        if (status) bad("a child ended with %#x", status);
        break;
    }
    case 7: { /* the kernel reads and writes it */
        int ends[2], p = from;
        char copy[4096];
        CHECK(!pipe2(ends, O_CLOEXEC));
        SAME(write(ends[1], o->at[b] + p * 4096, 4096), 4096);
        SAME(read(ends[0], copy, 4096), 4096);
        CHECK(o->seed[b][p] ? same(copy, 4096, o->seed[b][p]) : zero(copy, 4096));
        int q = any(o, BLOCK);
        SAME(write(ends[1], copy, 4096), 4096);
        SAME(read(ends[0], o->at[b] + q * 4096, 4096), 4096);
        o->seed[b][q] = o->seed[b][p];
        close(ends[0]); close(ends[1]);
        break;
    }
    case 8: { /* in pieces: shrunk, then grown again */
        if (from == 0) break;
        CHECK(mremap(o->at[b], BLOCK * 4096, from * 4096, 0) == o->at[b]);
        memset(&o->seed[b][from], 0, (BLOCK - from) * sizeof o->seed[b][0]);
        char *to = mremap(o->at[b], from * 4096, BLOCK * 4096, MREMAP_MAYMOVE);
        if (to == MAP_FAILED && errno == EFAULT) { /* as above */
            to = fresh();
            memcpy(to, o->at[b], from * 4096);
            CHECK(!munmap(o->at[b], from * 4096));
        }
        CHECK(to != MAP_FAILED);
        o->at[b] = to;
        check_page(o, b, from, "after growing");
        check_page(o, b, from - 1, "before what has grown");
        break;
    }
    default:
        for (int p = from; p < from + n; p++) put_page(o, b, p);
        check_page(o, b, any(o, BLOCK), "at any time");
    }
}
static __attribute__((noreturn)) void *work(void *arg) {
    struct own *o = arg;
    for (;;) {
        for (int i = 0; i < 20; i++) step(o);
        if (o->rounds++ % 64 == 0) check_all(o, "in a look at all");
    }
}
int main(int argc, char **argv) {
    begin(argc, argv);
    size_t mib = argc > 3 ? atoi(argv[3]) : 64;
    blocks = (int)(mib * 256 / BLOCK / THREADS);
    if (blocks > MOST) blocks = MOST;
    for (int t = 0; t < THREADS; t++) {
        struct own *o = own[t] = map(sizeof *o, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        o->number = t;
        o->random = t * 7919 + 1;
        for (int b = 0; b < blocks; b++) {
            o->at[b] = fresh();
            for (int p = 0; p < BLOCK; p++) if (b % 4 || p % 3) put_page(o, b, p);
        }
        spawn(work, o);
    }
    for (;; tick()) {
        uint64_t before[THREADS];
        for (int t = 0; t < THREADS; t++) before[t] = own[t]->rounds;
        for (int t = 0; t < THREADS; t++) while (own[t]->rounds < before[t] + 2) nap(1);
    }
}
