/* POSIX message queues: named and unlinked, with priorities, opened in several ways, and waiting for a message. With
 * "notify" it asks to be notified. */
#include "check.h"
#include <mqueue.h>

static mqd_t named, reading, gone, empty, answers;
static char name[64], text[64];

static mqd_t make(const char *queue, int flags, long most, long size) {
    struct mq_attr attr = {.mq_maxmsg = most, .mq_msgsize = size};
    mqd_t q = mq_open(queue, O_CREAT | O_EXCL | O_RDWR | flags, 0640, &attr);
    if (q < 0 && errno == ENOSYS) { dprintf(out, "SKIP no message queues\n"); for (;;) { tick(); nap(20); } }
    if (q < 0) bad("mq_open");
    return q;
}
static mqd_t nameless(const char *what, long most, long size) {
    char queue[64];
    snprintf(queue, sizeof queue, "/torpor-victim-%d-%s", getpid(), what);
    mqd_t q = make(queue, 0, most, size);
    CHECK(!mq_unlink(queue));
    return q;
}
static void put(mqd_t q, const char *s, unsigned priority) { CHECK(!mq_send(q, s, strlen(s), priority)); }
static void take(mqd_t q, const char *s, unsigned wanted) {
    unsigned priority;
    ssize_t n;
    while ((n = mq_receive(q, text, sizeof text, &priority)) < 0) CHECK(errno == EINTR);
    SAME(n, (ssize_t)strlen(s));
    CHECK(!memcmp(text, s, n));
    SAME(priority, wanted);
}
static void *waiter(void *arg) {
    char got[64];
    unsigned priority;
    (void)arg;
    for (;;) {
        ssize_t n = mq_receive(empty, got, sizeof got, &priority);
        if (n < 0) { if (errno == EINTR) dprintf(out, "EINTR mq_receive\n"); else bad("mq_receive"); continue; }
        CHECK(!mq_send(answers, got, n, 40));
    }
}

int main(int argc, char **argv) {
    begin(argc, argv);
    umask(0);
    snprintf(name, sizeof name, "/torpor-victim-%d", getpid());
    named = make(name, O_NONBLOCK, 5, 60);
    reading = mq_open(name, O_RDONLY);
    CHECK(reading >= 0);
    int again = dup(named);
    gone = nameless("gone", 4, 64);
    empty = nameless("empty", 2, 16);
    answers = nameless("answers", 2, 16);
    for (int i = 0; i < 5; i++) put(named, (char[]){"abcde"[i], 0}, "\1\7\1\0\7"[i]);
    put(gone, "first", 3);
    put(gone, "second", 3);
    if (argc > 3) CHECK(!mq_notify(empty, &(struct sigevent){.sigev_notify = SIGEV_SIGNAL, .sigev_signo = SIGURG}));
    else spawn(waiter, 0);
    for (uint64_t n = 0;; n++) {
        struct mq_attr is;
        CHECK(!mq_getattr(named, &is));
        SAME(is.mq_flags, O_NONBLOCK);
        SAME(is.mq_maxmsg, 5);
        SAME(is.mq_msgsize, 60);
        SAME(is.mq_curmsgs, 5);
        CHECK(!mq_getattr(reading, &is));
        SAME(is.mq_flags, 0);
        SAME(is.mq_curmsgs, 5);
        CHECK(mq_send(reading, "x", 1, 0) && errno == EBADF);
        CHECK(mq_send(again, "x", 1, 0) && errno == EAGAIN);
        mqd_t once_more = mq_open(name, O_RDONLY);
        struct stat a, b;
        CHECK(once_more >= 0 && !fstat(once_more, &a) && !fstat(named, &b));
        CHECK(a.st_ino == b.st_ino && (a.st_mode & 0777) == 0640);
        mq_close(once_more);
        /* Once around. */
        take(named, "b", 7), take(again, "e", 7), take(reading, "a", 1), take(reading, "c", 1), take(named, "d", 0);
        for (int i = 0; i < 5; i++) put(named, (char[]){"abcde"[i], 0}, "\1\7\1\0\7"[i]);
        take(gone, "first", 3), take(gone, "second", 3);
        put(gone, "first", 3), put(gone, "second", 3);
        if (argc <= 3) {
            put(empty, "ping", 0);
            take(answers, "ping", 40);
        }
        tick();
        nap(5);
    }
}
