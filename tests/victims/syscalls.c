/* Threads in system calls that a freeze interrupts. None may notice: no EINTR, no early or late return. */
#include "check.h"
#include <linux/futex.h>
static volatile uint64_t rounds[16];
/* epoll_wait and sigtimedwait fail with EINTR after any stop, also without a handler (signal(7), "Interruption of
 * system calls and library functions by stop signals"). A dumper that was killed can no longer help that: for its
 * test, and only there, it is told and no more. */
static int interrupted(const char *what, int r) {
    if (r != -1 || errno != EINTR) return 0;
    if (!getenv("VICTIM_TOLERATES_EINTR")) bad("EINTR from %s", what);
    char text[80]; int n = snprintf(text, sizeof text, "EINTR %s\n", what); if (write(out, text, n) < 0) _exit(1);
    return 1;
}
static int idle_pipe[2], ping[2], ep, listener, lockfile, lockfile2;
/* Generous: the machine may be busy and the process may be away. `away` is told by the clock's gap. */
static void timed(const char *what, uint64_t begin, uint64_t least_ms) {
    uint64_t took = (now_ns(CLOCK_MONOTONIC) - begin) / 1000000;
    if (took + 1 < least_ms) { errno = 0; bad("%s came back after %lu of %lu ms", what, took, least_ms); }
    if (took > least_ms + 20000) { errno = 0; bad("%s took %lu instead of %lu ms", what, took, least_ms); }
}
static void *t_nanosleep(void *p) { for (;;) { uint64_t b = now_ns(CLOCK_MONOTONIC); struct timespec t = {0, 150000000}; int r = nanosleep(&t, &t); if (interrupted("nanosleep", r)) continue; SAME(r, 0); timed("nanosleep", b, 150); rounds[0]++; } return p; }
static void *t_poll(void *p) { for (;;) { uint64_t b = now_ns(CLOCK_MONOTONIC); struct pollfd f = {idle_pipe[0], POLLIN, 0}; int r = poll(&f, 1, 160); if (interrupted("poll", r)) continue; SAME(r, 0); timed("poll", b, 160); rounds[1]++; } return p; }
static void *t_futex(void *p) { static int word = 5; for (;;) { uint64_t b = now_ns(CLOCK_MONOTONIC); struct timespec t = {0, 170000000}; errno = 0; long r = syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, 5, &t, 0, 0); if (interrupted("futex", r)) continue; if (r != -1 || errno != ETIMEDOUT) bad("futex: %ld", r); timed("futex", b, 170); rounds[2]++; } return p; }
static void *t_epoll(void *p) { for (;;) { struct epoll_event e; uint64_t b = now_ns(CLOCK_MONOTONIC); int r = epoll_wait(ep, &e, 1, 180); if (interrupted("epoll_wait", r)) continue; if (r != 0) bad("epoll_wait: %d", r); timed("epoll_wait", b, 180); rounds[3]++; } return p; }
static void *t_read(void *p) { for (uint64_t n = 0;; n++) { uint64_t x; ssize_t r; do r = read(ping[0], &x, 8); while (interrupted("read", r)); if (r != 8) bad("read from a pipe: %zd", r); SAME(x, n); rounds[4]++; } return p; }
static void *t_write(void *p) { for (uint64_t n = 0;; n++) { usleep(90000); CHECK(write(ping[1], &n, 8) == 8); } return p; }
static void *t_select(void *p) { for (;;) { fd_set s; FD_ZERO(&s); FD_SET(idle_pipe[0], &s); struct timeval t = {0, 190000}; uint64_t b = now_ns(CLOCK_MONOTONIC); int r = select(idle_pipe[0] + 1, &s, 0, 0, &t); if (interrupted("select", r)) continue; if (r) bad("select: %d", r); timed("select", b, 190); rounds[5]++; } return p; }
static void *t_sigwait(void *p) { sigset_t s; sigemptyset(&s); sigaddset(&s, SIGRTMIN + 4); for (;;) { struct timespec t = {0, 200000000}; uint64_t b = now_ns(CLOCK_MONOTONIC); errno = 0; int r = sigtimedwait(&s, 0, &t); if (interrupted("sigtimedwait", r)) continue; if (r != -1 || errno != EAGAIN) bad("sigtimedwait: %d", r); timed("sigtimedwait", b, 200); rounds[6]++; } return p; }
static void *t_accept(void *p) { for (;;) { int fd = accept(listener, 0, 0); if (interrupted("accept", fd)) continue; if (fd < 0) bad("accept"); close(fd); rounds[7]++; } return p; }
static void *t_connect(void *p) { struct sockaddr_un un = {.sun_family = AF_UNIX}; snprintf(un.sun_path, sizeof un.sun_path, "%s/s", dir); for (;;) { usleep(120000); int fd = socket(AF_UNIX, SOCK_STREAM, 0); CHECK(!connect(fd, (void *)&un, sizeof un)); close(fd); } return p; }
static void *t_flock(void *p) { for (;;) { int r = flock(lockfile, LOCK_EX); if (interrupted("flock", r)) continue; if (r) bad("flock"); rounds[8]++; CHECK(!flock(lockfile, LOCK_UN)); usleep(5000); } return p; }
static void *t_flock2(void *p) { for (;;) { CHECK(!flock(lockfile2, LOCK_EX)); usleep(110000); CHECK(!flock(lockfile2, LOCK_UN)); usleep(10000); } return p; }
static void *t_abs(void *p) { for (;;) { struct timespec t; clock_gettime(CLOCK_MONOTONIC, &t); uint64_t b = now_ns(CLOCK_MONOTONIC); t.tv_nsec += 140000000; if (t.tv_nsec >= 1000000000) { t.tv_nsec -= 1000000000; t.tv_sec++; } int r = clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &t, 0); if (r) { errno = r; bad("clock_nanosleep"); } timed("clock_nanosleep", b, 140); rounds[9]++; } return p; }
static pthread_mutex_t mu = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t cv = PTHREAD_COND_INITIALIZER;
static void *t_cond(void *p) { for (;;) { struct timespec t; clock_gettime(CLOCK_REALTIME, &t); t.tv_nsec += 130000000; if (t.tv_nsec >= 1000000000) { t.tv_nsec -= 1000000000; t.tv_sec++; } pthread_mutex_lock(&mu); int r = pthread_cond_timedwait(&cv, &mu, &t); pthread_mutex_unlock(&mu); if (r != ETIMEDOUT && r != 0) { errno = r; bad("pthread_cond_timedwait"); } rounds[10]++; } return p; }
static void *t_pause(void *p) { pause(); bad("pause came back"); return p; }
/* The calls' stable arguments must be those of the caller still, and the long ones must not have ended. */
static void *t_long(void *p) { static int word = 9; struct timespec t = {86400, 0}; long r; do { errno = 0; r = syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, 9, &t, 0, 0); } while (interrupted("futex of a day", r)); bad("a futex wait of a day came back: %ld", r); return p; }
static void *t_longsleep(void *p) { struct timespec t = {86400, 0}; int r; do r = nanosleep(&t, &t); while (interrupted("nanosleep of a day", r)); bad("a sleep of a day came back: %d", r); return p; }
static void *t_longpoll(void *p) { struct pollfd f = {idle_pipe[0], POLLIN, 0}; int r; do r = poll(&f, 1, 86400000); while (interrupted("poll of a day", r)); bad("a poll of a day came back: %d", r); return p; }
static void *t_forever(void *p) { struct epoll_event e; int r; do r = epoll_wait(ep, &e, 1, -1); while (interrupted("epoll_wait", r)); bad("an endless epoll_wait came back: %d", r); return p; }
int main(int argc, char **argv) {
    begin(argc, argv);
    CHECK(!pipe(idle_pipe)); CHECK(!pipe(ping)); ep = epoll_create1(0); struct epoll_event e = {.events = EPOLLIN}; CHECK(!epoll_ctl(ep, EPOLL_CTL_ADD, idle_pipe[0], &e));
    sigset_t s; sigemptyset(&s); sigaddset(&s, SIGRTMIN + 4); pthread_sigmask(SIG_BLOCK, &s, 0);
    listener = socket(AF_UNIX, SOCK_STREAM, 0); struct sockaddr_un un = {.sun_family = AF_UNIX}; snprintf(un.sun_path, sizeof un.sun_path, "%s/s", dir); CHECK(!bind(listener, (void *)&un, sizeof un)); CHECK(!listen(listener, 8));
    lockfile = open(in_dir("lock"), O_CREAT | O_RDWR, 0600); lockfile2 = open(in_dir("lock"), O_RDWR);
    void *(*all[])(void *) = {t_nanosleep, t_poll, t_futex, t_epoll, t_read, t_write, t_select, t_sigwait, t_accept, t_connect, t_flock, t_flock2, t_abs, t_cond, t_pause, t_long, t_longsleep, t_longpoll, t_forever};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) spawn(all[i], 0);
    uint64_t last[16] = {0};
    for (;; tick()) {
        nap(100);
        for (int i = 0; i < 11; i++) {
            for (int tries = 0; rounds[i] == last[i]; tries++) { errno = 0; if (tries > 1000) bad("thread %d stands", i); nap(10); }
            last[i] = rounds[i];
        }
    }
}
