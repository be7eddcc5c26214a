/* Threads that are born and die all the time; argv[3] "exec": and the program executes itself now and then. */
#include "check.h"
static void *brief(void *p) { volatile int x = 0; for (int i = 0; i < 1000; i++) x += i; return p; }
int main(int argc, char **argv) {
    begin(argc, argv);
    signal(SIGCHLD, SIG_IGN);
    for (int n = 0;; n++) {
        pthread_t t[8]; for (int i = 0; i < 8; i++) t[i] = spawn(brief, (void *)(long)i);
        for (int i = 0; i < 8; i++) { void *r; CHECK(!pthread_join(t[i], &r)); SAME((long)r, i); }
        if (n % 20 == 0) tick();
        if (argc > 3 && n == 50) { execv("/proc/self/exe", argv); bad("execv"); }
    }
}
