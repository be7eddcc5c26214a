/* Terminals that a dump must refuse: argv[4] says which. */
#include "check.h"
#include <asm/termbits.h>
#include <sys/ioctl.h>
int main(int argc, char **argv) {
    begin(argc, argv); CHECK(argc > 4);
    char ptmx[128], pts[128]; snprintf(ptmx, sizeof ptmx, "%s/ptmx", argv[3]); snprintf(pts, sizeof pts, "%s/0", argv[3]);
    const char *what = argv[4]; int on = 1, off = 0, null = 16, one_way = !strcmp(what, "one-way"), echo = !strcmp(what, "echo");
    int m = open(ptmx, (one_way ? O_RDONLY : O_RDWR) | O_NOCTTY); CHECK(m >= 0); CHECK(!ioctl(m, TIOCSPTLCK, &off));
    if (echo) CHECK(write(m, "typed", 5) == 5);
    int s = echo ? -1 : open(pts, O_RDWR | O_NOCTTY); CHECK(echo || s >= 0);
    if (!strcmp(what, "discipline")) { for (null = 29; null > 0 && ioctl(s, TIOCSETD, &null); null--) {} if (null <= 0) dprintf(out, "SKIP: no other line discipline\n"); }
    if (!strcmp(what, "path")) CHECK(open(pts, O_PATH) >= 0);
    if (!strcmp(what, "status")) { CHECK(!ioctl(m, TIOCPKT, &on)); CHECK(!ioctl(s, TCXONC, TCOOFF)); CHECK(!ioctl(s, TCXONC, TCOON)); }
    if (!strcmp(what, "relocked")) CHECK(!ioctl(m, TIOCSPTLCK, &on));
    if (!strcmp(what, "stopped")) CHECK(!ioctl(m, TCXONC, TCOOFF));
    if (!strcmp(what, "console")) { int c = open("/dev/tty1", O_RDWR | O_NOCTTY | O_NONBLOCK); if (c < 0) c = open("/dev/ttyS0", O_RDWR | O_NOCTTY | O_NONBLOCK); if (c < 0) dprintf(out, "SKIP: no console\n"); }
    if (!strcmp(what, "alone")) { for (int i = 0; access(in_dir("go"), F_OK); i++) { if (i < 400) tick(); nap(5); } close(s); }
    for (;;) { tick(); nap(5); }
}
