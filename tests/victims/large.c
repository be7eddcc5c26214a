/* As many MiB as asked for: a third random, a third that compresses, a third of single pages between zeros. */
#include "check.h"
static uint64_t word(uint64_t i) { i ^= i >> 31; i *= 0x7fb5d329728ea185ull; i ^= i >> 27; i *= 0x81dadef4bc2dd44dull; return i ^ i >> 33; }
static uint64_t expected(size_t page, size_t i) {
    if (page % 3 == 0) return word(page * 512 + i);
    if (page % 3 == 1) return page * 2654435761ull + i / 64;
    return page % 2 ? page + i % 5 : 0;
}
int main(int argc, char **argv) {
    begin(argc, argv);
    size_t pages = (size_t)(argc > 3 ? atoi(argv[3]) : 16) << 8;
    uint64_t *m = map(pages << 12, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    for (size_t page = 0; page < pages; page++) for (size_t i = 0; i < 512; i++) m[page * 512 + i] = expected(page, i);
    for (size_t turn = 0;; turn++, tick()) {
        for (size_t page = turn % 7; page < pages; page += 7) for (size_t i = 0; i < 512; i += 3)
            if (m[page * 512 + i] != expected(page, i)) bad("page %zu word %zu changed", page, i);
        nap(10);
    }
}
