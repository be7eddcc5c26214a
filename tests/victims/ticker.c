/* The simplest victim: counts. With "N" more arguments it has nothing else. */
#include "check.h"
int main(int argc, char **argv) {
    begin(argc, argv);
    pid_t pid = getpid(), sid = getsid(0), pgid = getpgrp();
    for (;;) {
        SAME(getpid(), pid); SAME(getsid(0), sid); SAME(getpgrp(), pgid);
        tick();
        nap(10);
    }
}
