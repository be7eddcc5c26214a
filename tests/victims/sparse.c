/* Writes one page of many at each tick, and knows what each must hold. argv[3]: MiB. */
#include "check.h"
int main(int argc, char **argv) {
    begin(argc, argv);
    size_t pages = (argc > 3 ? atoi(argv[3]) : 16) * 256ul;
    char *at = mmap(0, pages * 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0); CHECK(at != MAP_FAILED);
    CHECK(!madvise(at, pages * 4096, MADV_NOHUGEPAGE));
    for (size_t p = 0; p < pages; p++) { uint64_t *page = (uint64_t *)(at + p * 4096); page[0] = 1; page[511] = p; }
    for (uint64_t n = 0;; n++) {
        ++*(uint64_t *)(at + n % pages * 4096);
        for (size_t p = 0; p < pages; p++) {
            uint64_t *page = (uint64_t *)(at + p * 4096);
            SAME(page[0], 1 + (n + pages - p) / pages); SAME(page[511], p);
        }
        tick();
        nap(5);
    }
}
