/* IPC between a parent and its children: inherited and own attachments of segments, one of them marked removed, as MPI
 * uses them; semaphores with adjustments of each; messages to and fro. */
#include "check.h"
#include <mqueue.h>
#include <sys/ipc.h>
#include <sys/msg.h>
#include <sys/sem.h>
#include <sys/shm.h>

#define PAGE 4096
#define CHILDREN 3
struct board { uint64_t turns[CHILDREN + 1]; char rest[15 * PAGE]; };
static struct board *board, *gone;
static int keyed, removed, set, queue, who;
static mqd_t mq;

static void op(int n, int by, int flags) {
    struct sembuf s = {n, by, flags};
    while (semop(set, &s, 1)) { CHECK(errno == EINTR); dprintf(out, "EINTR semop\n"); }
}
static void look(void) {
    struct shmid_ds is;
    CHECK(same(gone->rest, sizeof gone->rest, 9));
    CHECK(!shmctl(removed, IPC_STAT, &is));
    SAME(is.shm_perm.mode & SHM_DEST, SHM_DEST);
    SAME(is.shm_nattch, CHILDREN + 1);
    CHECK(!shmctl(keyed, IPC_STAT, &is));
    /* The last child has one more, the first has half of it. */
    SAME(is.shm_nattch, CHILDREN + 2);
}
static void child(void) {
    struct board *mine = board;
    struct { long type; uint64_t n; } m;
    uint64_t n;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (who == 1) CHECK(!munmap((char *)board + 8 * PAGE, 8 * PAGE));
    if (who == CHILDREN) {
        mine = shmat(keyed, 0, SHM_RDONLY);
        CHECK(mine != (void *)-1 && mine != board);
    }
    /* An adjustment of its own: 10 times its number more when it ends. */
    op(0, -10 * who, SEM_UNDO);
    op(CHILDREN + 1, 1, 0);
    for (;;) {
        op(who, -1, 0);
        look();
        CHECK(mine->turns[0] == mine->turns[who] + 1);
        while (msgrcv(queue, &m, 8, who, 0) != 8) { CHECK(errno == EINTR); dprintf(out, "EINTR msgrcv\n"); }
        CHECK(m.n == mine->turns[0]);
        while (mq_receive(mq, (char *)&n, 8, 0) != 8) { CHECK(errno == EINTR); dprintf(out, "EINTR mq_receive\n"); }
        CHECK(n == m.n);
        board->turns[who]++;
        m.type = 100 + who;
        CHECK(!msgsnd(queue, &m, 8, 0));
    }
}

int main(int argc, char **argv) {
    begin(argc, argv);
    key_t key = 0x73000000 + getpid();
    keyed = shmget(key, sizeof *board, IPC_CREAT | IPC_EXCL | 0600);
    if (keyed < 0 && errno == ENOSYS) { dprintf(out, "SKIP no System V IPC\n"); for (;;) { tick(); nap(20); } }
    CHECK(keyed >= 0);
    removed = shmget(IPC_PRIVATE, sizeof *board, 0600);
    set = semget(key, CHILDREN + 2, IPC_CREAT | IPC_EXCL | 0600);
    queue = msgget(key, IPC_CREAT | IPC_EXCL | 0600);
    CHECK(removed >= 0 && set >= 0 && queue >= 0);
    board = shmat(keyed, 0, 0);
    gone = shmat(removed, 0, 0);
    CHECK(board != (void *)-1 && gone != (void *)-1);
    CHECK(!shmctl(removed, IPC_RMID, 0));
    fill(gone->rest, sizeof gone->rest, 9);
    char name[64];
    snprintf(name, sizeof name, "/torpor-victim-%d", getpid());
    mq = mq_open(name, O_CREAT | O_EXCL | O_RDWR, 0600, &(struct mq_attr){.mq_maxmsg = 4, .mq_msgsize = 8});
    CHECK(mq >= 0);
    op(0, 1000, 0);
    int left = 1000;
    for (who = 1; who <= CHILDREN; who++) {
        left -= 10 * who;
        pid_t pid = fork();
        CHECK(pid >= 0);
        if (!pid) child();
    }
    op(CHILDREN + 1, -CHILDREN, 0);
    for (;;) {
        look();
        SAME(semctl(set, 0, GETVAL), left);
        uint64_t n = ++board->turns[0];
        for (who = 1; who <= CHILDREN; who++) {
            struct { long type; uint64_t n; } m = {who, n};
            CHECK(!msgsnd(queue, &m, 8, 0) && !mq_send(mq, (char *)&n, 8, 0));
            op(who, 1, 0);
        }
        for (who = 1; who <= CHILDREN; who++) {
            struct { long type; uint64_t n; } m;
            while (msgrcv(queue, &m, 8, 100 + who, 0) != 8) { CHECK(errno == EINTR); dprintf(out, "EINTR msgrcv\n"); }
            SAME(m.n, n);
            SAME(board->turns[who], n);
        }
        tick();
        nap(3);
    }
}
