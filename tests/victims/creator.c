/* unix(7), SO_PEERCRED: sockets made by a child that has ended, which the log names. */
#include "check.h"
#include <sys/wait.h>
int main(int argc, char **argv) {
    begin(argc, argv); int way[2], pair[2]; CHECK(!socketpair(AF_UNIX, SOCK_STREAM, 0, way));
    char x = 'x'; struct iovec v = {&x, 1}; union { char b[CMSG_SPACE(8)]; struct cmsghdr h; } c; struct msghdr m = {.msg_iov = &v, .msg_iovlen = 1, .msg_control = &c, .msg_controllen = sizeof c};
    pid_t child = fork(); if (!child) { CHECK(!socketpair(AF_UNIX, SOCK_STREAM, 0, pair)); c.h = (struct cmsghdr){.cmsg_len = CMSG_LEN(8), .cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS}; memcpy(CMSG_DATA(&c.h), pair, 8); SAME(sendmsg(way[0], &m, 0), 1); _exit(0); }
    SAME(recvmsg(way[1], &m, 0), 1); memcpy(pair, CMSG_DATA(&c.h), 8); CHECK(waitpid(child, 0, 0) == child); close(way[0]); close(way[1]); dprintf(out, "creator %d\n", child);
    for (;; tick(), nap(20)) {
        struct ucred u; socklen_t l = sizeof u; for (int i = 0; i < 2; i++) { CHECK(!getsockopt(pair[i], SOL_SOCKET, SO_PEERCRED, &u, &l)); SAME(u.uid, geteuid()); if (u.pid != child) dprintf(out, "another\n"); }
        CHECK(write(pair[0], "hello", 5) == 5); char b[8]; SAME(read(pair[1], b, 8), 5);
    }
}
