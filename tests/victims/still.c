/* Owns a lot and does nothing: all of /proc must be the same before and after a dump it survives. */
#include "check.h"
static void *sleep_on(void *p) { for (;;) pause(); return p; }
int main(int argc, char **argv) {
    begin(argc, argv);
    char *a = map(8 << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0); fill(a, 4 << 20, 1); mprotect(a, 4096, PROT_NONE); madvise(a + (4 << 20), 1 << 20, MADV_DONTDUMP);
    char *s = map(1 << 20, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0); fill(s, 65536, 2);
    int f = open(in_dir("file"), O_CREAT | O_RDWR, 0600); CHECK(!ftruncate(f, 65536)); char *m = map(65536, PROT_READ | PROT_WRITE, MAP_PRIVATE, f, 0); m[0] = 1;
    int p[2]; CHECK(!pipe(p)); CHECK(write(p[1], "kept", 4) == 4); CHECK(eventfd(5, EFD_SEMAPHORE) >= 0); int t = timerfd_create(CLOCK_MONOTONIC, 0); struct itimerspec far = {{50, 0}, {100000, 0}}; CHECK(!timerfd_settime(t, 0, &far, 0));
    int sp[2]; CHECK(!socketpair(AF_UNIX, SOCK_STREAM, 0, sp)); CHECK(write(sp[0], "queued", 6) == 6); CHECK(!flock(f, LOCK_EX));
    int ep = epoll_create1(0); struct epoll_event e = {.events = EPOLLIN | EPOLLET, .data.u64 = 5}; CHECK(!epoll_ctl(ep, EPOLL_CTL_ADD, p[0], &e)); int in = inotify_init1(0); CHECK(inotify_add_watch(in, dir, IN_MOVE_SELF) > 0);
    sigset_t set; sigemptyset(&set); sigaddset(&set, SIGUSR1); sigaddset(&set, SIGRTMIN + 1); pthread_sigmask(SIG_BLOCK, &set, 0); union sigval v = {.sival_int = 5}; CHECK(!sigqueue(getpid(), SIGUSR1, v)); signal(SIGPIPE, SIG_IGN); int sfd = signalfd(-1, &set, 0); CHECK(sfd >= 0);
    struct sigevent se = {.sigev_notify = SIGEV_SIGNAL, .sigev_signo = SIGRTMIN + 1, .sigev_value.sival_int = 9}; timer_t pt; CHECK(!timer_create(CLOCK_MONOTONIC, &se, &pt)); CHECK(!timer_settime(pt, 0, &far, 0));
    for (long i = 0; i < 5; i++) spawn(sleep_on, 0);
    prctl(PR_SET_NAME, "still"); nap(50);
    tick(); tick(); tick();
    for (;;) pause();
}
