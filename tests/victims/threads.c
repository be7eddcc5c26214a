/* What a thread is apart from its registers: TLS, id, name, scheduling. */
#include "check.h"
#include <linux/ioprio.h>
#define N 6
static __thread uint64_t mark;
static __thread char area[8192];
static volatile uint64_t rounds[N];
static void *work(void *p) {
    long i = (long)p;
    char name[16], now[16] = {0};
    snprintf(name, sizeof name, "thr-%ld %c", i, i == 1 ? '\n' : 'x');
    prctl(PR_SET_NAME, name);
    mark = 0xabcdef00 + i; fill(area, sizeof area, 77 + i);
    uint64_t *mine = &mark;
    pid_t tid = own_tid();
    pthread_t self = pthread_self();
    unsigned long slack = 50000 + 1000 * i;
    CHECK(!prctl(PR_SET_TIMERSLACK, slack));
    CHECK(!setpriority(PRIO_PROCESS, tid, 2 + i));
    int io = IOPRIO_PRIO_VALUE(IOPRIO_CLASS_BE, i);
    CHECK(!syscall(SYS_ioprio_set, IOPRIO_WHO_PROCESS, tid, io));
    cpu_set_t want, got;
    CPU_ZERO(&want); CPU_SET(i % 2 && sysconf(_SC_NPROCESSORS_ONLN) > 1 ? 1 : 0, &want);
    CHECK(!sched_setaffinity(0, sizeof want, &want));
    struct sched_param sp = {0};
    int policy = i == 3 ? SCHED_BATCH : i == 4 ? SCHED_IDLE : SCHED_OTHER;
    CHECK(!sched_setscheduler(0, policy, &sp));
    for (;;) {
        SAME(mark, 0xabcdef00 + i); CHECK(mine == &mark); CHECK(same(area, sizeof area, 77 + i));
        SAME(own_tid(), tid); CHECK(pthread_equal(self, pthread_self()));
        CHECK(!prctl(PR_GET_NAME, now)); CHECK(!strcmp(now, name));
        SAME(prctl(PR_GET_TIMERSLACK), slack);
        SAME(getpriority(PRIO_PROCESS, 0), 2 + i);
        SAME(syscall(SYS_ioprio_get, IOPRIO_WHO_PROCESS, 0), io);
        CHECK(!sched_getaffinity(0, sizeof got, &got)); CHECK(CPU_EQUAL(&want, &got));
        SAME(sched_getscheduler(0), policy);
        rounds[i]++;
        usleep(2000);
    }
    return 0;
}
int main(int argc, char **argv) {
    begin(argc, argv);
    prctl(PR_SET_NAME, "the leader");
    for (long i = 0; i < N; i++) spawn(work, (void *)i);
    uint64_t last[N] = {0};
    char now[16] = {0};
    for (;;) {
        nap(100);
        CHECK(!prctl(PR_GET_NAME, now)); CHECK(!strcmp(now, "the leader"));
        for (int i = 0; i < N; i++) {
            for (int tries = 0; rounds[i] == last[i]; tries++) { if (tries > 1000) bad("thread %d stands", i); nap(10); }
            last[i] = rounds[i];
        }
        tick();
    }
}
