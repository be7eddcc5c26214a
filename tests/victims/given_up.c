/* Pages of a private mapping of a file, and of none, that were written and are given up: the file shows again, or zeros.
 * So are whole page tables and huge pages, which nobody looks at until there is a file `look`. */
#include "check.h"
#define PAGES 64
#define TABLE (2ul << 20)
#define TABLES 8
static volatile sig_atomic_t asked;
static char *tables(int advice) {
    char *at = map((TABLES + 1) * TABLE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    at = (char *)(((uintptr_t)at + TABLE - 1) & ~(TABLE - 1));
    CHECK(!madvise(at, TABLES * TABLE, advice));
    memset(at, 'a', TABLES * TABLE);
    return at;
}
static void ask(int s) { (void)s; asked = 1; }
int main(int argc, char **argv) {
    begin(argc, argv);
    size_t size = PAGES * 4096;
    int fd = open(in_dir("file"), O_RDWR | O_CREAT, 0600);
    char *text = malloc(size);
    memset(text, 'f', size);
    CHECK(write(fd, text, size) == (ssize_t)size);
    char *file = map(size, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0);
    char *none = map(size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    memset(file, 'a', size);
    memset(none, 'a', size);
    char *whole[] = {tables(MADV_NOHUGEPAGE), tables(MADV_HUGEPAGE)};
    signal(SIGUSR1, ask);
    int given_up = 0;
    char *look = in_dir("look");
    for (;;) {
        for (int i = 0; i < PAGES; i++) {
            SAME(file[i * 4096 + 7], i < given_up ? 'f' : 'a');
            SAME(none[i * 4096 + 7], i < given_up ? 0 : 'a');
        }
        for (int i = 0; i < 2 && !access(look, F_OK); i++)
            for (size_t at = 7; at < TABLES * TABLE; at += 4096)
                SAME(whole[i][at], at < (size_t)given_up / 8 * TABLE ? 0 : 'a');
        if (asked) {
            asked = 0;
            for (int i = 0; i < 2; i++) CHECK(!madvise(whole[i] + (size_t)given_up / 8 * TABLE, TABLE, MADV_DONTNEED));
            given_up += 8;
            CHECK(!madvise(file, given_up * 4096, MADV_DONTNEED));
            CHECK(!madvise(none, given_up * 4096, MADV_DONTNEED));
        }
        nap(10);
        tick();
    }
}
