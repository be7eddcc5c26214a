/* Robust mutexes and joins: what the kernel does for a thread when it ends must still work after a restore. */
#include "check.h"
static pthread_mutex_t *shared;
static volatile int leave, held;
static void *owner(void *p) {
    (void)p;
    CHECK(!pthread_mutex_lock(shared));
    held = 1;
    while (!leave) usleep(1000);
    return (void *)0x1234; /* dies with the mutex held */
}
static void *idle(void *p) { while (!leave) usleep(1500); return p; }
int main(int argc, char **argv) {
    begin(argc, argv);
    shared = map(4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    pthread_mutexattr_t a; pthread_mutexattr_init(&a); pthread_mutexattr_setrobust(&a, PTHREAD_MUTEX_ROBUST); pthread_mutexattr_setpshared(&a, 1);
    pthread_mutexattr_setprotocol(&a, PTHREAD_PRIO_NONE);
    pthread_mutex_init(shared, &a);
    for (;; tick()) {
        /* The pair of threads lives for a while, so that a dump falls into it. */
        leave = held = 0;
        pthread_t t = spawn(owner, 0), u = spawn(idle, (void *)77);
        while (!held) usleep(500);
        for (int i = 0; i < 8; i++) { nap(10); SAME(pthread_mutex_trylock(shared), EBUSY); }
        leave = 1;
        struct timespec until; clock_gettime(CLOCK_REALTIME, &until); until.tv_sec += 5;
        SAME(pthread_mutex_timedlock(shared, &until), EOWNERDEAD);
        CHECK(!pthread_mutex_consistent(shared)); CHECK(!pthread_mutex_unlock(shared));
        void *r; clock_gettime(CLOCK_REALTIME, &until); until.tv_sec += 5;
        SAME(pthread_timedjoin_np(t, &r, &until), 0); CHECK(r == (void *)0x1234);
        SAME(pthread_timedjoin_np(u, &r, &until), 0); CHECK(r == (void *)77);
    }
}
