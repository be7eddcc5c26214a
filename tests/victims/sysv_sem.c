/* System V semaphores: values, who operated last, waiting, and adjustments (SEM_UNDO). With "undo" there are some. */
#include "check.h"
#include <sys/ipc.h>
#include <sys/sem.h>

union semun { int val; struct semid_ds *buf; unsigned short *array; };
static int set, other, undo;

/* Waits for a semaphore that only the other thread raises. */
static void *waiter(void *arg) {
    (void)arg;
    for (;;) {
        struct sembuf take = {3, -1, 0}, give = {4, 1, 0};
        if (semop(set, &take, 1)) { if (errno == EINTR) CHECK(write(out, "EINTR semop\n", 12) == 12); else bad("semop"); continue; }
        CHECK(!semop(set, &give, 1));
    }
}
static int value(int n) { return semctl(set, n, GETVAL); }

int main(int argc, char **argv) {
    begin(argc, argv);
    key_t key = 0x71000000 + getpid();
    undo = argc > 3 && !strcmp(argv[3], "undo");
    set = semget(key, 8, IPC_CREAT | IPC_EXCL | 0620);
    if (set < 0 && errno == ENOSYS) { dprintf(out, "SKIP no System V IPC\n"); for (;;) { tick(); nap(20); } }
    CHECK(set >= 0);
    other = semget(IPC_PRIVATE, 2, 0600);
    CHECK(other >= 0);
    unsigned short values[8] = {5, 32767, 0, 0, 0, 1000, 9, 0};
    union semun u = {.array = values};
    CHECK(!semctl(set, 0, SETALL, u));
    u.val = 17;
    CHECK(!semctl(other, 1, SETVAL, u));
    if (undo) {
        struct sembuf all[] = {{0, -2, SEM_UNDO}, {2, 7, SEM_UNDO}, {5, -999, SEM_UNDO}, {6, 1, SEM_UNDO}};
        CHECK(!semop(set, all, 4));
        /* The extremes: 1 goes to 0 and back, of which only the way down counts. */
        struct sembuf extreme[] = {{1, -32767, SEM_UNDO}, {1, 32767, 0}};
        CHECK(!semop(set, extreme, 2));
        struct sembuf one = {1, -1, SEM_UNDO};
        CHECK(semop(set, &one, 1) && errno == ERANGE);
    }
    struct sembuf none = {7, 0, 0};
    CHECK(!semop(set, &none, 1));
    spawn(waiter, 0);
    int raised = undo ? 7 : 0;
    for (uint64_t n = 0;; n++) {
        SAME(value(0), undo ? 3 : 5);
        SAME(value(1), 32767);
        SAME(value(2), raised);
        SAME(value(5), undo ? 1 : 1000);
        SAME(value(6), undo ? 10 : 9);
        SAME(semctl(other, 0, GETVAL), 0);
        SAME(semctl(other, 1, GETVAL), 17);
        SAME(semget(key, 0, 0), set);
        SAME(semctl(set, 0, GETPID), getpid());
        SAME(semctl(set, 3, GETPID), getpid());
        SAME(semctl(other, 0, GETPID), 0);
        struct semid_ds is;
        u.buf = &is;
        CHECK(!semctl(set, 0, IPC_STAT, u));
        SAME(is.sem_perm.mode & 0777, 0620);
        CHECK(is.sem_otime != 0);
        CHECK(!semctl(other, 0, IPC_STAT, u));
        SAME(is.sem_otime, 0);
        if (undo) {
            /* No more room in this adjustment. */
            struct sembuf one = {1, -1, SEM_UNDO};
            CHECK(semop(set, &one, 1) && errno == ERANGE);
        }
        struct sembuf give = {3, 1, 0}, take = {4, -1, 0};
        CHECK(!semop(set, &give, 1));
        while (semop(set, &take, 1)) { CHECK(errno == EINTR); CHECK(write(out, "EINTR semop\n", 12) == 12); }
        tick();
        nap(5);
    }
}
