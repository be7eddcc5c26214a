/* What goes into the golden image of format 2.0: a small tree. */
#include "family.h"
#include <arpa/inet.h>
#include <netinet/in.h>
#include <pty.h>
int main(int argc, char **argv) {
    begin_family(argc, argv); prctl(PR_SET_NAME, "golden"); int p[2], s[2], m, t; CHECK(!pipe(p) && !socketpair(AF_UNIX, SOCK_STREAM, 0, s)); CHECK(write(p[1], "kept", 4) == 4 && write(s[0], "queued", 6) == 6); CHECK(!openpty(&m, &t, 0, 0, 0));
    int l = socket(AF_INET, SOCK_STREAM, 0), c = socket(AF_INET, SOCK_STREAM, 0); struct sockaddr_in a = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)}; socklen_t n = sizeof a; CHECK(!bind(l, (void *)&a, n) && !listen(l, 1) && !getsockname(l, (void *)&a, &n) && !connect(c, (void *)&a, n)); int d = accept(l, 0, 0); CHECK(d >= 0 && write(c, "sent", 4) == 4);
    int q = syscall(SYS_pidfd_open, getpid(), 0); (void)q;
    if (!fork()) { setsid(); for (;;) { beat(0); nap(5); } }
    if (!fork()) _exit(3);
    members = 1; for (;;) { tick_all(); nap(5); }
}
