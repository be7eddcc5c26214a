/* Pseudo terminals of which one end, or both, are in flight in a Unix socket and open nowhere else, with a line on its way. argv[3]: "master",
 * "slave", "both". argv[4]: a devpts. */
#include "check.h"
#include <sys/ioctl.h>
static int mail[2];
static void post(int fd) { struct iovec v = {"f", 1}; union { char b[CMSG_SPACE(4)]; struct cmsghdr h; } c; struct msghdr m = {.msg_iov = &v, .msg_iovlen = 1, .msg_control = &c, .msg_controllen = sizeof c}; c.h = (struct cmsghdr){.cmsg_len = CMSG_LEN(4), .cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS}; memcpy(CMSG_DATA(&c.h), &fd, 4); SAME(sendmsg(mail[0], &m, 0), 1); close(fd); }
static int take(void) { char x; struct iovec v = {&x, 1}; union { char b[CMSG_SPACE(4)]; struct cmsghdr h; } c; struct msghdr m = {.msg_iov = &v, .msg_iovlen = 1, .msg_control = &c, .msg_controllen = sizeof c}; SAME(recvmsg(mail[1], &m, MSG_DONTWAIT | MSG_CMSG_CLOEXEC), 1); CHECK(m.msg_controllen); int fd; memcpy(&fd, CMSG_DATA(&c.h), 4); return fd; }
int main(int argc, char **argv) {
    begin(argc, argv); CHECK(!socketpair(AF_UNIX, SOCK_DGRAM, 0, mail)); int away_m = argc > 3 && strcmp(argv[3], "slave"), away_s = argc > 3 && strcmp(argv[3], "master"); char name[64], now[64], b[64];
    CHECK(argc > 4); snprintf(name, sizeof name, "%s/ptmx", argv[4]); int m = open(name, O_RDWR | O_NOCTTY | O_CLOEXEC), number, open_ = 0; CHECK(m >= 0 && !ioctl(m, TIOCSPTLCK, &open_) && !ioctl(m, TIOCGPTN, &number)); snprintf(name, sizeof name, "%s/%d", argv[4], number); int s = open(name, O_RDWR | O_NOCTTY | O_CLOEXEC); CHECK(s >= 0);
    struct winsize w = {33, 44, 0, 0}; CHECK(!ioctl(m, TIOCSWINSZ, &w));
    for (int n = 0;; n++, tick()) {
        snprintf(now, sizeof now, "typed %d\n", n); SAME(write(m, now, strlen(now)), strlen(now)); nap(2);
        if (away_m) post(m);
        if (away_s) post(s);
        nap(20);
        if (away_m) m = take();
        if (away_s) s = take();
        SAME(read(s, b, sizeof b), strlen(now)); CHECK(!memcmp(b, now, strlen(now))); ssize_t l = read(m, b, sizeof b); CHECK(l >= (ssize_t)strlen(now)); struct pollfd more = {m, POLLIN, 0}; while (poll(&more, 1, 2) == 1) CHECK(read(m, b, sizeof b) > 0);
        SAME(write(s, "out", 3), 3); SAME(read(m, b, sizeof b), 3); CHECK(!memcmp(b, "out", 3));
        int still = -1; CHECK(!ioctl(m, TIOCGPTN, &still)); SAME(still, number); memset(&w, 0, sizeof w); CHECK(!ioctl(s, TIOCGWINSZ, &w)); SAME(w.ws_row, 33); SAME(w.ws_col, 44);
    }
}
