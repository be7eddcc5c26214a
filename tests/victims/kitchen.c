/* For the torture test: busy in every way, but its maps, descriptors and masks never change, so that any
 * difference is damage. */
#include "check.h"
static volatile sig_atomic_t alarms, timer_hits;
static volatile uint64_t rounds[6];
static void on_alarm(int s) { (void)s; alarms++; }
static void on_timer(int s, siginfo_t *i, void *c) { (void)s; (void)c; if (i->si_value.sival_int != 99) bad("timer value"); timer_hits++; }
static pthread_mutex_t mu = PTHREAD_MUTEX_INITIALIZER; static pthread_cond_t cv = PTHREAD_COND_INITIALIZER;
static __thread uint64_t mark;
static int ping[2];
static void *work(void *p) {
    long i = (long)p; char name[16]; snprintf(name, sizeof name, "k-%ld", i); prctl(PR_SET_NAME, name); mark = 1000 + i; pid_t tid = own_tid();
    sigset_t mask, now; sigemptyset(&mask); for (int k = 0; k < 5; k++) sigaddset(&mask, SIGRTMIN + 8 + i + k); sigaddset(&mask, SIGALRM); sigaddset(&mask, SIGUSR1); sigaddset(&mask, SIGRTMIN + 3); sigaddset(&mask, SIGRTMIN + 4); pthread_sigmask(SIG_SETMASK, &mask, 0);
    for (;;) {
        SAME(mark, 1000 + i); SAME(own_tid(), tid); pthread_sigmask(SIG_BLOCK, 0, &now); for (int s = 1; s < 65; s++) SAME(sigismember(&now, s), sigismember(&mask, s));
        if (i == 0) { for (volatile int k = 0; k < 200000; k++) {} }
        else if (i == 1) { struct timespec t = {0, 3000000}; CHECK(!nanosleep(&t, 0)); }
        else if (i == 2) { SAME(poll(0, 0, 4), 0); }
        else if (i == 3) { struct timespec t; clock_gettime(CLOCK_REALTIME, &t); t.tv_nsec += 5000000; if (t.tv_nsec >= 1000000000) { t.tv_nsec -= 1000000000; t.tv_sec++; } pthread_mutex_lock(&mu); pthread_cond_timedwait(&cv, &mu, &t); pthread_mutex_unlock(&mu); }
        else if (i == 4) { uint64_t n; CHECK(read(ping[0], &n, 8) == 8); SAME(n, rounds[4]); }
        else { uint64_t n = rounds[5]; CHECK(write(ping[1], &n, 8) == 8); usleep(2000); }
        rounds[i]++;
    }
    return 0;
}
int main(int argc, char **argv) {
    begin(argc, argv);
    size_t size = 24 << 20; char *a = map(size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0); fill(a, size, 1); char *s = map(2 << 20, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0); fill(s, 2 << 20, 2);
    int f = open(in_dir("file"), O_CREAT | O_RDWR, 0600); CHECK(!ftruncate(f, 1 << 20)); char *fp = map(1 << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE, f, 0); fill(fp + 65536, 65536, 3); CHECK(!flock(f, LOCK_EX));
    CHECK(!pipe(ping)); int pp[2]; CHECK(!pipe2(pp, O_NONBLOCK)); CHECK(write(pp[1], "still here", 10) == 10); int ev = eventfd(5, EFD_SEMAPHORE | EFD_NONBLOCK); int sp[2]; CHECK(!socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0, sp)); CHECK(write(sp[0], "queued", 6) == 6);
    sigset_t set; sigemptyset(&set); sigaddset(&set, SIGUSR1); sigaddset(&set, SIGRTMIN + 3); CHECK(!sigprocmask(SIG_BLOCK, &set, 0)); union sigval v = {.sival_int = 4711}; CHECK(!sigqueue(getpid(), SIGUSR1, v)); sigdelset(&set, SIGUSR1); int sfd = signalfd(-1, &set, SFD_NONBLOCK);
    int tfd = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK); struct itimerspec its = {{0, 10000000}, {0, 10000000}}; CHECK(!timerfd_settime(tfd, 0, &its, 0)); int ep = epoll_create1(0); struct epoll_event e = {.events = EPOLLIN, .data.u64 = 1}; CHECK(!epoll_ctl(ep, EPOLL_CTL_ADD, tfd, &e)); e.data.u64 = 2; CHECK(!epoll_ctl(ep, EPOLL_CTL_ADD, sfd, &e));
    struct sigaction sa = {.sa_handler = on_alarm, .sa_flags = SA_RESTART}; sigaction(SIGALRM, &sa, 0); struct sigaction st = {.sa_sigaction = on_timer, .sa_flags = SA_SIGINFO | SA_RESTART}; sigaction(SIGRTMIN + 4, &st, 0);
    struct itimerval iv = {{0, 7000}, {0, 7000}}; CHECK(!setitimer(ITIMER_REAL, &iv, 0)); timer_t t; struct sigevent se = {.sigev_notify = SIGEV_SIGNAL, .sigev_signo = SIGRTMIN + 4, .sigev_value.sival_int = 99}; CHECK(!timer_create(CLOCK_MONOTONIC, &se, &t)); struct itimerspec pt = {{0, 9000000}, {0, 9000000}}; CHECK(!timer_settime(t, 0, &pt, 0));
    for (long i = 0; i < 6; i++) spawn(work, (void *)i);
    nap(20); /* every thread has its mask */
    uint64_t last[6] = {0}; sig_atomic_t al = 0, th = 0; char buf[64];
    for (uint64_t n = 1;; n++) {
        struct epoll_event got[4]; int k = epoll_wait(ep, got, 4, 2000); if (k < 0 && errno == EINTR) continue; CHECK(k > 0); uint64_t x; if (read(tfd, &x, 8) != 8) continue;
        CHECK(same(a + (n % 12) * (2 << 20), 2 << 20, 1 + (n % 12) * (2 << 20) / 8)); if (n % 4 == 0) { CHECK(same(s, 2 << 20, 2)); CHECK(same(fp + 65536, 65536, 3) && zero(fp, 65536)); }
        CHECK(read(pp[0], buf, 64) == 10 && !memcmp(buf, "still here", 10)); CHECK(write(pp[1], "still here", 10) == 10); CHECK(read(ev, &x, 8) == 8 && x == 1); CHECK(write(ev, &x, 8) == 8); CHECK(read(sp[1], buf, 64) == 6); CHECK(write(sp[0], "queued", 6) == 6);
        sigset_t p; sigpending(&p); CHECK(sigismember(&p, SIGUSR1)); CHECK(!sigprocmask(SIG_BLOCK, 0, &p)); for (int i = 1; i < 65; i++) SAME(sigismember(&p, i), i == SIGUSR1 || i == SIGRTMIN + 3);
        if (n % 20 == 0) { for (int i = 0; i < 6; i++) { for (int tries = 0; rounds[i] == last[i]; tries++) { if (tries > 500) bad("thread %d stands", i); nap(10); } last[i] = rounds[i]; } for (int tries = 0; alarms == al || timer_hits == th; tries++) { CHECK(tries < 500); nap(10); } al = alarms; th = timer_hits; }
        tick();
    }
}
