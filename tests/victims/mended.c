/* An area that is several for a while, and then one again: only then mremap(2) takes it whole. mended LOG DIR [MIB more] */
#include "check.h"
#define SIZE (1 << 20)
int main(int argc, char **argv) {
    begin(argc, argv);
    size_t more = (argc > 3 ? atoi(argv[3]) : 0) * 1048576UL;
    char *rest = more ? map(more, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) : 0;
    for (size_t i = 0; i < more; i += 4096) rest[i] = 1 + i % 251;
    char *at = map(SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    char *to = map(SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    fill(at, SIZE, 7);
    CHECK(!mprotect(at + 65536, 16384, PROT_READ));
    const char *go = in_dir("go");
    for (int mended = 0;; ) {
        if (!mended && !access(go, F_OK)) {
            CHECK(!mprotect(at + 65536, 16384, PROT_READ | PROT_WRITE));
            CHECK(mremap(at, SIZE, SIZE, MREMAP_MAYMOVE | MREMAP_FIXED, to) == to);
            at = to;
            mended = 1;
        }
        CHECK(same(at, SIZE, 7));
        nap(1);
        tick();
    }
}
