/* unix(7) between the processes of a tree, as message passing libraries do it: autobound datagram sockets with packets of the others in
 * them, their senders' credentials, a descriptor in flight, a connection that waits, and who made what (SO_PEERCRED). */
#include "check.h"
#include <stdatomic.h>
#include <sys/wait.h>
#define RANKS 4
struct shared { _Atomic long step[RANKS]; char name[RANKS][16]; int len[RANKS]; pid_t pid[RANKS]; };
static struct shared *all; static int rank;
static void together(long n) { all->step[rank] = n; for (int i = 0; i < RANKS; i++) while (all->step[i] < n) nap(1); }
static socklen_t address(struct sockaddr_un *un, int of) { memset(un, 0, sizeof *un); un->sun_family = AF_UNIX; memcpy(un->sun_path, all->name[of], all->len[of]); return (socklen_t)(2 + all->len[of]); }
static void pass(int s, int fd) { char c[CMSG_SPACE(4)] = {0}; struct iovec v = {"f", 1}; struct msghdr m = {.msg_iov = &v, .msg_iovlen = 1, .msg_control = c, .msg_controllen = sizeof c}; struct cmsghdr *h = CMSG_FIRSTHDR(&m); h->cmsg_level = SOL_SOCKET; h->cmsg_type = SCM_RIGHTS; h->cmsg_len = CMSG_LEN(4); memcpy(CMSG_DATA(h), &fd, 4); CHECK(sendmsg(s, &m, 0) == 1); }
static int passed(int s) { char c[CMSG_SPACE(4)], b; struct iovec v = {&b, 1}; struct msghdr m = {.msg_iov = &v, .msg_iovlen = 1, .msg_control = c, .msg_controllen = sizeof c}; int fd; CHECK(recvmsg(s, &m, MSG_CMSG_CLOEXEC) == 1); CHECK(CMSG_FIRSTHDR(&m)); memcpy(&fd, CMSG_DATA(CMSG_FIRSTHDR(&m)), 4); return fd; }
static void made_by(int s, int who) { struct ucred c; socklen_t l = sizeof c; CHECK(!getsockopt(s, SOL_SOCKET, SO_PEERCRED, &c, &l)); SAME(c.pid, all->pid[who]); }
static void packet(int box, int from, long n) {
    char b[64], want[64], control[256]; struct sockaddr_un un; struct iovec v = {b, 64}; struct msghdr m = {.msg_iov = &v, .msg_iovlen = 1, .msg_name = &un, .msg_namelen = sizeof un, .msg_control = control, .msg_controllen = sizeof control};
    int got; while ((got = recvmsg(box, &m, 0)) < 0 && errno == EINTR) {}
    SAME(got, snprintf(want, 64, "from %d, %ld", from, n)); CHECK(!memcmp(b, want, got)); SAME((int)m.msg_namelen - 2, all->len[from]); CHECK(!memcmp(un.sun_path, all->name[from], all->len[from]));
    if (!rank) { struct cmsghdr *h = CMSG_FIRSTHDR(&m); CHECK(h && h->cmsg_type == SCM_CREDENTIALS); struct ucred c; memcpy(&c, CMSG_DATA(h), sizeof c); SAME(c.pid, all->pid[from]); SAME(c.uid, geteuid()); }
}
int main(int argc, char **argv) {
    begin(argc, argv); all = map(sizeof *all, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    int wire[RANKS][2], l = socket(AF_UNIX, SOCK_SEQPACKET, 0); for (int i = 0; i < RANKS; i++) CHECK(!socketpair(AF_UNIX, SOCK_STREAM, 0, wire[i]));
    struct sockaddr_un at = {.sun_family = AF_UNIX}; snprintf(at.sun_path, sizeof at.sun_path, "%s/kin", dir); CHECK(!bind(l, (void *)&at, sizeof at) && !listen(l, 4)); all->pid[0] = getpid();
    for (int i = 1; i < RANKS && !rank; i++) { pid_t p = fork(); CHECK(p >= 0); if (!p) { rank = i; prctl(PR_SET_PDEATHSIG, SIGKILL); } all->pid[i] = rank ? getpid() : p; }
    int box = socket(AF_UNIX, SOCK_DGRAM, 0), on = 1; struct sockaddr_un un = {.sun_family = AF_UNIX}; socklen_t ul = sizeof un; CHECK(!bind(box, (void *)&un, 2)); CHECK(!getsockname(box, (void *)&un, &ul)); memcpy(all->name[rank], un.sun_path, ul - 2); all->len[rank] = ul - 2;
    if (!rank) CHECK(!setsockopt(box, SOL_SOCKET, SO_PASSCRED, &on, sizeof on));
    together(1); int own[2], end = -1; if (rank == 3) { CHECK(!socketpair(AF_UNIX, SOCK_STREAM, 0, own)); pass(wire[3][1], own[1]); close(own[1]); } else if (!rank) end = passed(wire[3][0]);
    long step = 1;
    for (long n = 0;; n++) {
        if (n % 4 == 0) { int next = (rank + 1) % RANKS; char b[64]; int len = snprintf(b, 64, "from %d, %ld", rank, n); for (int i = 0; i < 2; i++) { ul = address(&un, i ? 0 : next); CHECK(sendto(box, b, len, 0, (void *)&un, ul) == len); } if (!rank) { int e = eventfd(n, EFD_CLOEXEC); pass(wire[1][0], e); close(e); } }
        int client = -1; if (n % 4 == 0 && rank == 2) { client = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0); CHECK(!connect(client, (void *)&at, sizeof at)); }
        static int waiting = -1; if (client >= 0) waiting = client;
        together(++step); if (!rank) { tick(); for (int i = 1; i < RANKS; i++) SAME(waitpid(all->pid[i], 0, WNOHANG), 0); } nap(15);
        if (n % 4 != 3) continue;
        if (rank) packet(box, rank - 1, n - 3); else { char seen[RANKS] = {0}; struct sockaddr_un f; char b[64]; for (int i = 0; i < RANKS + 1; i++) { socklen_t fl = sizeof f; int got = recvfrom(box, b, 64, MSG_PEEK, (void *)&f, &fl); CHECK(got > 6); int from = b[5] - '0'; CHECK(from >= 0 && from < RANKS); packet(box, from, n - 3); seen[from]++; } for (int i = 0; i < RANKS; i++) SAME(seen[i], i == 3 ? 2 : 1); CHECK(recv(box, b, 9, MSG_DONTWAIT) < 0); }
        if (rank == 1) { int e = passed(wire[1][1]); uint64_t v = 0; if (n > 3) CHECK(read(e, &v, 8) == 8); SAME(v, n - 3); close(e); }
        if (!rank) { int s = accept4(l, 0, 0, SOCK_CLOEXEC); CHECK(s >= 0); made_by(s, 2); CHECK(write(s, "ok", 2) == 2); close(s); made_by(end, 3); made_by(wire[2][0], 0); CHECK(write(end, "!", 1) == 1); }
        if (rank == 2) { char b[9]; made_by(waiting, 0); SAME(read(waiting, b, 9), 2); close(waiting); waiting = -1; }
        if (rank == 3) { char b; SAME(read(own[0], &b, 1), 1); made_by(own[0], 3); }
        together(++step);
    }
}
