/* 64 MiB of full huge pages, and some thrown away. */
#include "check.h"
int main(int argc, char **argv) {
    begin(argc, argv);
    size_t size = 64 << 20;
    char *p = map(size + (2 << 20), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    p = (char *)(((uintptr_t)p + (2 << 20) - 1) & ~((2ul << 20) - 1));
    madvise(p, size, MADV_HUGEPAGE);
    fill(p, size, 1);
    for (size_t at = 0; at < size; at += 16 << 20) CHECK(!madvise(p + at, 4096, MADV_DONTNEED));
    for (uint64_t n = 0;; n++, tick()) {
        for (size_t at = 0; at < size; at += 4096) {
            int dropped = at % (16 << 20) == 0;
            if (dropped ? !zero(p + at, 4096) : !same(p + at, 4096, 1 + at / 8)) bad("page at %zu changed", at);
        }
        /* Private memory must give zeros when thrown away, also after a restore. */
        CHECK(!madvise(p + (1 << 20), 4096, MADV_DONTNEED)); CHECK(zero(p + (1 << 20), 4096)); fill(p + (1 << 20), 4096, 1 + (1 << 20) / 8);
        nap(20);
    }
}
