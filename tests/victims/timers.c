/* setitimer and timer_create: every timer goes on with its period, id, signal and value. */
#include "check.h"
static volatile sig_atomic_t alarms, virt, prof;
static volatile int one_shot;
static void on_alarm(int s) { if (s == SIGALRM) alarms++; else if (s == SIGVTALRM) virt++; else prof++; }
static volatile uint64_t hits[8];
static volatile pid_t wanted[8];
static void on_timer(int s, siginfo_t *i, void *c) {
    (void)c;
    int k = s - SIGRTMIN;
    if (i->si_code != SI_TIMER) bad("signal %d with code %d", s, i->si_code);
    if (i->si_value.sival_int != 100 + k) bad("timer %d gives value %d", k, i->si_value.sival_int);
    if (wanted[k] && own_tid() != wanted[k]) bad("timer %d hit the wrong thread", k);
    hits[k]++;
}
static volatile int spin_on = 1;
static void *spin(void *p) {
    (void)p;
    sigset_t rest; sigfillset(&rest); sigdelset(&rest, SIGRTMIN + 2); pthread_sigmask(SIG_SETMASK, &rest, 0);
    wanted[2] = own_tid();
    while (spin_on) { volatile double x = 1; for (int i = 0; i < 100000; i++) x *= 1.0000001; }
    return 0;
}
static timer_t make(clockid_t clock, int k, pid_t tid, long first_ms, long period_ms) {
    struct sigevent e; memset(&e, 0, sizeof e);
    e.sigev_notify = tid ? SIGEV_THREAD_ID : SIGEV_SIGNAL; e.sigev_signo = SIGRTMIN + k; e.sigev_value.sival_int = 100 + k;
#ifndef sigev_notify_thread_id
#define sigev_notify_thread_id _sigev_un._tid
#endif
    if (tid) e.sigev_notify_thread_id = tid;
    timer_t t; CHECK(!timer_create(clock, &e, &t));
    struct itimerspec s = {{period_ms / 1000, period_ms % 1000 * 1000000}, {first_ms / 1000, first_ms % 1000 * 1000000}};
    CHECK(!timer_settime(t, 0, &s, 0));
    return t;
}
int main(int argc, char **argv) {
    begin(argc, argv);
    struct sigaction sa = {.sa_handler = on_alarm, .sa_flags = SA_RESTART}; sigaction(SIGALRM, &sa, 0); sigaction(SIGVTALRM, &sa, 0); sigaction(SIGPROF, &sa, 0);
    struct sigaction st = {.sa_sigaction = on_timer, .sa_flags = SA_RESTART | SA_SIGINFO}; for (int k = 0; k < 8; k++) sigaction(SIGRTMIN + k, &st, 0);
    struct itimerval iv = {{0, 40000}, {0, 40000}}, iv2 = {{0, 50000}, {0, 50000}}, iv3 = {{0, 60000}, {0, 60000}}, got;
    CHECK(!setitimer(ITIMER_REAL, &iv, 0)); CHECK(!setitimer(ITIMER_VIRTUAL, &iv2, 0)); CHECK(!setitimer(ITIMER_PROF, &iv3, 0));
    spawn(spin, 0); while (!wanted[2]) usleep(100);
    timer_t t[8], scrap[20];
    t[0] = make(CLOCK_MONOTONIC, 0, 0, 30, 30);
    for (int i = 0; i < 20; i++) scrap[i] = make(CLOCK_MONOTONIC, 7, 0, 9000000, 0);
    t[1] = make(CLOCK_REALTIME, 1, 0, 35, 35);
    t[2] = make(CLOCK_MONOTONIC, 2, wanted[2], 25, 25);
    wanted[3] = own_tid(); t[3] = make(CLOCK_MONOTONIC, 3, own_tid(), 45, 45);
    t[4] = make(CLOCK_PROCESS_CPUTIME_ID, 4, 0, 20, 20);
    for (int i = 0; i < 20; i++) if (i != 9) CHECK(!timer_delete(scrap[i])); /* ids with gaps */
    t[5] = make(CLOCK_MONOTONIC, 5, 0, 100000000, 0); /* far away */
    t[6] = make(CLOCK_BOOTTIME, 6, 0, 1000, 1000); struct itimerspec off = {{0, 0}, {0, 0}}, g; CHECK(!timer_settime(t[6], 0, &off, 0)); /* disarmed */
    uint64_t ids[8]; memcpy(ids, t, sizeof ids < sizeof t ? sizeof ids : sizeof t);
    uint64_t last[8] = {0}; sig_atomic_t a = 0, v = 0, p = 0;
    for (;; tick()) {
        nap(150);
        for (int k = 0; k < 5; k++) { for (int i = 0; hits[k] == last[k]; i++) { errno = 0; if (i > 500) bad("timer %d stands", k); nap(10); } last[k] = hits[k]; }
        for (int i = 0; alarms == a || virt == v || prof == p; i++) { errno = 0; if (i > 500) bad("itimers %d %d %d", alarms == a, virt == v, prof == p); nap(10); }
        a = alarms; v = virt; p = prof;
        CHECK(!getitimer(ITIMER_REAL, &got)); SAME(got.it_interval.tv_usec, 40000); CHECK(!getitimer(ITIMER_PROF, &got)); CHECK(got.it_interval.tv_usec / 1000 == 60);
        CHECK(!timer_gettime(t[5], &g)); CHECK(g.it_value.tv_sec > 90000 && g.it_value.tv_sec <= 100000 && g.it_interval.tv_sec == 0);
        CHECK(!timer_gettime(t[6], &g)); CHECK(g.it_value.tv_sec == 0 && g.it_value.tv_nsec == 0);
        CHECK(!timer_gettime(scrap[9], &g)); CHECK(g.it_value.tv_sec > 8000);
        CHECK(!timer_gettime(t[0], &g)); SAME(g.it_interval.tv_nsec, 30000000);
        SAME(hits[5], 0); SAME(hits[6], 0); SAME(hits[7], 0);
        /* A new timer must not get an id that is in use. */
        timer_t fresh = make(CLOCK_MONOTONIC, 7, 0, 9000000, 0); for (int k = 0; k < 7; k++) CHECK(fresh != t[k]); CHECK(!timer_delete(fresh));
    }
}
