/* unix(7), SO_PEERPIDFD: of connections made anew to a listener of a child, and of one that was made before the dump, which the log tells. */
#include "family.h"
#ifndef SO_PEERPIDFD
#define SO_PEERPIDFD 77
#endif
static long whose(int s) {
    int fd = -1; socklen_t l = sizeof fd; if (getsockopt(s, SOL_SOCKET, SO_PEERPIDFD, &fd, &l)) { if (errno == ENOPROTOOPT) { dprintf(out, "SKIP no SO_PEERPIDFD\n"); for (;; tick()) nap(20); } return -errno; }
    char path[64], text[512]; snprintf(path, sizeof path, "/proc/self/fdinfo/%d", fd); int f = open(path, O_RDONLY | O_CLOEXEC); CHECK(f >= 0); ssize_t n = read(f, text, sizeof text - 1); close(f); close(fd); CHECK(n > 0); text[n] = 0; char *p = strstr(text, "Pid:"); CHECK(p); return atol(p + 4);
}
int main(int argc, char **argv) {
    begin_family(argc, argv); members = 1; struct sockaddr_un un = {.sun_family = AF_UNIX}; snprintf(un.sun_path, sizeof un.sun_path, "%s/listener", dir);
    pid_t kid = fork(); if (!kid) { int l = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0); CHECK(!bind(l, (void *)&un, sizeof un) && !listen(l, 5)); for (;;) { family->ready[0] = 1; int c = accept(l, 0, 0); if (c >= 0) close(c); beat(0); nap(2); } }
    while (!family->ready[0]) nap(1);
    int old = socket(AF_UNIX, SOCK_STREAM, 0), told = 0; CHECK(!connect(old, (void *)&un, sizeof un));
    for (;; tick_all()) {
        int s = socket(AF_UNIX, SOCK_STREAM, 0); CHECK(!connect(s, (void *)&un, sizeof un)); SAME(whose(s), kid); close(s);
        long now = whose(old); if (now != told) dprintf(out, "old %s %ld\n", now == kid ? "right" : "wrong", now); told = now; struct ucred u; socklen_t l = sizeof u; CHECK(!getsockopt(old, SOL_SOCKET, SO_PEERCRED, &u, &l)); SAME(u.pid, kid);
    }
}
