/* A terminal multiplexer with a shell: the root has masters only; the shell's session has its terminal, groups of its own, one of them in the foreground. */
#include "family.h"
#include <asm/termbits.h>
#include <sys/ioctl.h>
static void set_foreground(int fd, pid_t group) { CHECK(!ioctl(fd, TIOCSPGRP, &group)); }
static pid_t foreground(int fd) { pid_t group = -1; CHECK(!ioctl(fd, TIOCGPGRP, &group)); return group; }
static volatile int bad_signal, interrupts, resized;
static void caught(int s) { if (s == SIGINT) interrupts++; else if (s == SIGWINCH) resized++; else bad_signal = s; }
enum { SHELL, FRONT, BACK, GONE, BARE }; /* members; words: FRONT counts its interrupts in word 0, its sizes in word 1 */
static void expect(int line, int fd, const char *want) {
    char buf[256]; size_t have = 0, n = strlen(want);
    while (have < n) { struct pollfd p = {fd, POLLIN, 0}; if (poll(&p, 1, 10000) != 1) bad("line %d: no %s", line, want); ssize_t got = read(fd, buf + have, n - have); if (got < 0 && errno == EAGAIN) continue; if (got <= 0) bad("line %d: read %zd", line, got); have += got; }
    if (memcmp(buf, want, n)) bad("line %d: \"%.*s\" and not \"%s\"", line, (int)have, buf, want);
}
#define EXPECT(fd, s) expect(__LINE__, fd, s)
#define PUT(fd, s) CHECK(write(fd, s, sizeof(s) - 1) == sizeof(s) - 1)
int main(int argc, char **argv) {
    begin_family(argc, argv); const char *pts = argc > 3 ? argv[3] : "/dev/pts"; char ptmx[128], path[128]; snprintf(ptmx, sizeof ptmx, argc > 3 ? "%s/ptmx" : "/dev/ptmx", pts);
    int signals[] = {SIGHUP, SIGCONT, SIGTTIN, SIGTTOU, SIGTSTP, SIGWINCH, SIGINT}; for (int i = 0; i < 7; i++) signal(signals[i], caught);
    int m = open(ptmx, O_RDWR | O_NOCTTY | O_CLOEXEC), bare = open(ptmx, O_RDWR | O_NOCTTY), off = 0, n; CHECK(m >= 0 && bare >= 0 && !ioctl(m, TIOCSPTLCK, &off) && !ioctl(bare, TIOCSPTLCK, &off)); CHECK(!ioctl(m, TIOCGPTN, &n));
    struct winsize w = {30, 90, 0, 0}; CHECK(!ioctl(m, TIOCSWINSZ, &w)); int root = getpid();
    if (!fork()) { /* the shell */
        CHECK(setsid() > 0); snprintf(path, sizeof path, "%s/%d", pts, n); int s = open(path, O_RDWR); CHECK(s >= 0); close(m); close(bare); int shell = getpid(); sigset_t ttou; sigemptyset(&ttou); sigaddset(&ttou, SIGTTOU);
        int front = fork();
        if (!front) { /* in the foreground: answers */
            setpgid(0, 0); while (foreground(s) != getpid()) nap(1); int tty = open("/dev/tty", O_RDWR); CHECK(tty >= 0); family->ready[FRONT] = getpid();
            for (char c;;) {
                relations(shell, shell, getpid()); SAME(foreground(tty), getpid()); SAME(bad_signal, 0); beat(FRONT); family->word[0] = interrupts; family->word[1] = resized;
                struct pollfd p = {s, POLLIN, 0}; if (poll(&p, 1, 1) != 1) continue; char line[64]; ssize_t got = read(s, line, sizeof line); CHECK(got > 1 && line[got - 1] == '\n'); c = line[0] + 1; CHECK(write(tty, &c, 1) == 1); CHECK(write(s, "\n", 1) == 1);
            }
        }
        if (!fork()) { setpgid(0, 0); while (!family->ready[FRONT]) nap(1); family->ready[BACK] = getpid(); for (;;) { relations(shell, shell, getpid()); SAME(foreground(s), family->ready[FRONT]); SAME(bad_signal, 0); SAME(interrupts, 0); beat(BACK); nap(1); } }
        if (!fork()) { CHECK(!ioctl(s, TIOCNOTTY)); family->ready[GONE] = getpid(); /* without a terminal, as its child */
            if (!fork()) for (family->ready[BARE] = getpid();;) { CHECK(open("/dev/tty", O_RDWR) < 0 && errno == ENXIO); SAME(getsid(0), shell); beat(BARE); nap(1); }
            for (pid_t group;;) { CHECK(open("/dev/tty", O_RDWR) < 0 && errno == ENXIO); CHECK(ioctl(s, TIOCGPGRP, &group) < 0 && errno == ENOTTY); relations(shell, shell, shell); beat(GONE); nap(1); } }
        setpgid(front, front); sigprocmask(SIG_BLOCK, &ttou, 0); set_foreground(s, front); family->ready[SHELL] = shell;
        if (argc > 4) close(s); /* it is still its terminal */
        for (pid_t sid;;) { relations(root, shell, shell); SAME(bad_signal, 0); SAME(interrupts, 0); int t = open("/dev/tty", O_RDWR); CHECK(t >= 0); SAME(foreground(t), front); CHECK(!ioctl(t, TIOCGSID, &sid)); SAME(sid, shell); close(t); beat(SHELL); nap(1); }
    }
    members = 5; for (int i = 0; i < members; i++) while (!family->ready[i]) nap(1);
    for (int i = 0;; i++) {
        SAME(foreground(m), family->ready[FRONT]); SAME(bad_signal, 0); struct winsize v; CHECK(!ioctl(m, TIOCGWINSZ, &v)); SAME(v.ws_row, w.ws_row); SAME(v.ws_col, 90);
        PUT(m, "ask\n"); EXPECT(m, "ask\r\nb\r\n");
        if (i % 5 == 4) { int before = family->word[0]; PUT(m, "\x03"); EXPECT(m, "^C"); while (family->word[0] == before) nap(1); SAME(family->word[0], before + 1); }
        if (i % 7 == 6) { int before = family->word[1]; w.ws_row++; CHECK(!ioctl(m, TIOCSWINSZ, &w)); while (family->word[1] == before) nap(1); SAME(family->word[1], before + 1); }
        struct pollfd p = {bare, POLLIN, 0}; poll(&p, 1, 0); SAME(p.revents, 0);
        tick_all();
    }
}
