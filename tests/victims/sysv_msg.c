/* System V message queues: messages with types and boundaries, who sent and received last, and waiting for one. */
#include "check.h"
#include <sys/ipc.h>
#include <sys/msg.h>

static struct message { long type; char text[4096]; } m;
static int full, empty, never;

static void put(int queue, long type, const char *text, size_t n) {
    m.type = type;
    memcpy(m.text, text, n);
    CHECK(!msgsnd(queue, &m, n, IPC_NOWAIT));
}
static void *waiter(void *arg) {
    struct message got;
    (void)arg;
    for (;;) {
        ssize_t n = msgrcv(empty, &got, sizeof got.text, 7, 0);
        if (n < 0) { if (errno == EINTR) CHECK(write(out, "EINTR msgrcv\n", sizeof "EINTR msgrcv\n" - 1) > 0); else bad("msgrcv"); continue; }
        got.type = 8;
        CHECK(!msgsnd(empty, &got, n, 0));
    }
}

int main(int argc, char **argv) {
    begin(argc, argv);
    key_t key = 0x72000000 + getpid();
    full = msgget(key, IPC_CREAT | IPC_EXCL | 0640);
    if (full < 0 && errno == ENOSYS) { dprintf(out, "SKIP no System V IPC\n"); for (;;) { tick(); nap(20); } }
    CHECK(full >= 0);
    empty = msgget(IPC_PRIVATE, 0600);
    never = msgget(IPC_PRIVATE, 0600);
    CHECK(empty >= 0 && never >= 0);
    static char big[4096];
    fill(big, sizeof big, 6);
    put(full, 3, "three", 5);
    put(full, 1, "", 0);
    put(full, 3, big, sizeof big);
    put(full, 9, "nine", 4);
    struct msqid_ds set, is;
    CHECK(!msgctl(full, IPC_STAT, &set));
    set.msg_qbytes = 5000;
    CHECK(!msgctl(full, IPC_SET, &set));
    put(never, 5, "one", 3);
    spawn(waiter, 0);
    for (uint64_t n = 0;; n++) {
        SAME(msgget(key, 0), full);
        CHECK(!msgctl(full, IPC_STAT, &is));
        SAME(is.msg_qbytes, 5000);
        SAME(is.msg_qnum, 4);
        SAME(is.msg_perm.mode & 0777, 0640);
        SAME(is.msg_lspid, getpid());
        SAME(is.msg_lrpid, n ? getpid() : 0);
        /* Once around; where it is interrupted in between, it goes on with the same. */
        SAME(msgrcv(full, &m, sizeof m.text, 0, IPC_NOWAIT), 5);
        CHECK(m.type == 3 && !memcmp(m.text, "three", 5));
        SAME(msgrcv(full, &m, sizeof m.text, 0, IPC_NOWAIT), 0);
        CHECK(m.type == 1);
        SAME(msgrcv(full, &m, sizeof m.text, 3, IPC_NOWAIT), 4096);
        CHECK(m.type == 3 && same(m.text, 4096, 6));
        SAME(msgrcv(full, &m, sizeof m.text, 0, IPC_NOWAIT), 4);
        CHECK(m.type == 9 && !memcmp(m.text, "nine", 4));
        CHECK(msgrcv(full, &m, sizeof m.text, 0, IPC_NOWAIT) < 0 && errno == ENOMSG);
        put(full, 3, "three", 5);
        put(full, 1, "", 0);
        put(full, 3, big, sizeof big);
        put(full, 9, "nine", 4);
        CHECK(!msgctl(never, IPC_STAT, &is));
        SAME(is.msg_lspid, getpid());
        SAME(is.msg_lrpid, 0);
        SAME(is.msg_qnum, 1);
        m.type = 7;
        memcpy(m.text, &n, 8);
        CHECK(!msgsnd(empty, &m, 8, 0));
        while (msgrcv(empty, &m, sizeof m.text, 8, 0) < 0) { CHECK(errno == EINTR); CHECK(write(out, "EINTR msgrcv\n", sizeof "EINTR msgrcv\n" - 1) > 0); }
        CHECK(!memcmp(m.text, &n, 8));
        tick();
        nap(5);
    }
}
