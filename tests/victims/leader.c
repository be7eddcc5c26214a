/* A child whose first thread has ended while others go on. */
#include "family.h"
static int fds[2];
static void *other(void *arg) { long n = (long)arg; char x; for (;;) { SAME(getpid(), family->pid[0]); CHECK(write(fds[1], "y", 1) == 1 && read(fds[0], &x, 1) == 1); beat((int)n); nap(3); } }
int main(int argc, char **argv) {
    begin_family(argc, argv); members = 3; int child;
    if (!(child = fork())) {
        family->pid[0] = getpid(); CHECK(!pipe(fds)); char *p = malloc(1 << 20); memset(p, 5, 1 << 20);
        pthread_t t; for (long i = 0; i < 3; i++) CHECK(!pthread_create(&t, 0, other, (void *)i));
        pthread_exit(0);
    }
    char path[64]; snprintf(path, sizeof path, "/proc/%d/stat", child);
    for (;;) {
        char text[512]; int f = open(path, O_RDONLY); CHECK(f >= 0); ssize_t n = read(f, text, sizeof text - 1); close(f); CHECK(n > 0); text[n] = 0;
        char *state = strrchr(text, ')'); CHECK(state); if (family->beat[0] > 3) SAME(state[2], 'Z');
        SAME(waitpid(child, 0, WNOHANG), 0); tick_all(); nap(10);
    }
}
