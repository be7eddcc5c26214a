/* Counts on its terminal and answers what is typed. */
#include "check.h"
#include <termios.h>
#include <sys/ioctl.h>
static volatile int changed;
static void winch(int s) { changed = s; }
int main(int argc, char **argv) {
    begin(argc, argv);
    signal(SIGWINCH, winch);
    struct termios t; CHECK(!tcgetattr(0, &t)); t.c_lflag &= ~(ICANON | ECHO); CHECK(!tcsetattr(0, TCSANOW, &t));
    for (int n = 0;; n++) {
        struct pollfd p = {0, POLLIN, 0}; char c;
        if (poll(&p, 1, 50) > 0 && read(0, &c, 1) == 1) printf("typed %c\n", c);
        struct termios u; CHECK(!tcgetattr(0, &u)); SAME(u.c_lflag & (ICANON | ECHO), 0); CHECK(isatty(1) && isatty(2));
        struct winsize w; if (changed) { changed = 0; CHECK(!ioctl(0, TIOCGWINSZ, &w)); printf("now %d x %d\n", w.ws_row, w.ws_col); }
        printf("count %d\n", n); fflush(stdout);
        tick();
    }
}
