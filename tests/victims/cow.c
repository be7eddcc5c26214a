/* Memory that parent and children still share copy-on-write, parts of it changed, dropped or given another protection by either. */
#include "family.h"
#define SIZE (32 << 20)
static unsigned char *m; static unsigned seed[16];
static unsigned char at(size_t page, int who) { return (unsigned char)(page * 7 + 3 + (who >= 0 && page % 97 == (size_t)who ? 100 + who : 0)); }
static void check(int who) {
    for (size_t page = 0; page < SIZE / 4096; page += 1 + (seed[0]++ % 3)) {
        size_t i = page * 4096 + (page * 31) % 4096;
        if (who >= 0 && page >= 4000 && page < 4100) { SAME(m[i], who == 1 ? 0 : at(page, who)); continue; }
        if (m[i] != at(page, who)) bad("member %d: page %zu is %d, not %d", who, page, m[i], at(page, who));
    }
}
int main(int argc, char **argv) {
    begin_family(argc, argv); m = mmap(0, SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0); madvise(m, SIZE, MADV_NOHUGEPAGE);
    for (size_t page = 0; page < SIZE / 4096; page++) memset(m + page * 4096, at(page, -1), 4096);
    char *ro = mmap(0, 1 << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0); memset(ro, 9, 1 << 20); mprotect(ro, 1 << 20, PROT_READ);
    members = 5;
    for (int who = 0; who < 4; who++) if (!fork()) {
        for (size_t page = 0; page < SIZE / 4096; page++) if (page % 97 == (size_t)who) memset(m + page * 4096, at(page, who), 4096);
        if (who == 1) madvise(m + 4000 * 4096, 100 * 4096, MADV_DONTNEED);
        if (who == 2) { mprotect(ro, 1 << 20, PROT_READ | PROT_WRITE); ro[5000] = 1; }
        if (who == 3) { munmap(ro, 1 << 20); if (!fork()) for (;;) { check(3); beat(4); nap(5); } }
        for (;;) { check(who); if (who == 2) { SAME(ro[5000], 1); SAME(ro[4999], 9); } else if (who != 3) SAME(ro[5000], 9); beat(who); nap(5); }
    }
    for (;;) { check(-1); SAME(ro[5000], 9); tick_all(); nap(5); }
}
