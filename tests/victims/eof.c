/* A child that holds one end of a pipe and much memory, and ends every now and then: its parent must find the end of the pipe
 * at once, and collect that child and no other. Whatever else has the pipe, or were a child, would be seen. */
#include "check.h"
#include <sys/wait.h>
int main(int argc, char **argv) {
    begin(argc, argv);
    size_t size = 96 << 20;
    unsigned char *m = mmap(0, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(m != MAP_FAILED);
    madvise(m, size, MADV_NOHUGEPAGE);
    memset(m, 7, size);
    for (unsigned n = 0;; n++) {
        int ends[2];
        CHECK(!pipe(ends));
        pid_t child = fork();
        CHECK(child >= 0);
        if (!child) { close(ends[0]); nap(30); _exit(n % 100); }
        close(ends[1]);
        int status; char c;
        SAME(waitpid(-1, &status, __WALL), child);
        SAME(WEXITSTATUS(status), n % 100);
        /* The child has let go of everything before it can be collected. */
        struct pollfd end = {ends[0], POLLIN, 0};
        if (poll(&end, 1, 0) != 1) bad("round %u: the pipe does not end with its writer", n);
        SAME(read(ends[0], &c, 1), 0);
        close(ends[0]);
        errno = 0; if (waitpid(-1, &status, WNOHANG | __WALL) != -1 || errno != ECHILD) bad("round %u: there is another child", n);
        tick();
    }
}
