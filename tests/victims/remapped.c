/* A part of its memory is moved away, and back to where it was (mremap(2)): the kernel makes one area of both parts then.
 * Every time it is asked, pages of the part that stays are written. */
#include "check.h"
#include <sys/mman.h>
#define PAGES 512
#define PAGE 4096ul
static volatile sig_atomic_t asked;
static void ask(int s) { (void)s; asked = 1; }
int main(int argc, char **argv) {
    begin(argc, argv);
    char *whole = map(2 * PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0), *part = whole;
    char *elsewhere = map(PAGES * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    char *stays = whole + PAGES * PAGE;
    CHECK(!madvise(whole, 2 * PAGES * PAGE, MADV_NOHUGEPAGE));
    memset(whole, 1, 2 * PAGES * PAGE);
    signal(SIGUSR1, ask);
    int written = 1;
    for (int turn = 0;; tick()) {
        for (int i = 0; i < PAGES; i++) {
            SAME(part[i * PAGE], 1);
            SAME(stays[i * PAGE], i % 2 ? written : 1);
        }
        if (asked) {
            asked = 0;
            char *to = turn % 3 == 0 ? elsewhere : turn % 3 == 1 ? whole : part;
            if (to != part) CHECK(mremap(part, PAGES * PAGE, PAGES * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, to) == to);
            part = to;
            written++;
            for (int i = 1; i < PAGES; i += 2) stays[i * PAGE] = written;
            turn++;
        }
        nap(5);
    }
}
