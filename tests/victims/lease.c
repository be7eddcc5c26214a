/* fcntl(2), F_SETLEASE: a read lease and a write lease, which nobody breaks until there is a file "break". argv[3]: "breaking" has one that is
 * being broken, "memory" a write lease on a file in memory. A child has the descriptors, too. */
#include "check.h"
#include <sys/wait.h>
static volatile sig_atomic_t told, by;
static void on(int s, siginfo_t *i, void *c) { (void)s; (void)c; told++; by = i->si_fd; }
static int make(const char *path, int flags) { int f = open(path, O_CREAT | O_RDWR | O_CLOEXEC, 0600); CHECK(f >= 0); close(f); f = open(path, flags | O_CLOEXEC); CHECK(f >= 0); return f; }
/* Somebody else wants it. */
static void disturb(const char *path, int fd, int kind) {
    int before = told; CHECK(open(path, O_WRONLY | O_NONBLOCK) < 0 && errno == EWOULDBLOCK); for (int t = 0; told == before; t++) { CHECK(t < 5000); nap(1); } SAME(by, fd);
    CHECK(!fcntl(fd, F_SETLEASE, F_UNLCK)); CHECK(!fcntl(fd, F_SETLEASE, kind)); told = 0;
}
int main(int argc, char **argv) {
    begin(argc, argv); struct sigaction sa = {.sa_sigaction = on, .sa_flags = SA_SIGINFO}; CHECK(!sigaction(SIGRTMIN, &sa, 0)); CHECK(!sigaction(SIGIO, &sa, 0)); const char *what = argc > 3 ? argv[3] : "";
    char *a = in_dir("a"), *b = in_dir("b"), memory[64]; if (!strcmp(what, "memory")) { snprintf(memory, sizeof memory, "/dev/shm/torpor-lease-%d", getpid()); b = memory; }
    int read_ = make(a, O_RDONLY), write_ = make(b, O_RDWR); CHECK(!fcntl(read_, F_SETLEASE, F_RDLCK) && !fcntl(write_, F_SETLEASE, F_WRLCK)); CHECK(!fcntl(write_, F_SETSIG, SIGRTMIN) && !fcntl(read_, F_SETSIG, SIGRTMIN));
    if (!strcmp(what, "breaking")) CHECK(open(a, O_WRONLY | O_NONBLOCK) < 0 && errno == EWOULDBLOCK); else if (!fork()) { prctl(PR_SET_PDEATHSIG, SIGKILL); for (;;) { SAME(fcntl(write_, F_GETLEASE), F_WRLCK); nap(10); } }
    for (int broken = 0;; nap(20), tick()) {
        if (*what) continue;
        SAME(told, 0); SAME(fcntl(read_, F_GETLEASE), F_RDLCK); SAME(fcntl(write_, F_GETLEASE), F_WRLCK); SAME(fcntl(read_, F_GETOWN), getpid()); SAME(fcntl(write_, F_GETOWN), getpid());
        if (!broken && !access(in_dir("break"), F_OK)) { disturb(a, read_, F_RDLCK); dprintf(out, "broken\n"); broken = 1; }
    }
}
