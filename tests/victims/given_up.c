/* Pages of a private mapping of a file, and of none, that were written and are given up: the file shows again, or zeros. */
#include "check.h"
#define PAGES 64
static volatile sig_atomic_t asked;
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
    signal(SIGUSR1, ask);
    int given_up = 0;
    for (;;) {
        for (int i = 0; i < PAGES; i++) {
            SAME(file[i * 4096 + 7], i < given_up ? 'f' : 'a');
            SAME(none[i * 4096 + 7], i < given_up ? 0 : 'a');
        }
        if (asked) {
            asked = 0;
            given_up += 8;
            CHECK(!madvise(file, given_up * 4096, MADV_DONTNEED));
            CHECK(!madvise(none, given_up * 4096, MADV_DONTNEED));
        }
        nap(10);
        tick();
    }
}
