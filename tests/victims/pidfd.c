/* pidfd_open(2): of the process itself, in an epoll set and under several numbers; of a child that is no more. */
#include "check.h"
#include <sys/wait.h>
static int send_(int fd, int sig) { return syscall(SYS_pidfd_send_signal, fd, sig, 0, 0); }
static volatile int hits;
static void on(int s) { (void)s; hits++; }
int main(int argc, char **argv) {
    begin(argc, argv);
    signal(SIGUSR1, on);
    int child = fork(); if (!child) _exit(3);
    int gone = syscall(SYS_pidfd_open, child, 0), self = syscall(SYS_pidfd_open, getpid(), 04000), copy = fcntl(self, F_DUPFD_CLOEXEC, 40), status; CHECK(gone >= 0 && self >= 0 && copy >= 40); CHECK(waitpid(child, &status, 0) == child);
    int ep = epoll_create1(0); struct epoll_event e = {.events = EPOLLIN, .data.u64 = 5}; CHECK(!epoll_ctl(ep, EPOLL_CTL_ADD, self, &e)); e.data.u64 = 6; CHECK(!epoll_ctl(ep, EPOLL_CTL_ADD, gone, &e));
    /* a family: a child that waits to be told things, one that has ended and nobody waited for, and what they inherit */
    int kid = 0, dead = 0, kid_fd = -1, dead_fd = -1;
    if (argc > 3) {
        kid = fork(); if (!kid) { struct pollfd up = {self, POLLIN, 0}; for (;;) { CHECK(poll(&up, 1, 50) <= 0); CHECK(!send_(self, 0)); if (getppid() == 1) _exit(0); } }
        dead = fork(); if (!dead) _exit(7);
        siginfo_t si; kid_fd = syscall(SYS_pidfd_open, kid, 0); dead_fd = syscall(SYS_pidfd_open, dead, 0); CHECK(kid_fd >= 0 && dead_fd >= 0); CHECK(!waitid(P_PID, dead, &si, WEXITED | WNOWAIT));
    }
    for (int n = 1;; n++, tick()) {
        if (kid) { siginfo_t si = {0}; CHECK(!send_(kid_fd, 0)); struct pollfd k[2] = {{kid_fd, POLLIN, 0}, {dead_fd, POLLIN, 0}}; SAME(poll(k, 2, 0), 1); CHECK(k[1].revents); CHECK(!waitid(3 /* P_PIDFD */, dead_fd, &si, WEXITED | WNOWAIT | WNOHANG)); SAME(si.si_pid, dead); SAME(si.si_status, 7); }
        int before = hits; CHECK(!send_(n % 2 ? self : copy, SIGUSR1)); SAME(hits, before + 1); CHECK(send_(gone, 0) && errno == ESRCH);
        struct pollfd p[2] = {{self, POLLIN, 0}, {gone, POLLIN, 0}}; SAME(poll(p, 2, 0), 1); CHECK(p[1].revents); SAME(fcntl(self, F_GETFL) & O_NONBLOCK, O_NONBLOCK); SAME(fcntl(gone, F_GETFL) & O_NONBLOCK, 0); SAME(fcntl(copy, F_GETFD), FD_CLOEXEC);
        struct epoll_event got[4]; SAME(epoll_wait(ep, got, 4, 0), 1); SAME(got[0].data.u64, 6); CHECK(epoll_ctl(ep, EPOLL_CTL_ADD, self, &e) && errno == EEXIST); SAME(syscall(SYS_kcmp, getpid(), getpid(), 0, self, copy), 0);
        nap(20);
    }
}
