/* Masks, actions, and signals that wait: each with the value it was sent with, in the order it was sent. */
#include "check.h"
#include <ucontext.h>
static pthread_t side;
static volatile int ready;
static volatile sig_atomic_t handled;
static void handler(int s, siginfo_t *i, void *c) { (void)s; (void)i; (void)c; handled++; }
static void expect(sigset_t *set, int signo, int code, int value) {
    siginfo_t info;
    struct timespec none = {0, 0};
    SAME(sigtimedwait(set, &info, &none), signo);
    SAME(info.si_signo, signo); SAME(info.si_code, code);
    if (code == SI_QUEUE) { SAME(info.si_value.sival_int, value); SAME(info.si_pid, getpid()); SAME(info.si_uid, getuid()); }
}
static void send_thread(pid_t tid, int signo, int value) {
    siginfo_t info;
    memset(&info, 0, sizeof info);
    info.si_signo = signo; info.si_code = SI_QUEUE; info.si_pid = getpid(); info.si_uid = getuid(); info.si_value.sival_int = value;
    CHECK(!syscall(SYS_rt_tgsigqueueinfo, getpid(), tid, signo, &info));
}
static void *work(void *p) {
    (void)p;
    sigset_t mask, now, one;
    sigemptyset(&mask); sigaddset(&mask, SIGRTMIN + 5); sigaddset(&mask, SIGTERM); sigaddset(&mask, SIGUSR1); sigaddset(&mask, SIGRTMIN + 7);
    sigaddset(&mask, SIGRTMIN + 2); sigaddset(&mask, SIGUSR2); sigaddset(&mask, SIGHUP);
    CHECK(!pthread_sigmask(SIG_SETMASK, &mask, 0));
    sigemptyset(&one); sigaddset(&one, SIGRTMIN + 5); sigaddset(&one, SIGTERM);
    for (int n = 0;; n++) {
        send_thread(own_tid(), SIGRTMIN + 5, 100 + n); send_thread(own_tid(), SIGRTMIN + 5, 200 + n); send_thread(own_tid(), SIGTERM, 300 + n);
        ready = n + 1;
        nap(20);
        CHECK(!pthread_sigmask(SIG_BLOCK, 0, &now));
        for (int s = 1; s < 65; s++) SAME(sigismember(&now, s), sigismember(&mask, s));
        sigpending(&now); CHECK(sigismember(&now, SIGTERM) && sigismember(&now, SIGRTMIN + 5));
        expect(&one, SIGTERM, SI_QUEUE, 300 + n);
        expect(&one, SIGRTMIN + 5, SI_QUEUE, 100 + n); expect(&one, SIGRTMIN + 5, SI_QUEUE, 200 + n);
        struct timespec none = {0, 0};
        CHECK(sigtimedwait(&one, 0, &none) < 0 && errno == EAGAIN);
    }
    return 0;
}
int main(int argc, char **argv) {
    begin(argc, argv);
    sigset_t mask, now, rt, rt2;
    sigemptyset(&mask); sigaddset(&mask, SIGRTMIN + 2); sigaddset(&mask, SIGUSR2); sigaddset(&mask, SIGHUP); sigaddset(&mask, SIGRTMIN + 7);
    CHECK(!pthread_sigmask(SIG_SETMASK, &mask, 0));
    struct sigaction sa = {.sa_sigaction = handler, .sa_flags = SA_SIGINFO | SA_RESTART | SA_NODEFER}, got;
    sigaddset(&sa.sa_mask, SIGQUIT); sigaddset(&sa.sa_mask, SIGRTMAX);
    CHECK(!sigaction(SIGUSR1, &sa, 0)); CHECK(!sigaction(SIGRTMAX - 1, &sa, 0));
    signal(SIGPIPE, SIG_IGN); signal(SIGXFSZ, SIG_IGN);
    struct sigaction once = {.sa_handler = SIG_DFL, .sa_flags = SA_NOCLDWAIT}; CHECK(!sigaction(SIGCHLD, &once, 0));
    kill(getpid(), SIGHUP);
    sigemptyset(&rt); sigaddset(&rt, SIGRTMIN + 2); sigaddset(&rt, SIGUSR2); sigaddset(&rt, SIGHUP);
    sigemptyset(&rt2); sigaddset(&rt2, SIGRTMIN + 7);
    side = spawn(work, 0);
    union sigval v;
    v.sival_int = 4242; CHECK(!sigqueue(getpid(), SIGRTMIN + 7, v)); /* waits for ever */
    for (int n = 0;; n++) {
        for (int k = 0; k < 5; k++) { v.sival_int = 1000 * k + n; CHECK(!sigqueue(getpid(), SIGRTMIN + 2, v)); }
        CHECK(!kill(getpid(), SIGUSR2));
        nap(20);
        CHECK(!pthread_sigmask(SIG_BLOCK, 0, &now));
        for (int s = 1; s < 65; s++) SAME(sigismember(&now, s), sigismember(&mask, s));
        CHECK(!sigpending(&now)); CHECK(sigismember(&now, SIGHUP) && sigismember(&now, SIGRTMIN + 7) && sigismember(&now, SIGUSR2));
        expect(&rt, SIGHUP, SI_USER, 0); expect(&rt, SIGUSR2, SI_USER, 0);
        for (int k = 0; k < 5; k++) expect(&rt, SIGRTMIN + 2, SI_QUEUE, 1000 * k + n);
        struct timespec none = {0, 0};
        CHECK(sigtimedwait(&rt, 0, &none) < 0 && errno == EAGAIN);
        CHECK(!kill(getpid(), SIGHUP));
        if (n % 10 == 9) { expect(&rt2, SIGRTMIN + 7, SI_QUEUE, 4242); CHECK(!sigqueue(getpid(), SIGRTMIN + 7, (union sigval){.sival_int = 4242})); }
        CHECK(!sigaction(SIGUSR1, 0, &got)); CHECK(got.sa_sigaction == handler);
        SAME(got.sa_flags & ~0x04000000, SA_SIGINFO | SA_RESTART | SA_NODEFER);
        CHECK(sigismember(&got.sa_mask, SIGQUIT) && sigismember(&got.sa_mask, SIGRTMAX) && !sigismember(&got.sa_mask, SIGTERM));
        CHECK(!sigaction(SIGPIPE, 0, &got)); CHECK(got.sa_handler == SIG_IGN);
        CHECK(!sigaction(SIGCHLD, 0, &got)); SAME(got.sa_flags & SA_NOCLDWAIT, SA_NOCLDWAIT);
        handled = 0; raise(SIGUSR1); raise(SIGRTMAX - 1); SAME(handled, 2);
        tick();
    }
}
