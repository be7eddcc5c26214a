/* What every victim has: a log, checks that name what broke, and ticks.
 * argv[1] is the log, argv[2] a directory of its own, the rest is the victim's. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stddef.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/file.h>
#include <sys/inotify.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/select.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/timerfd.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

__attribute__((unused)) static int out = -1;
__attribute__((unused)) static const char *dir;

/* Says what broke, once, and ends the process. */
__attribute__((unused, noreturn, format(printf, 1, 2))) static void bad(const char *format, ...) {
    int error = errno;
    char text[512];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    dprintf(out, "BAD %s: errno %d (%s)\n", text, error, strerror(error));
    _exit(1);
}
#define CHECK(c) do { errno = 0; if (!(c)) bad("line %d: %s", __LINE__, #c); } while (0)
/* Equal numbers, and if not, which. */
#define SAME(a, b) do { errno = 0; long long a_ = (long long)(a), b_ = (long long)(b); \
    if (a_ != b_) bad("line %d: %s is %lld (%#llx), not %lld (%#llx)", __LINE__, #a, a_, a_, b_, b_); } while (0)

__attribute__((unused)) static void begin(int argc, char **argv) {
    if (argc < 3) { fprintf(stderr, "usage: %s LOG DIR\n", argv[0]); exit(2); }
    dir = argv[2];
    out = open(argv[1], O_CREAT | O_WRONLY | O_APPEND | O_CLOEXEC, 0666);
    if (out < 0) { perror(argv[1]); exit(2); }
}
__attribute__((unused)) static void tick(void) {
    static uint64_t n;
    dprintf(out, "tick %lu\n", (unsigned long)++n);
}
__attribute__((unused)) static uint64_t now_ns(clockid_t clock) {
    struct timespec t;
    clock_gettime(clock, &t);
    return (uint64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}
/* Sleeps; a handled signal only makes it go on. */
__attribute__((unused)) static void nap(long ms) {
    struct timespec t = {ms / 1000, ms % 1000 * 1000000};
    while (nanosleep(&t, &t) && errno == EINTR) {}
}
__attribute__((unused)) static char *in_dir(const char *name) {
    char *path;
    if (asprintf(&path, "%s/%s", dir, name) < 0) abort();
    return path;
}
__attribute__((unused)) static pthread_t spawn(void *(*f)(void *), void *arg) {
    pthread_t t;
    pthread_attr_t a;
    pthread_attr_init(&a);
    pthread_attr_setstacksize(&a, 65536);
    if (pthread_create(&t, &a, f, arg)) bad("pthread_create");
    return t;
}
__attribute__((unused)) static pid_t own_tid(void) { return syscall(SYS_gettid); }
__attribute__((unused)) static uint64_t mix(uint64_t x) {
    x ^= x >> 31; x *= 0x7fb5d329728ea185; x ^= x >> 27; x *= 0x81dadef4bc2dd44d;
    return x ^ (x >> 33);
}
__attribute__((unused)) static void fill(void *p, size_t n, uint64_t seed) {
    uint64_t *q = p;
    for (size_t i = 0; i < n / 8; i++) q[i] = mix(seed + i);
}
__attribute__((unused)) static int same(const void *p, size_t n, uint64_t seed) {
    const uint64_t *q = p;
    for (size_t i = 0; i < n / 8; i++) if (q[i] != mix(seed + i)) return 0;
    return 1;
}
__attribute__((unused)) static int zero(const char *p, size_t n) {
    for (size_t i = 0; i < n; i++) if (p[i]) return 0;
    return 1;
}
__attribute__((unused)) static void *map(size_t size, int prot, int flags, int fd, off_t at) {
    void *p = mmap(0, size, prot, flags, fd, at);
    if (p == MAP_FAILED) bad("mmap");
    return p;
}
/* Whether the area at `p` has this word in its VmFlags. */
__attribute__((unused)) static int vm_flag(const void *p, const char *flag) {
    FILE *f = fopen("/proc/self/smaps", "re");
    char line[4096];
    int here = 0, found = -1;
    while (f && fgets(line, sizeof line, f)) {
        unsigned long from, to;
        if (sscanf(line, "%lx-%lx ", &from, &to) == 2) here = (unsigned long)p >= from && (unsigned long)p < to;
        else if (here && !strncmp(line, "VmFlags:", 8)) {
            char word[8];
            snprintf(word, sizeof word, " %s", flag);
            found = strstr(line, word) != 0;
        }
    }
    if (f) fclose(f);
    return found;
}
