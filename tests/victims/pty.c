/* pty(7): pairs with both ends here, in every state, with data on their way in both directions; a controlling terminal. */
#include "check.h"
#include <asm/termbits.h>
#include <sys/ioctl.h>
#include <sys/sysmacros.h>
#define TIOCVHANGUP 0x5437
static const char *pts = "/dev/pts", *ptmx = "/dev/ptmx";
static int master(const char *path) { int m = open(path, O_RDWR | O_NOCTTY | O_CLOEXEC), off = 0; if (m < 0) bad("open %s", path); CHECK(!ioctl(m, TIOCSPTLCK, &off)); return m; }
static int number(int m) { int n; CHECK(!ioctl(m, TIOCGPTN, &n)); return n; }
static int slave(int m, int flags) { char path[128]; snprintf(path, sizeof path, "%s/%d", pts, number(m)); int s = open(path, O_RDWR | O_NOCTTY | flags); if (s < 0) bad("open %s", path); return s; }
static int asked(int fd, unsigned long what) { int v = -1; CHECK(!ioctl(fd, what, &v)); return v; }
static int events(int fd) { struct pollfd p = {fd, POLLIN | POLLOUT | POLLPRI, 0}; poll(&p, 1, 0); return p.revents; }
static struct termios2 get(int fd) { struct termios2 t; CHECK(!ioctl(fd, TCGETS2, &t)); return t; }
static void set(int fd, struct termios2 *t) { CHECK(!ioctl(fd, TCSETS2, t)); }
static void named(int fd, const char *want) { char link[64], path[128]; snprintf(link, sizeof link, "/proc/self/fd/%d", fd); ssize_t n = readlink(link, path, 127); CHECK(n > 0); path[n] = 0; if (strcmp(path, want)) bad("fd %d is %s, not %s", fd, path, want); }
/* Reads exactly this; it may be on its way for a moment, as when a dump was killed. */
static void expect(int line, int fd, const void *want, size_t n) {
    char buf[32768]; size_t have = 0;
    do { struct pollfd p = {fd, POLLIN, 0}; if (poll(&p, 1, 5000) != 1) bad("line %d: nothing to read of %zu, had %zu", line, n, have); ssize_t got = read(fd, buf + have, sizeof buf - have); if (got < 0 && errno == EAGAIN) continue; if (got < 0 || (got == 0 && n)) bad("line %d: read %zd", line, got); have += got; } while (have < n);
    if (have != n || memcmp(buf, want, n)) bad("line %d: read %zu bytes \"%.*s\", not %zu", line, have, (int)have, buf, n);
}
#define EXPECT(fd, s) expect(__LINE__, fd, s, sizeof(s) - 1)
#define PUT(fd, s) CHECK(write(fd, s, sizeof(s) - 1) == sizeof(s) - 1)
static void until(int line, int fd, int want) { for (int i = 0; i < 5000; i++) { events(fd); if (asked(fd, FIONREAD) == want) return; nap(1); } bad("line %d: %d bytes, not %d", line, asked(fd, FIONREAD), want); }
#define UNTIL(fd, n) until(__LINE__, fd, n)
static volatile int hups, winches; static void hup(int s) { if (s == SIGHUP || s == SIGCONT) hups++; else winches++; }
static int cm, cs, cs2, rm, rs, nm, gm, hm, hs, vm, vs, vn, sm, ss, fm, fs, om, os, tm, ts, tt, em;
static struct termios2 ct, rt;
static char full[32768]; static int fulln;
static void fill_c(void) { PUT(cs, "out\n\x13\0put"); UNTIL(cm, 10); PUT(cm, "one\ntwo\x05\x05\nwith\x16\nin\n!unfin\x16\x05ished"); UNTIL(cs, 3 + 1 + 3 + 1 + 8); }
static void check_c(void) {
    struct termios2 t = get(cs); CHECK(!memcmp(&t, &ct, sizeof t)); t = get(cm); CHECK(!memcmp(&t, &ct, sizeof t));
    struct winsize w; for (int i = 0; i < 2; i++) { CHECK(!ioctl(i ? cm : cs, TIOCGWINSZ, &w)); SAME(w.ws_row, 33); SAME(w.ws_col, 101); SAME(w.ws_xpixel, 7); SAME(w.ws_ypixel, 9); }
    struct stat st; CHECK(!fstat(cs, &st)); SAME(st.st_mode & 07777, 0624); SAME(st.st_uid, 1000); SAME(st.st_gid, 5); SAME(minor(st.st_rdev), (unsigned)number(cm)); SAME(asked(cs, TIOCGEXCL), 0);
    SAME(fcntl(cs, F_GETFL) & (O_ACCMODE | O_NONBLOCK), O_RDWR | O_NONBLOCK); SAME(fcntl(cs2, F_GETFL) & (O_ACCMODE | O_NONBLOCK), O_RDONLY);
    EXPECT(cm, "out\r\n\x13\0put"); EXPECT(cs, "one\n"); EXPECT(cs, "two"); EXPECT(cs, ""); EXPECT(cs, "\n"); EXPECT(cs, "with\nin\n"); char c; CHECK(read(cs, &c, 1) < 0 && errno == EAGAIN);
    PUT(cm, "."); PUT(cm, "\n"); EXPECT(cs, "!unfin\x05ished.\n"); SAME(asked(cm, FIONREAD), 0); CHECK(!(events(cm) & POLLIN));
}
static void fill_r(void) { PUT(rm, "a\003b\x04\r\n\x13\x11\xff"); PUT(rs, "raw\nout"); UNTIL(rs, 9); UNTIL(rm, 7); }
static void check_r(void) {
    struct termios2 t = get(rs); CHECK(!memcmp(&t, &rt, sizeof t)); SAME(asked(rm, TIOCGPKT), 1); SAME(asked(rm, TIOCGEXCL), 1); SAME(asked(rs, TIOCGEXCL), 1); CHECK(!(events(rm) & POLLPRI));
    EXPECT(rs, "a\003b\x04\r\n\x13\x11\xff"); EXPECT(rm, "\0raw\nout");
}
static void fill_f(void) { char b[1000]; memset(b, 'f', sizeof b); fulln = 0; for (int idle = 0; idle < 10;) { ssize_t n = write(fs, b, sizeof b); if (n > 0) { memset(full + fulln, 'f', n); fulln += n; idle = 0; } else { idle++; nap(1); } } CHECK(fulln > 8000); }
int main(int argc, char **argv) {
    begin(argc, argv);
    char in[128]; if (argc > 3) pts = argv[3]; snprintf(in, sizeof in, "%s/ptmx", pts); if (argc > 3) ptmx = in; /* a devpts of its own, or the usual one by its two names */
    signal(SIGHUP, hup); signal(SIGCONT, hup); signal(SIGWINCH, hup); signal(SIGTTOU, SIG_IGN); /* a session leader already */
    int on = 1, off = 0; char buf[64], path[128]; struct winsize w = {33, 101, 7, 9};
    /* The numbers of the others must not be had by chance. */
    int below = master(ptmx);
    cm = master(ptmx); cs = slave(cm, O_NONBLOCK); snprintf(path, sizeof path, "%s/%d", pts, number(cm)); cs2 = open(path, O_RDONLY | O_NOCTTY); CHECK(cs2 >= 0); close(below);
    ct = get(cs); ct.c_cflag = (ct.c_cflag & ~(CBAUD | CBAUD << IBSHIFT)) | BOTHER; ct.c_ispeed = ct.c_ospeed = 12345; ct.c_cc[VEOF] = 5; ct.c_cc[VINTR] = 0; ct.c_lflag &= ~(ECHO | ECHONL); set(cs, &ct); ct = get(cs); SAME(ct.c_ospeed, 12345);
    CHECK(!ioctl(cm, TIOCSWINSZ, &w)); CHECK(!fchmod(cs, 0624)); CHECK(!fchown(cs, 1000, 5)); fill_c();
    rm = master(in); rs = slave(rm, 0); rt = get(rs); rt.c_iflag = rt.c_oflag = rt.c_lflag = 0; rt.c_cc[VMIN] = 3; rt.c_cc[VTIME] = 7; set(rs, &rt); rt = get(rs);
    CHECK(!ioctl(rm, TIOCPKT, &on)); fill_r();
    CHECK(!ioctl(rs, TIOCEXCL)); CHECK(!ioctl(rm, TIOCEXCL));
    nm = master(ptmx); CHECK(!ioctl(nm, TIOCSPTLCK, &on)); /* never opened */
    gm = master(ptmx); int g = slave(gm, 0); PUT(g, "testament"); UNTIL(gm, 9); close(g); /* all gone */
    hm = master(ptmx); hs = slave(hm, 0); int hn = number(hm); close(hm); /* hung up */
    vm = master(ptmx); vs = slave(vm, 0); CHECK(!ioctl(vs, TIOCVHANGUP)); vn = slave(vm, 0); /* the same, with another open */
    sm = master(ptmx); ss = slave(sm, O_NONBLOCK); CHECK(!ioctl(ss, TCXONC, TCOOFF)); CHECK(!(events(ss) & POLLOUT));
    om = master(ptmx); os = slave(om, O_NONBLOCK); PUT(om, "\x13"); while (events(os) & POLLOUT) nap(1);
    fm = master(ptmx); fs = slave(fm, O_NONBLOCK); struct termios2 ft = get(fs); ft.c_oflag = 0; set(fs, &ft); fill_f();
    em = master(ptmx); int es = slave(em, 0); /* echo */
    tm = master(ptmx); ts = slave(tm, 0); int tn = number(tm); CHECK(!ioctl(ts, TIOCSCTTY, 0)); tt = open("/dev/tty", O_RDWR | O_NONBLOCK); CHECK(tt >= 0); w.ws_row = 50; CHECK(!ioctl(tm, TIOCSWINSZ, &w)); while (!winches) nap(1);
    int numbers[] = {number(cm), number(rm), number(nm), number(gm), number(vm), number(sm)};
    for (int n = 0;; n++, tick()) {
        int now[] = {number(cm), number(rm), number(nm), number(gm), number(vm), number(sm)}; CHECK(!memcmp(numbers, now, sizeof now));
        if (n % 8 == 0) { check_c(); fill_c(); check_r(); fill_r(); }
        SAME(asked(nm, TIOCGPTLCK), 1); SAME(asked(cm, TIOCGPTLCK), 0); CHECK(!(events(nm) & POLLHUP)); SAME(asked(cm, TIOCGPKT), 0);
        for (int i = 0; !(events(gm) & POLLHUP); i++) { CHECK(i < 1000); nap(1); } /* open for a moment when a dump was killed */
        if (n % 25 == 24) { EXPECT(gm, "testament"); CHECK(read(gm, buf, 9) < 0 && errno == EIO); g = slave(gm, 0); PUT(g, "testament"); UNTIL(gm, 9); close(g); expect(__LINE__, fm, full, fulln); fill_f(); }
        SAME(read(hs, buf, 9), 0); CHECK(write(hs, "x", 1) < 0 && errno == EIO); CHECK(events(hs) & POLLHUP); snprintf(path, sizeof path, "%s/%d (deleted)", pts, hn); named(hs, path);
        SAME(read(vs, buf, 9), 0); CHECK(write(vs, "x", 1) < 0 && errno == EIO); PUT(vn, "x"); EXPECT(vm, "x"); CHECK(!(events(vm) & POLLHUP));
        CHECK(write(ss, "x", 1) < 0 && errno == EAGAIN); if (n % 9 == 3) { CHECK(!ioctl(ss, TCXONC, TCOON)); CHECK(write(ss, "s", 1) == 1); EXPECT(sm, "s"); CHECK(!ioctl(ss, TCXONC, TCOOFF)); }
        CHECK(write(os, "x", 1) < 0 && errno == EAGAIN); if (n % 9 == 3) { CHECK(!ioctl(os, TCXONC, TCOON)); CHECK(!(events(os) & POLLOUT)); PUT(om, "\x11"); while (!(events(os) & POLLOUT)) nap(1); PUT(om, "\x13"); while (events(os) & POLLOUT) nap(1); }
        PUT(em, "ab\n"); EXPECT(es, "ab\n"); EXPECT(em, "ab\r\n");
        named(tt, "/dev/tty"); named(rm, in); named(cm, ptmx); snprintf(path, sizeof path, "%s/%d", pts, tn); named(ts, path); CHECK(ttyname(ts) && !strcmp(ttyname(ts), path));
        SAME(fcntl(tt, F_GETFL) & O_NONBLOCK, O_NONBLOCK); struct stat st; CHECK(!fstat(tt, &st)); SAME(st.st_rdev, makedev(5, 0)); SAME(tcgetpgrp(tt), getpgrp()); SAME(tcgetpgrp(ts), getpgrp()); pid_t sid; CHECK(!ioctl(ts, TIOCGSID, &sid)); SAME(sid, getpid());
        PUT(tt, "tty\n"); EXPECT(tm, "tty\r\n"); int t2 = open("/dev/tty", O_RDWR); CHECK(t2 >= 0); close(t2);
        SAME(hups, 0); SAME(winches, 1); if (n % 10 == 5) { kill(getpid(), 0); winches = 0; w.ws_row ^= 1; CHECK(!ioctl(tm, TIOCSWINSZ, &w)); while (!winches) nap(1); }
        int spare = master(ptmx); for (unsigned i = 0; i < sizeof now / sizeof *now; i++) CHECK(number(spare) != now[i]); close(spare);
        nap(5);
    }
    (void)off;
}
