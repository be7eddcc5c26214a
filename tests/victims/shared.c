/* Memory shared between processes: anonymous, memfd, a file; at other addresses; mutexes, robust ones and conditions in it. */
#include "family.h"
typedef struct { pthread_mutex_t plain, robust, held; pthread_cond_t turn; int whose, count, dead; } common_t;
int main(int argc, char **argv) {
    begin_family(argc, argv); members = 3;
    common_t *c = mmap(0, 1 << 20, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    pthread_mutexattr_t ma; pthread_mutexattr_init(&ma); pthread_mutexattr_setpshared(&ma, PTHREAD_PROCESS_SHARED); pthread_mutex_init(&c->plain, &ma); pthread_mutexattr_setrobust(&ma, PTHREAD_MUTEX_ROBUST); pthread_mutex_init(&c->robust, &ma); pthread_mutex_init(&c->held, &ma);
    pthread_condattr_t ca; pthread_condattr_init(&ca); pthread_condattr_setpshared(&ca, PTHREAD_PROCESS_SHARED); pthread_cond_init(&c->turn, &ca);
    int fd = memfd_create("between", 0); CHECK(fd >= 0 && !ftruncate(fd, 1 << 20)); volatile uint64_t *memfd = mmap(0, 1 << 20, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    int ff = open(in_dir("file"), O_RDWR | O_CREAT, 0600); CHECK(!ftruncate(ff, 8192)); volatile uint64_t *file = mmap(0, 8192, PROT_READ | PROT_WRITE, MAP_SHARED, ff, 0); close(ff);
    memset((char *)c + 65536, 3, 900000);
    for (int who = 0; who < 3; who++) if (!fork()) {
        if (who == 1) { void *moved = mremap(c, 1 << 20, 1 << 20, MREMAP_MAYMOVE | MREMAP_FIXED, mmap(0, 1 << 20, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)); CHECK(moved != MAP_FAILED); c = moved; }
        if (who == 2) { CHECK(!munmap((void *)memfd, 1 << 20)); memfd = mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0); CHECK(!pthread_mutex_lock(&c->held)); }
        for (;;) {
            CHECK(!pthread_mutex_lock(&c->plain)); while (c->whose != who) CHECK(!pthread_cond_wait(&c->turn, &c->plain)); c->count++; c->whose = (who + 1) % 3; CHECK(!pthread_cond_broadcast(&c->turn)); CHECK(!pthread_mutex_unlock(&c->plain));
            SAME(((char *)c)[65536 + who * 1000], 3); __atomic_add_fetch(&memfd[0], 1, __ATOMIC_SEQ_CST); __atomic_add_fetch(&file[0], 1, __ATOMIC_SEQ_CST); beat(who); nap(2);
        }
    }
    int last = 0; uint64_t m = 0, f = 0;
    for (;;) {
        tick_all(); CHECK(c->count > last); last = c->count; CHECK(memfd[0] > m && file[0] > f); m = memfd[0]; f = file[0];
        SAME(pthread_mutex_trylock(&c->held), EBUSY);
        /* One that dies with a robust mutex leaves it to the next. */
        int p = fork(); if (!p) { pthread_mutex_lock(&c->robust); _exit(0); } CHECK(waitpid(p, 0, 0) == p); SAME(pthread_mutex_lock(&c->robust), EOWNERDEAD); pthread_mutex_consistent(&c->robust); pthread_mutex_unlock(&c->robust);
        nap(5);
    }
}
