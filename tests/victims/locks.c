/* flock, POSIX and open-file-description locks, seen from outside by other descriptions and another process's eyes (/proc/locks). */
#include "check.h"
/* The list comes in pieces, and changes between them as others lock. */
static int once(const char *kind, const char *mode, ino_t inode, long from, long to) {
    FILE *f = fopen("/proc/locks", "re"); char line[256], k[16], m[16]; int found = 0; long a; unsigned long ino; char end[32]; int pid;
    while (fgets(line, sizeof line, f)) if (sscanf(line, "%*d: %15s ADVISORY %15s %d %*x:%*x:%lu %ld %31s", k, m, &pid, &ino, &a, end) == 6 && !strcmp(k, kind) && !strcmp(m, mode) && ino == inode && a == from && (to < 0 ? !strcmp(end, "EOF") : atol(end) == to) && (pid == getpid() || !strcmp(kind, "FLOCK"))) found++;
    fclose(f);
    return found;
}
static int holds(const char *kind, const char *mode, ino_t inode, long from, long to) { int found = 0; for (int i = 0; i < 50 && (found = once(kind, mode, inode, from, to)) != 1; i++) nap(1); return found; }
int main(int argc, char **argv) {
    begin(argc, argv);
    int a = open(in_dir("a"), O_CREAT | O_RDWR, 0600), b = open(in_dir("b"), O_CREAT | O_RDWR, 0600), c = open(in_dir("c"), O_CREAT | O_RDWR, 0600); int ad = dup(a);
    CHECK(!flock(a, LOCK_EX)); CHECK(!flock(b, LOCK_SH));
    struct flock w = {.l_type = F_WRLCK, .l_start = 2, .l_len = 5}, r = {.l_type = F_RDLCK, .l_start = 100}; CHECK(!fcntl(c, F_SETLK, &w)); CHECK(!fcntl(c, F_SETLK, &r));
    int d = open(in_dir("d"), O_CREAT | O_RDWR, 0600), d2 = open(in_dir("d"), O_RDWR); struct flock ofd = {.l_type = F_WRLCK, .l_start = 10, .l_len = 4}, two = {.l_type = F_RDLCK, .l_start = 50}; CHECK(!fcntl(d, F_OFD_SETLK, &ofd) && !fcntl(d2, F_OFD_SETLK, &two));
    struct stat sa, sb, sc; fstat(a, &sa); fstat(b, &sb); fstat(c, &sc);
    for (int n = 0;; n++, tick()) {
        int o = open(in_dir("a"), O_RDWR); CHECK(flock(o, LOCK_SH | LOCK_NB) < 0 && errno == EWOULDBLOCK); close(o); CHECK(!flock(ad, LOCK_EX | LOCK_NB));
        o = open(in_dir("b"), O_RDWR); CHECK(!flock(o, LOCK_SH | LOCK_NB)); CHECK(flock(o, LOCK_EX | LOCK_NB) < 0 && errno == EWOULDBLOCK); close(o);
        SAME(holds("POSIX", "WRITE", sc.st_ino, 2, 6), 1); SAME(holds("POSIX", "READ", sc.st_ino, 100, -1), 1); SAME(holds("FLOCK", "WRITE", sa.st_ino, 0, -1), 1); SAME(holds("FLOCK", "READ", sb.st_ino, 0, -1), 1);
        o = open(in_dir("d"), O_RDWR); struct flock t = ofd; CHECK(fcntl(o, F_OFD_SETLK, &t) < 0 && errno == EAGAIN); t = two; CHECK(!fcntl(o, F_OFD_SETLK, &t)); t.l_type = F_WRLCK; t.l_pid = 0; CHECK(fcntl(o, F_OFD_SETLK, &t) < 0); t = ofd; t.l_start = 14; CHECK(!fcntl(o, F_OFD_SETLK, &t)); close(o); t = ofd; CHECK(!fcntl(d, F_OFD_SETLK, &t)); t.l_type = F_WRLCK; CHECK(fcntl(d2, F_OFD_SETLK, &t) < 0);
        if (n % 5 == 4) { CHECK(!flock(ad, LOCK_UN)); o = open(in_dir("a"), O_RDWR); CHECK(!flock(o, LOCK_EX | LOCK_NB)); close(o); CHECK(!flock(a, LOCK_EX | LOCK_NB)); }
        nap(20);
    }
}
