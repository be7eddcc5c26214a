/* eventfd, timerfd, signalfd, and epoll over all of them. */
#include "check.h"
static int waits(int ep, uint64_t data) { struct epoll_event e[16]; int n = epoll_wait(ep, e, 16, 0); for (int i = 0; i < n; i++) if (e[i].data.u64 == data) return e[i].events; return 0; }
int main(int argc, char **argv) {
    begin(argc, argv);
    uint64_t v;
    int ev = eventfd(7, EFD_NONBLOCK), sem = eventfd(3, EFD_SEMAPHORE | EFD_NONBLOCK | EFD_CLOEXEC), zero_ = eventfd(0, EFD_NONBLOCK), max = eventfd(0, EFD_NONBLOCK); v = 0xfffffffffffffffeull; CHECK(write(max, &v, 8) == 8);
    /* timerfd: interval; absolute far away; one whose ticks were not read; disarmed; realtime with cancel-on-set */
    int tick_ = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK), far = timerfd_create(CLOCK_REALTIME, TFD_NONBLOCK), unread = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK), off = timerfd_create(CLOCK_BOOTTIME, TFD_NONBLOCK), cancel = timerfd_create(CLOCK_REALTIME, TFD_NONBLOCK);
    struct itimerspec its = {{0, 30000000}, {0, 30000000}}, g; CHECK(!timerfd_settime(tick_, 0, &its, 0)); CHECK(!timerfd_settime(unread, 0, &its, 0));
    struct itimerspec once = {{0, 0}, {time(0) + 100000, 0}}; CHECK(!timerfd_settime(far, TFD_TIMER_ABSTIME, &once, 0)); CHECK(!timerfd_settime(cancel, TFD_TIMER_ABSTIME | TFD_TIMER_CANCEL_ON_SET, &once, 0));
    int spent = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK); struct itimerspec soon = {{0, 0}, {0, 1000000}}; CHECK(!timerfd_settime(spent, 0, &soon, 0)); nap(5); /* expired, never read */
    uint64_t began = now_ns(CLOCK_MONOTONIC);
    sigset_t set; sigemptyset(&set); sigaddset(&set, SIGRTMIN + 3); sigaddset(&set, SIGUSR1); CHECK(!sigprocmask(SIG_BLOCK, &set, 0)); sigset_t one; sigemptyset(&one); sigaddset(&one, SIGRTMIN + 3); int sfd = signalfd(-1, &one, SFD_NONBLOCK | SFD_CLOEXEC);
    union sigval sv = {.sival_int = 4711}; CHECK(!sigqueue(getpid(), SIGRTMIN + 3, sv)); CHECK(!sigqueue(getpid(), SIGUSR1, sv));
    /* epoll: level, edge, oneshot, nested, an entry by a number that is used for something else by now */
    int ep = epoll_create1(EPOLL_CLOEXEC), nested = epoll_create1(0), p[2], q[2]; CHECK(!pipe2(p, O_NONBLOCK)); CHECK(!pipe2(q, O_NONBLOCK));
    struct epoll_event e = {.events = EPOLLIN, .data.u64 = 0xdeadbeef00000001}; CHECK(!epoll_ctl(ep, EPOLL_CTL_ADD, ev, &e));
    e.events = EPOLLIN | EPOLLET; e.data.u64 = 2; CHECK(!epoll_ctl(ep, EPOLL_CTL_ADD, p[0], &e));
    e.events = EPOLLIN | EPOLLONESHOT; e.data.u64 = 3; CHECK(!epoll_ctl(ep, EPOLL_CTL_ADD, q[0], &e));
    e.events = EPOLLIN; e.data.u64 = 4; CHECK(!epoll_ctl(nested, EPOLL_CTL_ADD, tick_, &e)); e.data.u64 = 5; CHECK(!epoll_ctl(ep, EPOLL_CTL_ADD, nested, &e));
    e.data.u64 = 6; int was = eventfd(1, 0), kept = dup(was); CHECK(!epoll_ctl(ep, EPOLL_CTL_ADD, was, &e)); CHECK(dup2(zero_, was) == was); /* the set watches the old one by the old number */
    e.data.u64 = 8; CHECK(!epoll_ctl(ep, EPOLL_CTL_ADD, was, &e)); /* and the new one by the same number */
    e.data.u64 = 7; e.events = EPOLLIN; CHECK(!epoll_ctl(ep, EPOLL_CTL_ADD, sfd, &e));
    CHECK(write(q[1], "x", 1) == 1); struct epoll_event got[16]; epoll_wait(ep, got, 16, 0); /* uses up the oneshot */
    for (uint64_t n = 0;; n++, tick()) {
        CHECK(read(ev, &v, 8) == 8); SAME(v, 7); CHECK(write(ev, &v, 8) == 8); CHECK(read(sem, &v, 8) == 8); SAME(v, 1); CHECK(read(sem, &v, 8) == 8 && read(sem, &v, 8) == 8); CHECK(read(sem, &v, 8) < 0 && errno == EAGAIN); v = 3; CHECK(write(sem, &v, 8) == 8); SAME(fcntl(sem, F_GETFD), FD_CLOEXEC);
        CHECK(read(zero_, &v, 8) < 0 && errno == EAGAIN); v = 1; CHECK(write(max, &v, 8) < 0 && errno == EAGAIN);
        CHECK(!timerfd_gettime(tick_, &g)); SAME(g.it_interval.tv_nsec, 30000000); CHECK(!timerfd_gettime(off, &g)); CHECK(!g.it_value.tv_sec && !g.it_value.tv_nsec);
        CHECK(!timerfd_gettime(far, &g)); CHECK(g.it_value.tv_sec > 90000 && g.it_value.tv_sec <= 100000 && !g.it_interval.tv_sec); CHECK(!timerfd_gettime(cancel, &g)); CHECK(g.it_value.tv_sec > 90000);
        /* An unread timer has counted at least the periods it was there for before the first dump. */
        if (n == 5) { CHECK(read(unread, &v, 8) == 8); uint64_t gone = (now_ns(CLOCK_MONOTONIC) - began) / 30000000; if (v < 4 || v > gone + 2) bad("%lu ticks after %lu periods", v, gone); began = now_ns(CLOCK_MONOTONIC); n = 0; }
        if (n % 7 == 0) { CHECK(read(spent, &v, 8) == 8); SAME(v, 1); CHECK(!timerfd_settime(spent, 0, &soon, 0)); nap(5); CHECK(!timerfd_gettime(spent, &g)); CHECK(!g.it_value.tv_sec && !g.it_value.tv_nsec); }
        struct signalfd_siginfo si; CHECK(read(sfd, &si, sizeof si) == sizeof si); SAME(si.ssi_signo, SIGRTMIN + 3); SAME(si.ssi_int, 4711); SAME(si.ssi_pid, getpid()); CHECK(!waits(ep, 7)); CHECK(!sigqueue(getpid(), SIGRTMIN + 3, sv)); CHECK(waits(ep, 7));
        sigset_t pend; sigpending(&pend); CHECK(sigismember(&pend, SIGUSR1));
        CHECK(waits(ep, 0xdeadbeef00000001)); CHECK(waits(ep, 6)); CHECK(!waits(ep, 8)); v = 1; CHECK(write(zero_, &v, 8) == 8); CHECK(waits(ep, 8)); CHECK(read(zero_, &v, 8) == 8); CHECK(read(kept, &v, 8) == 8); CHECK(!waits(ep, 6)); CHECK(write(kept, &v, 8) == 8);
        char c; while (read(p[0], &c, 1) == 1) {} waits(ep, 2); CHECK(write(p[1], "x", 1) == 1); CHECK(waits(ep, 2)); CHECK(!waits(ep, 2)); /* edge: told once */
        CHECK(!waits(ep, 3)); if (n % 5 == 0) { e.events = EPOLLIN | EPOLLONESHOT; e.data.u64 = 3; CHECK(!epoll_ctl(ep, EPOLL_CTL_MOD, q[0], &e)); CHECK(waits(ep, 3)); CHECK(!waits(ep, 3)); }
        nap(40); CHECK(waits(nested, 4)); CHECK(waits(ep, 5)); CHECK(read(tick_, &v, 8) == 8); CHECK(v >= 1); CHECK(!waits(ep, 5) || waits(nested, 4));
        e.events = EPOLLIN; CHECK(epoll_ctl(ep, EPOLL_CTL_ADD, ev, &e) < 0 && errno == EEXIST);
    }
}
