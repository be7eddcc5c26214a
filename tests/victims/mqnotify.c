/* mq_notify(3) without being told (SIGEV_NONE): of the process itself, of a child, and of one with the same descriptors. With "full" there is
 * a message in the queue. */
#include "family.h"
#include <mqueue.h>
static mqd_t make(int n) { char name[64]; snprintf(name, sizeof name, "/torpor-victim-%d-ask%d", getpid(), n); struct mq_attr a = {.mq_maxmsg = 2, .mq_msgsize = 8}; mqd_t q = mq_open(name, O_CREAT | O_EXCL | O_RDWR, 0600, &a); if (q < 0 && errno == ENOSYS) { dprintf(out, "SKIP no message queues\n"); for (;;) { tick(); nap(20); } } CHECK(q >= 0); CHECK(!mq_unlink(name)); return q; }
static struct sigevent none = {.sigev_notify = SIGEV_NONE};
static mqd_t q[4];
static void asked_by(int n, pid_t pid) { char text[128] = {0}, *p; CHECK(pread(q[n], text, sizeof text - 1, 0) > 0); CHECK((p = strstr(text, "NOTIFY_PID:"))); SAME(atoi(p + 11), pid); CHECK((p = strstr(text, "NOTIFY:"))); SAME(atoi(p + 7), pid ? SIGEV_NONE : 0); }
/* Only who has asked can take it back. */
static void again(int n) { asked_by(n, getpid()); CHECK(mq_notify(q[n], &none) && errno == EBUSY); CHECK(!mq_notify(q[n], 0)); asked_by(n, 0); CHECK(!mq_notify(q[n], &none)); }
static int child(void *arg) { int n = (int)(long)arg; CHECK(!mq_notify(q[n], &none)); family->ready[n] = getpid(); for (;;) { again(n); beat(n - 1); nap(5); } return 0; }
int main(int argc, char **argv) {
    begin_family(argc, argv); for (int i = 0; i < 4; i++) q[i] = make(i);
    if (argc > 3) { CHECK(!mq_send(q[0], "x", 1, 0)); CHECK(!mq_notify(q[0], &none)); for (;; tick()) { asked_by(0, getpid()); nap(20); } }
    members = 2; CHECK(fcntl(q[0], F_DUPFD_CLOEXEC, 30) == 30);
    if (!fork()) child((void *)1);
    CHECK(clone(child, (char *)map(1 << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) + (1 << 20), CLONE_FILES | SIGCHLD, (void *)2) > 0);
    CHECK(!mq_notify(q[0], &none)); while (!family->ready[1] || !family->ready[2]) nap(1);
    for (;; nap(5)) { again(0); asked_by(3, 0); tick_all(); char b[8]; CHECK(!mq_send(q[3], "own", 3, 1)); SAME(mq_receive(q[3], b, 8, 0), 3); }
}
