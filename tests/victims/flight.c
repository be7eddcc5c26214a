/* unix(7): what is on its way in queues: descriptors of every kind, nested and in a ring; credentials; urgent bytes; names of
 * senders; empty messages; peek offsets; and descriptions that are nowhere else. Receives all, checks it, and sends it again. */
#include "check.h"
#include <sys/wait.h>
#ifndef SCM_CREDENTIALS
#define SCM_CREDENTIALS 2
#endif
struct got { int n, fds[8]; struct ucred cred; int has_cred, flags; char from[120]; int from_len; };
static void pair(int type, int s[2]) { CHECK(!socketpair(AF_UNIX, type | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, s)); }
static void pass(int s, const void *data, int len, const int *fds, int n, const struct ucred *cred) {
    char control[256] = {0}; struct iovec v = {(void *)data, len}; struct msghdr m = {.msg_iov = &v, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control}; size_t used = 0;
    struct cmsghdr *c = CMSG_FIRSTHDR(&m);
    if (n) { c->cmsg_level = SOL_SOCKET; c->cmsg_type = SCM_RIGHTS; c->cmsg_len = CMSG_LEN(n * 4); memcpy(CMSG_DATA(c), fds, n * 4); used += CMSG_SPACE(n * 4); c = (void *)(control + used); }
    if (cred) { c->cmsg_level = SOL_SOCKET; c->cmsg_type = SCM_CREDENTIALS; c->cmsg_len = CMSG_LEN(sizeof *cred); memcpy(CMSG_DATA(c), cred, sizeof *cred); used += CMSG_SPACE(sizeof *cred); }
    m.msg_controllen = used; if (!used) m.msg_control = 0;
    SAME(sendmsg(s, &m, 0), len);
}
static int take_flags;
static int take(int s, void *data, int len, struct got *g) {
    char control[512]; struct sockaddr_un un; struct iovec v = {data, len}; struct msghdr m = {.msg_iov = &v, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control, .msg_name = &un, .msg_namelen = sizeof un};
    memset(g, 0, sizeof *g); int r = recvmsg(s, &m, MSG_CMSG_CLOEXEC | MSG_DONTWAIT | take_flags); if (r < 0) return r;
    g->flags = m.msg_flags; g->from_len = (int)m.msg_namelen - 2; if (g->from_len > 0) memcpy(g->from, un.sun_path, g->from_len);
    for (struct cmsghdr *c = CMSG_FIRSTHDR(&m); c; c = CMSG_NXTHDR(&m, c)) {
        if (c->cmsg_type == SCM_RIGHTS) { g->n = (c->cmsg_len - CMSG_LEN(0)) / 4; memcpy(g->fds, CMSG_DATA(c), g->n * 4); }
        if (c->cmsg_type == SCM_CREDENTIALS) { g->has_cred = 1; memcpy(&g->cred, CMSG_DATA(c), sizeof g->cred); }
    }
    return r;
}
static ino_t inode(int fd) { struct stat st; CHECK(!fstat(fd, &st)); return st.st_ino; }
static int named(int type, const char *name, int len) { int s = socket(AF_UNIX, type | SOCK_NONBLOCK | SOCK_CLOEXEC, 0); struct sockaddr_un un = {.sun_family = AF_UNIX}; if (len) memcpy(un.sun_path, name, len); CHECK(!bind(s, (void *)&un, (socklen_t)(2 + len))); return s; }
static void to(int s, const char *name, int len, const char *data, int n) { struct sockaddr_un un = {.sun_family = AF_UNIX}; memcpy(un.sun_path, name, len); SAME(sendto(s, data, n, 0, (void *)&un, (socklen_t)(2 + len)), n); }
/* 1: a file, a pipe end whose other end is here, one whose both ends are only in flight, an eventfd, over each type; twice the same. */
static int ways[3][2], keep_pipe[2], file; static int types[3] = {SOCK_STREAM, SOCK_DGRAM, SOCK_SEQPACKET};
static void put_plain(int w) {
    int p[2], e = eventfd(41 + w, EFD_CLOEXEC), lost = open(in_dir("lost"), O_RDWR | O_CREAT | O_CLOEXEC, 0600); CHECK(!pipe2(p, O_CLOEXEC)); CHECK(write(p[1], "in flight", 9) == 9); CHECK(lseek(lost, 7 + w, SEEK_SET) == 7 + w);
    CHECK(write(ways[w][0], "before", 6) == 6); int fds[] = {keep_pipe[1], p[0], p[1], e, file, lost}; pass(ways[w][0], "with", 4, fds, 6, 0); pass(ways[w][0], "x", 1, &file, 1, 0); if (w) CHECK(write(ways[w][0], "", 0) == 0); CHECK(write(ways[w][0], "after", 5) == 5);
    close(p[0]); close(p[1]); close(e); close(lost);
}
static void get_plain(int w) {
    char b[64]; struct got g; uint64_t v; int first = 6;
    if (!w) first = 10; /* data before descriptors is read along with them */
    SAME(take(ways[w][1], b, 64, &g), first); if (w) { SAME(g.n, 0); SAME(take(ways[w][1], b, 64, &g), 4); CHECK(!memcmp(b, "with", 4)); } else CHECK(!memcmp(b, "beforewith", 10));
    SAME(g.n, 6); CHECK(write(g.fds[0], "k", 1) == 1); CHECK(read(keep_pipe[0], b, 9) == 1); SAME(read(g.fds[1], b, 64), 9); CHECK(!memcmp(b, "in flight", 9)); CHECK(write(g.fds[2], "again", 5) == 5); SAME(read(g.fds[1], b, 64), 5);
    CHECK(read(g.fds[3], &v, 8) == 8); SAME(v, 41 + w); off_t at = lseek(file, 0, SEEK_CUR); CHECK(lseek(g.fds[4], 3, SEEK_CUR) == at + 3); CHECK(lseek(file, at, SEEK_SET) == at); SAME(lseek(g.fds[5], 0, SEEK_CUR), 7 + w);
    for (int i = 0; i < 6; i++) close(g.fds[i]);
    SAME(take(ways[w][1], b, 64, &g), 1); SAME(g.n, 1); SAME(inode(g.fds[0]), inode(file)); close(g.fds[0]);
    if (w) SAME(take(ways[w][1], b, 64, &g), 0);
    SAME(take(ways[w][1], b, 64, &g), 5); SAME(g.n, 0); CHECK(take(ways[w][1], b, 64, &g) < 0);
}
/* 2: a socket only in flight, with a socket in its queue that has data in its own. */
static int outer[2];
static void put_nested(void) { int in[2], deep[2]; pair(SOCK_STREAM, in); pair(SOCK_DGRAM, deep); CHECK(write(deep[0], "deep", 4) == 4); pass(in[0], "in", 2, deep, 2, 0); pass(outer[0], "out", 3, in, 2, 0); close(in[0]); close(in[1]); close(deep[0]); close(deep[1]); }
static void get_nested(void) { char b[64]; struct got a, c, d; SAME(take(outer[1], b, 64, &a), 3); SAME(a.n, 2); SAME(take(a.fds[1], b, 64, &c), 2); SAME(c.n, 2); SAME(take(c.fds[1], b, 64, &d), 4); CHECK(!memcmp(b, "deep", 4)); CHECK(write(c.fds[0], "more", 4) == 4); SAME(read(c.fds[1], b, 9), 4); for (int i = 0; i < 2; i++) { close(a.fds[i]); close(c.fds[i]); } }
/* 3: two sockets, each in flight in the other. */
static int ring_a[2], ring_b[2];
static void put_ring(void) { pass(ring_a[0], "a", 1, &ring_b[1], 1, 0); pass(ring_b[0], "b", 1, &ring_a[1], 1, 0); }
static void get_ring(void) { char b[9]; struct got x, y; SAME(take(ring_a[1], b, 9, &x), 1); SAME(x.n, 1); SAME(inode(x.fds[0]), inode(ring_b[1])); SAME(take(x.fds[0], b, 9, &y), 1); SAME(y.n, 1); SAME(inode(y.fds[0]), inode(ring_a[1])); close(x.fds[0]); close(y.fds[0]); }
/* 4: credentials: our own, those of a process that has ended, and none. */
static int creds[3][2]; static pid_t ended; static int root;
static void put_creds(int w) { struct ucred own = {getpid(), geteuid(), getegid()}, other = {getpid(), 1234, 4321}; CHECK(write(creds[w][0], "one", 3) == 3); pass(creds[w][0], "two", 3, 0, 0, &own); if (root) pass(creds[w][0], "three", 5, &file, 1, &other); CHECK(write(creds[w][0], "four", 4) == 4); }
static void get_creds(int w, int first) {
    char b[64]; struct got g; int n;
    n = take(creds[w][1], b, 64, &g); if (first) SAME(n, 0 + (w ? 3 : n)); CHECK(g.has_cred);
    SAME(g.cred.pid, getpid()); SAME(g.cred.uid, geteuid());
    if (w) { SAME(n, 3); SAME(take(creds[w][1], b, 64, &g), 3); CHECK(!memcmp(b, "two", 3)); SAME(g.cred.pid, getpid()); } else SAME(n, 6);
    if (root) { SAME(take(creds[w][1], b, 64, &g), 5); CHECK(!memcmp(b, "three", 5)); SAME(g.cred.pid, getpid()); SAME(g.cred.uid, 1234); SAME(g.cred.gid, 4321); SAME(g.n, 1); close(g.fds[0]); }
    SAME(take(creds[w][1], b, 64, &g), 4); CHECK(!memcmp(b, "four", 4)); SAME(g.cred.uid, geteuid()); CHECK(take(creds[w][1], b, 64, &g) < 0);
}
static int dead[2];
static void put_dead(void) { pid_t p = fork(); if (!p) { if (write(dead[0], "last words", 10) != 10) _exit(1); _exit(0); } CHECK(p > 0); int st; while (waitpid(p, &st, 0) < 0 && errno == EINTR) {} SAME(st, 0); ended = p; }
static void get_dead(void) { char b[64]; struct got g; take_flags = MSG_PEEK; SAME(take(dead[1], b, 64, &g), 10); take_flags = 0; CHECK(g.has_cred); SAME(g.cred.pid, ended); SAME(g.cred.uid, geteuid()); }
/* 5: urgent bytes: at the end, in the middle, first. */
static int oob[3][2], has_oob;
static void put_oob(int w) { if (w < 2) CHECK(write(oob[w][0], "abc", 3) == 3); CHECK(send(oob[w][0], "X", 1, MSG_OOB) == 1); if (w) CHECK(write(oob[w][0], "def", 3) == 3); }
static void get_oob(int w) { char b[16]; SAME(recv(oob[w][1], b, 16, MSG_OOB | MSG_PEEK), 1); CHECK(*b == 'X'); if (w < 2) { SAME(read(oob[w][1], b, 16), 3); CHECK(!memcmp(b, "abc", 3)); } CHECK(sockatmark(oob[w][1]) == 1); SAME(recv(oob[w][1], b, 16, MSG_OOB), 1); if (w) { SAME(read(oob[w][1], b, 16), 3); CHECK(!memcmp(b, "def", 3)); } CHECK(read(oob[w][1], b, 1) < 0); }
/* 6: datagrams of many senders: unbound, by path, abstract, autobound, of a socket that is closed, connected elsewhere. */
static int box, by_path, abstract, automatic, elsewhere; static char box_name[108], path_name[108], abs_name[64], gone_name[108], else_name[108], auto_name[16]; static int abs_len, auto_len;
static void put_box(void) {
    int s = socket(AF_UNIX, SOCK_DGRAM, 0); to(s, box_name, strlen(box_name) + 1, "nobody", 6); close(s);
    to(by_path, box_name, strlen(box_name) + 1, "path", 4); to(abstract, box_name, strlen(box_name) + 1, "abstract", 8); to(automatic, box_name, strlen(box_name) + 1, "auto", 4); to(elsewhere, box_name, strlen(box_name) + 1, "else", 4);
    s = named(SOCK_DGRAM, gone_name, strlen(gone_name) + 1); to(s, box_name, strlen(box_name) + 1, "gone", 4); close(s); CHECK(!unlink(gone_name)); to(by_path, box_name, strlen(box_name) + 1, "", 0); to(abstract, box_name, strlen(box_name) + 1, "end", 3);
}
static void expect(const char *data, const char *name, int len) { char b[64]; struct got g; SAME(take(box, b, 64, &g), strlen(data)); CHECK(!memcmp(b, data, strlen(data))); if (g.from_len < 0) g.from_len = 0; SAME(g.from_len, len); if (memcmp(g.from, name, len)) bad("`%s` from %s instead of %s", data, *g.from ? g.from : g.from + 1, *name ? name : name + 1); }
static void get_box(void) {
    expect("nobody", "", 0); expect("path", path_name, strlen(path_name) + 1); expect("abstract", abs_name, abs_len); expect("auto", auto_name, auto_len); expect("else", else_name, strlen(else_name) + 1);
    expect("gone", gone_name, strlen(gone_name) + 1); expect("", path_name, strlen(path_name) + 1); expect("end", abs_name, abs_len); char b[9]; CHECK(recv(box, b, 9, 0) < 0);
    /* the one that is connected elsewhere still is */
    SAME(send(elsewhere, "hello", 5, 0), 5); struct got g; SAME(take(automatic, b, 9, &g), 5); SAME(g.from_len, strlen(else_name) + 1);
}
int main(int argc, char **argv) {
    begin(argc, argv); root = geteuid() == 0; file = open(in_dir("file"), O_RDWR | O_CREAT | O_CLOEXEC, 0600); CHECK(file >= 0); CHECK(!pipe2(keep_pipe, O_CLOEXEC | O_NONBLOCK));
    for (int w = 0; w < 3; w++) { int on = 1; pair(types[w], ways[w]); pair(types[w], creds[w]); CHECK(!setsockopt(creds[w][1], SOL_SOCKET, SO_PASSCRED, &on, sizeof on)); pair(SOCK_STREAM, oob[w]); put_plain(w); put_creds(w); }
    has_oob = send(oob[0][0], "X", 1, MSG_OOB) == 1; if (has_oob) { char b; CHECK(recv(oob[0][1], &b, 1, MSG_OOB) == 1); } pair(SOCK_STREAM, oob[0]); for (int w = 0; w < 3 && has_oob; w++) put_oob(w);
    int on = 1; pair(SOCK_DGRAM, dead); CHECK(!setsockopt(dead[1], SOL_SOCKET, SO_PASSCRED, &on, sizeof on)); put_dead();
    pair(SOCK_SEQPACKET, outer); pair(SOCK_STREAM, ring_a); pair(SOCK_STREAM, ring_b); put_nested(); put_ring();
    snprintf(box_name, 108, "%s/box", dir); snprintf(path_name, 108, "%s/path", dir); snprintf(gone_name, 108, "%s/gone", dir); snprintf(else_name, 108, "%s/else", dir); abs_len = snprintf(abs_name, 64, "%ctorpor flight %d", 0, getpid());
    box = named(SOCK_DGRAM, box_name, strlen(box_name) + 1); by_path = named(SOCK_DGRAM, path_name, strlen(path_name) + 1); abstract = named(SOCK_DGRAM, abs_name, abs_len); automatic = named(SOCK_DGRAM, "", 0); elsewhere = named(SOCK_DGRAM, else_name, strlen(else_name) + 1);
    struct sockaddr_un un; socklen_t l = sizeof un; CHECK(!getsockname(automatic, (void *)&un, &l)); auto_len = l - 2; memcpy(auto_name, un.sun_path, auto_len); CHECK(!connect(elsewhere, (void *)&un, l)); put_box();
    int peeks[2]; pair(SOCK_STREAM, peeks); CHECK(write(peeks[0], "0123456789", 10) == 10); int off = 4; CHECK(!setsockopt(peeks[1], SOL_SOCKET, SO_PEEK_OFF, &off, sizeof off));
    for (int n = 0;; n++, tick()) {
        if (n % 4 == 3) { /* long enough to be dumped with all of it, again and again */
            for (int w = 0; w < 3; w++) { get_plain(w); put_plain(w); get_creds(w, 1); put_creds(w); if (has_oob) { get_oob(w); put_oob(w); } }
            get_nested(); put_nested(); get_ring(); put_ring(); get_box(); put_box();
        }
        get_dead(); /* stays where it is: no children, which cannot be dumped yet */
        char b[16]; SAME(recv(peeks[1], b, 2, MSG_PEEK), 2); SAME(b[0], '4'); off = 4; CHECK(!setsockopt(peeks[1], SOL_SOCKET, SO_PEEK_OFF, &off, sizeof off));
        int none; l = sizeof none; CHECK(!getsockopt(ways[0][1], SOL_SOCKET, SO_PEEK_OFF, &none, &l)); SAME(none, -1);
        nap(20);
    }
}
