/* Moves memory by whole page tables and never writes to it again: two areas change places, by mremap(2) of pieces that
 * begin and end where page tables do; and a third gives pages back, which are zero from then on, and reads them. */
#include "check.h"
#define TABLE (2ul << 20)
#define PAGES (2 * TABLE / 4096)
static char *a = (char *)0x500000000000, *b = (char *)0x510000000000, *aside = (char *)0x520000000000, *c = (char *)0x530000000000;
static void make(char *at) {
    CHECK(mmap(at, 2 * TABLE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == at);
    CHECK(!madvise(at, 2 * TABLE, MADV_NOHUGEPAGE));
}
static void paint(char *at, uint64_t of) { for (uint64_t p = 0; p < PAGES; p++) { uint64_t *page = (uint64_t *)(at + p * 4096); page[0] = of; page[511] = p; } }
static void look(char *at, uint64_t of) {
    for (uint64_t p = 0; p < PAGES; p++) { uint64_t *page = (uint64_t *)(at + p * 4096); SAME(page[0], of); SAME(page[511], p); }
}
static void move(char *from, char *to) { CHECK(mremap(from, 2 * TABLE, 2 * TABLE, MREMAP_MAYMOVE | MREMAP_FIXED, to) == to); }
int main(int argc, char **argv) {
    begin(argc, argv);
    make(a); make(b); make(c);
    paint(a, 1); paint(b, 2); paint(c, 3);
    uint64_t given = 0;
    for (uint64_t n = 0;; n++) {
        look(a, n % 2 ? 2 : 1); look(b, n % 2 ? 1 : 2);
        for (uint64_t p = 0; p < PAGES; p++) SAME(*(uint64_t *)(c + p * 4096), p < given ? 0 : 3);
        tick();
        nap(3);
        move(a, aside); move(b, a); move(aside, b);
        if (given < PAGES) { CHECK(!madvise(c + given * 4096, 4096, MADV_DONTNEED)); given++; }
    }
}
