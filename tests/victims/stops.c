/* Children stopped by job control: one whose stop its parent has been told of, one whose stop it has yet to ask for, one with threads. */
#include "family.h"
static void *spin(void *arg) { volatile uint64_t *n = arg; for (;;) (*n)++; return 0; }
int main(int argc, char **argv) {
    begin_family(argc, argv); sigset_t chld; sigemptyset(&chld); sigaddset(&chld, SIGCHLD); sigprocmask(SIG_BLOCK, &chld, 0);
    int told, untold, threads, once;
    if (!(told = fork())) for (;;) { beat(0); nap(1); }
    if (!(untold = fork())) { setpgid(0, 0); /* in an orphaned group nobody stops (setpgid(2)) */ for (;;) { beat(1); nap(1); } }
    if (!(threads = fork())) { pthread_t t[4]; for (int i = 0; i < 4; i++) pthread_create(&t[i], 0, spin, (void *)&family->beat[10 + i]); for (;;) { beat(2); nap(1); } }
    if (!(once = fork())) for (;;) { beat(3); nap(1); }
    while (!family->beat[0] || !family->beat[1] || !family->beat[2] || !family->beat[3] || !family->beat[13]) nap(1);
    int status; siginfo_t info; struct timespec zero = {0};
    kill(told, SIGSTOP); CHECK(waitpid(told, &status, WUNTRACED) == told && WSTOPSIG(status) == SIGSTOP);
    kill(untold, SIGTSTP); CHECK(!waitid(P_PID, untold, &info, WSTOPPED | WNOWAIT)); SAME(info.si_status, SIGTSTP);
    kill(threads, SIGSTOP); CHECK(waitpid(threads, &status, WUNTRACED) == threads);
    while (sigtimedwait(&chld, &info, &zero) > 0) {}
    uint64_t still[14]; for (int i = 0; i < 14; i++) still[i] = family->beat[i];
    for (int n = 0;; n++) {
        SAME(waitpid(told, &status, WUNTRACED | WNOHANG), 0); SAME(waitpid(threads, &status, WUNTRACED | WNOHANG), 0);
        info.si_pid = 0; CHECK(!waitid(P_PID, untold, &info, WSTOPPED | WNOWAIT | WNOHANG)); SAME(info.si_pid, untold); SAME(info.si_status, SIGTSTP);
        sigset_t pending; sigpending(&pending); SAME(sigismember(&pending, SIGCHLD), 0);
        for (int i = 0; i < 14; i++) if (i != 3) SAME(family->beat[i], still[i]);
        uint64_t before = family->beat[3]; nap(20);
        for (int tries = 0; family->beat[3] <= before; tries++) { CHECK(tries < 1000); nap(10); }
        /* Now and then they go on for a moment. */
        if (n % 10 == 9) {
            kill(threads, SIGCONT); while (family->beat[2] < still[2] + 3 || family->beat[11] == still[11]) nap(1); kill(threads, SIGSTOP); CHECK(waitpid(threads, &status, WUNTRACED) == threads);
            nap(5); while (sigtimedwait(&chld, &info, &zero) > 0) {} for (int i = 0; i < 14; i++) still[i] = family->beat[i];
        }
        tick();
    }
}
