/* Writes all over its memory, in every way there is, and knows what each page must hold: page P of an area was
 * written WRITES[P] times, which it says itself, and is zero before the first time or when it was given back.
 * argv[3]: MiB of its largest area; argv[4]: pages to write between two checks. */
#include "check.h"
#include <sys/wait.h>
#define PAGE 4096ul
struct area { char *at; size_t pages; uint32_t *writes; int file; };
struct stamp { uint64_t area, page, count; };
static uint64_t seed = 88172645463325252ull;
static uint64_t rnd(void) { seed ^= seed << 13; seed ^= seed >> 7; seed ^= seed << 17; return seed; }
static int pipe_[2];
static void stamp(struct area *a, size_t p, int how) {
    struct stamp s = {(uint64_t)(uintptr_t)a, p, ++a->writes[p]};
    char *page = a->at + p * PAGE;
    if (how == 0) { memcpy(page, &s, sizeof s); memcpy(page + PAGE - sizeof s, &s, sizeof s); return; }
    /* by the kernel: read(2) into it */
    for (int i = 0; i < 2; i++) {
        CHECK(write(pipe_[1], &s, sizeof s) == sizeof s);
        CHECK(read(pipe_[0], i ? page + PAGE - sizeof s : page, sizeof s) == sizeof s);
    }
}
static void look(struct area *a, size_t p) {
    for (int i = 0; i < 2; i++) {
        struct stamp s;
        memcpy(&s, a->at + p * PAGE + (i ? PAGE - sizeof s : 0), sizeof s);
        if (!a->writes[p]) { if (!a->file && (s.area | s.page | s.count)) bad("page %zu of %p is not zero: count %lu", p, (void *)a->at, s.count); continue; }
        if (s.area != (uintptr_t)a || s.page != p || s.count != a->writes[p])
            bad("page %zu of %p (%s) says %lx %lu %lu, not %lx %lu %u", p, (void *)a->at, i ? "end" : "start", s.area, s.page, s.count, (long)a, p, a->writes[p]);
    }
}
static void check_all(struct area *a) { for (size_t p = 0; p < a->pages; p++) look(a, p); }
static void area(struct area *a, size_t pages, int huge) {
    a->pages = pages; a->file = 0;
    a->at = mmap(0, pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0); CHECK(a->at != MAP_FAILED);
    if (huge) madvise(a->at, pages * PAGE, MADV_HUGEPAGE); else madvise(a->at, pages * PAGE, MADV_NOHUGEPAGE);
    a->writes = calloc(pages, 4); CHECK(a->writes);
}
static void forget(struct area *a, size_t from, size_t n) { for (size_t i = 0; i < n; i++) a->writes[from + i] = 0; }
static void *other(void *arg) { /* a thread that writes its own pages all the time */
    struct area *a = arg;
    for (;;) { for (size_t p = 0; p < a->pages; p++) { stamp(a, p, 0); look(a, p); } nap(1); }
}
int main(int argc, char **argv) {
    begin(argc, argv);
    size_t mib = argc > 3 ? atoi(argv[3]) : 16, burst = argc > 4 ? atoi(argv[4]) : 64;
    static struct area big, small, huge, moved, file, own, heap;
    CHECK(!pipe2(pipe_, O_CLOEXEC));
    area(&big, mib * 256, 0); area(&small, 64, 0); area(&huge, 2048, 1); area(&moved, 128, 0); area(&own, 32, 0);
    int fd = open(in_dir("mapped"), O_RDWR | O_CREAT | O_CLOEXEC, 0600); CHECK(!ftruncate(fd, 64 * PAGE));
    file = (struct area){.pages = 64, .file = 1, .writes = calloc(64, 4), .at = mmap(0, 64 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0)}; CHECK(file.at != MAP_FAILED); close(fd);
    heap = (struct area){.pages = 0, .writes = calloc(4096, 4), .at = (char *)(((uintptr_t)sbrk(0) + PAGE - 1) & ~(PAGE - 1))}; CHECK(!brk(heap.at));
    for (size_t p = 0; p < big.pages; p++) if (p % 9) stamp(&big, p, 0);
    for (size_t p = 0; p < huge.pages; p++) stamp(&huge, p, 0);
    spawn(other, &own);
    struct area *all[] = {&big, &small, &huge, &moved, &file, &heap};
    for (uint64_t n = 0;; n++) {
        for (size_t i = 0; i < burst; i++) {
            struct area *a = all[rnd() % 6];
            if (rnd() % 4) a = &big;
            if (a->pages) stamp(a, rnd() % a->pages, rnd() % 8 == 0);
        }
        size_t at, count;
        switch (rnd() % 8) {
        case 0: /* given back: a few pages, and a large piece */
            at = rnd() % big.pages; count = rnd() % 40; if (at + count > big.pages) count = big.pages - at;
            CHECK(!count || !madvise(big.at + at * PAGE, count * PAGE, MADV_DONTNEED)); forget(&big, at, count);
            break;
        case 1:
            at = rnd() % 3 * 512; CHECK(!madvise(huge.at + at * PAGE, 1024 * PAGE > (huge.pages - at) * PAGE ? (huge.pages - at) * PAGE : 1024 * PAGE, MADV_DONTNEED));
            forget(&huge, at, 1024 > huge.pages - at ? huge.pages - at : 1024);
            break;
        case 2: { /* moved elsewhere */
            char *to = mremap(moved.at, moved.pages * PAGE, moved.pages * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, mmap(0, moved.pages * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
            CHECK(to != MAP_FAILED); moved.at = to;
            break;
        }
        case 3: /* another area in its place */
            CHECK(mmap(small.at, small.pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == small.at); forget(&small, 0, small.pages);
            break;
        case 4: /* the heap grows and shrinks */
            count = rnd() % 300; CHECK(!brk(heap.at + count * PAGE)); if (count < heap.pages) forget(&heap, count, heap.pages - count); heap.pages = count;
            break;
        case 5: { /* a child that writes, too */
            pid_t p = fork(); CHECK(p >= 0);
            if (!p) { for (int i = 0; i < 50; i++) { stamp(&big, rnd() % big.pages, 0); } check_all(&small); _exit(0); }
            int st; while (waitpid(p, &st, 0) < 0 && errno == EINTR) {}
            SAME(st, 0);
            break;
        }
        case 6: /* read only for a while */
            CHECK(!mprotect(big.at, 64 * PAGE, PROT_READ)); look(&big, 3); CHECK(!mprotect(big.at, 64 * PAGE, PROT_READ | PROT_WRITE));
            break;
        default: break;
        }
        for (size_t i = 0; i < 6; i++) if (n % 4 == 3 || all[i]->pages < 1000) check_all(all[i]);
        tick();
        nap(2);
    }
}
