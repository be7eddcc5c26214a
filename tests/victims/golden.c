/* What the golden images were taken of: small, with one of several kinds. `tests/golden/README.md` says how. */
#include "check.h"
static void *other(void *p) { prctl(PR_SET_NAME, "golden-2"); for (;;) nap(10); return p; }
int main(int argc, char **argv) {
    begin(argc, argv);
    prctl(PR_SET_NAME, "golden");
    char *a = map(65536, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0); fill(a, 16384, 1); char *s = map(8192, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0); fill(s, 4096, 2);
    int p[2]; CHECK(!pipe(p)); CHECK(write(p[1], "golden", 6) == 6); CHECK(eventfd(5, EFD_SEMAPHORE) >= 0); int t = timerfd_create(CLOCK_MONOTONIC, 0); struct itimerspec i = {{1, 0}, {1, 0}}; CHECK(!timerfd_settime(t, 0, &i, 0)); int ep = epoll_create1(0); struct epoll_event e = {.events = EPOLLIN}; CHECK(!epoll_ctl(ep, EPOLL_CTL_ADD, t, &e));
    int sp[2]; CHECK(!socketpair(AF_UNIX, SOCK_STREAM, 0, sp)); CHECK(write(sp[0], "queued", 6) == 6); int g = open(in_dir("gone"), O_CREAT | O_RDWR, 0600); CHECK(write(g, "gone", 4) == 4); unlink(in_dir("gone")); int in = inotify_init1(0); CHECK(inotify_add_watch(in, "/", IN_CREATE) > 0); struct sockaddr_un un = {.sun_family = AF_UNIX, .sun_path = "\0golden"}; int l = socket(AF_UNIX, SOCK_STREAM, 0); CHECK(!bind(l, (void *)&un, 9)); CHECK(!listen(l, 5));
    struct sigevent se = {.sigev_notify = SIGEV_NONE}; timer_t pt; CHECK(!timer_create(CLOCK_MONOTONIC, &se, &pt)); CHECK(!timer_settime(pt, 0, &i, 0)); sigset_t set; sigemptyset(&set); sigaddset(&set, SIGUSR1); sigprocmask(SIG_BLOCK, &set, 0); CHECK(!sigqueue(getpid(), SIGUSR1, (union sigval){.sival_int = 5}));
    spawn(other, 0); nap(20);
    for (;;) { tick(); nap(10); }
}
