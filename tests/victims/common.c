/* What only exists with processes, shared by several: pidfds and files of /proc about them, in epoll sets, with owners and locks, in flight. */
#include "family.h"
static int self, other, gone, maps, mounts, status_, comm, jailed, ep, mail[2], root_, second; static pid_t kid[2];
static int send_(int fd, int sig) { return syscall(SYS_pidfd_send_signal, fd, sig, 0, 0); }
static long whose(int fd) { char path[64], text[512]; snprintf(path, sizeof path, "/proc/self/fdinfo/%d", fd); int f = open(path, O_RDONLY | O_CLOEXEC); CHECK(f >= 0); ssize_t n = read(f, text, sizeof text - 1); close(f); CHECK(n > 0); text[n] = 0; char *p = strstr(text, "Pid:"); CHECK(p); return atol(p + 4); }
static void same_file(int fd) { SAME(syscall(SYS_kcmp, getpid(), root_, 0, fd, fd), 0); }
static void *thread(void *arg) { second = own_tid(); prctl(PR_SET_NAME, "the second"); *(int *)arg = 1; for (;;) pause(); return 0; }
static void usable(void) {
    char a[128] = {0}, b[128] = {0}, path[64]; snprintf(path, sizeof path, "/proc/%d/maps", root_);
    CHECK(!send_(self, 0)); if (!access("/proc/self", F_OK)) SAME(whose(self), root_); SAME(fcntl(self, F_GETFL) & O_NONBLOCK, O_NONBLOCK);
    CHECK(send_(gone, 0) && errno == ESRCH);
    SAME(pread(maps, a, 40, 0), 40); int f = open(path, O_RDONLY | O_CLOEXEC); if (f >= 0) { SAME(pread(f, b, 40, 0), 40); close(f); CHECK(!memcmp(a, b, 40)); }
    memset(a, 0, sizeof a); CHECK(pread(comm, a, 64, 0) > 0); CHECK(!strcmp(a, "the second\n"));
    snprintf(b, sizeof b, "%d (", root_); CHECK(pread(jailed, a, 64, 0) == 64); CHECK(!memcmp(a, b, strlen(b)));
}
static void child(int n) {
    if (n == 1) { char *jail = in_dir("jail"); CHECK(!mkdir(jail, 0755)); CHECK(!chroot(jail) && !chdir("/")); family->word[20] = 1; }
    for (;;) {
        usable(); same_file(self); same_file(maps); same_file(mounts); same_file(status_); same_file(comm); same_file(jailed); same_file(gone);
        if (n == 1) { same_file(other); SAME(syscall(SYS_kcmp, getpid(), root_, 0, ep, ep), 0); CHECK(!send_(other, 0)); }
        int at = family->word[10 + n]; if (at) { SAME(lseek(maps, 0, SEEK_CUR), at); family->word[10 + n] = 0; }
        beat(n); nap(4);
    }
}
static void post(int fd) { struct iovec v = {"f", 1}; union { char b[CMSG_SPACE(4)]; struct cmsghdr h; } c; struct msghdr m = {.msg_iov = &v, .msg_iovlen = 1, .msg_control = &c, .msg_controllen = sizeof c}; c.h = (struct cmsghdr){.cmsg_len = CMSG_LEN(4), .cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS}; memcpy(CMSG_DATA(&c.h), &fd, 4); SAME(sendmsg(mail[0], &m, 0), 1); }
static int take(void) { char x; struct iovec v = {&x, 1}; union { char b[CMSG_SPACE(4)]; struct cmsghdr h; } c; struct msghdr m = {.msg_iov = &v, .msg_iovlen = 1, .msg_control = &c, .msg_controllen = sizeof c}; SAME(recvmsg(mail[1], &m, MSG_DONTWAIT | MSG_CMSG_CLOEXEC), 1); CHECK(m.msg_controllen); int fd; memcpy(&fd, CMSG_DATA(&c.h), 4); return fd; }
int main(int argc, char **argv) {
    begin_family(argc, argv); members = 2; root_ = getpid(); static volatile int up; spawn(thread, (void *)&up); while (!up) nap(1); char path[64];
    self = syscall(SYS_pidfd_open, root_, O_NONBLOCK); maps = open("/proc/self/maps", O_RDONLY); mounts = open("/proc/self/mountinfo", O_RDONLY); status_ = open("/proc/self/status", O_RDONLY); jailed = open("/proc/self/stat", O_RDONLY); CHECK(self >= 0 && maps >= 0 && mounts >= 0 && status_ >= 0 && jailed >= 0);
    snprintf(path, sizeof path, "/proc/self/task/%d/comm", second); comm = open(path, O_RDONLY); CHECK(comm >= 0); int copy = fcntl(comm, F_DUPFD_CLOEXEC, 50); SAME(copy, 50);
    pid_t dead = fork(); if (!dead) _exit(0); gone = syscall(SYS_pidfd_open, dead, 0); CHECK(gone >= 0 && waitpid(dead, 0, 0) == dead);
    if (!(kid[0] = fork())) child(0);
    other = syscall(SYS_pidfd_open, kid[0], 0); CHECK(other >= 0 && (ep = epoll_create1(0)) >= 0);
    struct epoll_event e = {.events = EPOLLIN, .data.u64 = 1}; CHECK(!epoll_ctl(ep, EPOLL_CTL_ADD, other, &e)); e.data.u64 = 2; CHECK(!epoll_ctl(ep, EPOLL_CTL_ADD, gone, &e)); e = (struct epoll_event){.events = EPOLLPRI, .data.u64 = 3}; CHECK(!epoll_ctl(ep, EPOLL_CTL_ADD, mounts, &e));
    CHECK(!fcntl(status_, F_SETOWN, root_) && !fcntl(status_, 10 /* F_SETSIG */, SIGUSR1) && !flock(status_, LOCK_SH)); struct flock range = {.l_type = F_RDLCK, .l_whence = SEEK_SET, .l_start = 3, .l_len = 4}; CHECK(!fcntl(status_, F_SETLK, &range));
    if (!(kid[1] = fork())) child(1);
    while (!family->word[20]) nap(1);
    /* in flight: one that is open, too, and what is open nowhere else */
    CHECK(!socketpair(AF_UNIX, argc > 3 ? SOCK_STREAM : SOCK_DGRAM, 0, mail)); int only = syscall(SYS_pidfd_open, kid[1], 0); post(other); post(only); close(only); post(maps); int f = open("/proc/self/limits", O_RDONLY); post(f); close(f);
    for (int n = 1;; n++) {
        usable(); tick_all();
        SAME(lseek(maps, n % 300, SEEK_SET), n % 300); for (int i = 0; i < 2; i++) family->word[10 + i] = n % 300; for (int i = 0; i < 2; i++) for (int t = 0; family->word[10 + i]; t++) { CHECK(t < 20000); nap(1); }
        struct epoll_event got[4]; int ready = 0; /* mounts change now and then */ for (int i = epoll_wait(ep, got, 4, 0) - 1; i >= 0; i--) ready |= 1 << got[i].data.u64; SAME(ready & ~(1 << 3), 1 << 2); CHECK(epoll_ctl(ep, EPOLL_CTL_ADD, mounts, &e) && errno == EEXIST); CHECK(epoll_ctl(ep, EPOLL_CTL_ADD, other, &e) && errno == EEXIST);
        SAME(fcntl(status_, F_GETOWN), root_); SAME(fcntl(status_, 11 /* F_GETSIG */), SIGUSR1);
        int again = open("/proc/self/status", O_RDONLY | O_CLOEXEC); CHECK(again >= 0); CHECK(flock(again, LOCK_EX | LOCK_NB) && errno == EWOULDBLOCK); CHECK(!flock(again, LOCK_SH | LOCK_NB)); char locks[512]; close(again);
        snprintf(path, sizeof path, "/proc/self/fdinfo/%d", status_); again = open(path, O_RDONLY | O_CLOEXEC); ssize_t l = read(again, locks, sizeof locks - 1); CHECK(l > 0); locks[l] = 0; close(again); CHECK(strstr(locks, "FLOCK") ); if (n % 2) { range.l_type = F_RDLCK; CHECK(!fcntl(status_, F_SETLK, &range)); }
        SAME(syscall(SYS_kcmp, root_, root_, 0, comm, copy), 0); SAME(fcntl(copy, F_GETFD), FD_CLOEXEC); SAME(fcntl(comm, F_GETFD), 0);
        int a = take(), b = take(), c = take(), d = take(); SAME(syscall(SYS_kcmp, root_, root_, 0, a, other), 0); SAME(whose(b), kid[1]); CHECK(!send_(b, 0)); SAME(syscall(SYS_kcmp, root_, root_, 0, c, maps), 0); char text[64]; SAME(pread(d, text, 5, 0), 5); CHECK(!memcmp(text, "Limit", 5));
        post(a); post(b); post(c); post(d); close(a); close(b); close(c); close(d); nap(10);
    }
}
