/* So many threads that they are not asked one by one, each with something of its own that only it can tell. */
#include "check.h"
#include <sys/wait.h>
#define N 90
#define SS_AUTODISARM_FLAG (1U << 31)
static volatile uint64_t rounds[N];
static volatile int children;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static void *work(void *p) {
    long i = (long)p;
    char name[16], now[16] = {0};
    snprintf(name, sizeof name, "troop-%ld", i);
    CHECK(!prctl(PR_SET_NAME, name));
    unsigned long slack = i % 3 ? 50000 + 1000 * i : 50000;
    CHECK(!prctl(PR_SET_TIMERSLACK, slack));
    int death = i % 4 == 1 ? i % 8 == 1 ? SIGWINCH : SIGCONT : 0, told = -1;
    CHECK(!prctl(PR_SET_PDEATHSIG, death));
    stack_t own = {.ss_flags = SS_DISABLE}, st;
    if (i % 2) {
        own = (stack_t){.ss_sp = malloc(16384), .ss_size = 16384, .ss_flags = i % 5 ? 0 : (int)SS_AUTODISARM_FLAG};
        CHECK(!sigaltstack(&own, 0));
    }
    /* It waits for nobody but this thread. */
    sigset_t set, got;
    sigemptyset(&set); sigaddset(&set, SIGRTMIN + i % 20);
    CHECK(!pthread_sigmask(SIG_SETMASK, &set, 0));
    if (i % 7 == 0) CHECK(!pthread_kill(pthread_self(), SIGRTMIN + i % 20));
    /* Calls of this thread alone: of its own user as far as files go, and of a process that gains nothing. */
    if (i == 4) syscall(SYS_setfsuid, 1234);
    if (i == 6) CHECK(!prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0));
    pid_t tid = own_tid(), child = 0;
    if (i % 30 == 8) {
        pthread_mutex_lock(&lock);
        child = fork();
        if (!child) for (;;) pause();
        pthread_mutex_unlock(&lock);
        CHECK(child > 0);
        __sync_fetch_and_add(&children, 1);
    }
    for (;;) {
        SAME(own_tid(), tid);
        CHECK(!prctl(PR_GET_NAME, now)); CHECK(!strcmp(now, name));
        SAME(prctl(PR_GET_TIMERSLACK), slack);
        CHECK(!prctl(PR_GET_PDEATHSIG, &told)); SAME(told, death);
        CHECK(!sigaltstack(0, &st)); SAME(st.ss_flags, own.ss_flags);
        if (i % 2) { CHECK(st.ss_sp == own.ss_sp); SAME(st.ss_size, own.ss_size); }
        CHECK(!pthread_sigmask(SIG_SETMASK, 0, &got));
        for (int s = 1; s < 64; s++) if (s != 32 && s != 33) SAME(sigismember(&got, s), s == SIGRTMIN + i % 20);
        CHECK(!sigpending(&got)); SAME(sigismember(&got, SIGRTMIN + i % 20), i % 7 == 0);
        SAME(syscall(SYS_setfsuid, -1), i == 4 ? 1234 : 0);
        SAME(prctl(PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0), i == 6);
        if (child) SAME(waitpid(child, 0, WNOHANG), 0);
        rounds[i]++;
        usleep(20000);
    }
    return 0;
}
int main(int argc, char **argv) {
    begin(argc, argv);
    for (long i = 0; i < N; i++) spawn(work, (void *)i);
    while (children < 3) nap(1);
    uint64_t last[N] = {0};
    for (;;) {
        nap(100);
        for (int i = 0; i < N; i++) {
            for (int tries = 0; rounds[i] == last[i]; tries++) { if (tries > 1000) bad("thread %d stands", i); nap(10); }
            last[i] = rounds[i];
        }
        tick();
    }
}
