/* unix(7): who is at the other end. Names that were unlinked, and what is at their paths by now; listeners that are gone; the order of a
 * backlog; halves; resets; datagram sockets connected one way, in chains, to themselves, to what is gone; SO_PEERCRED. */
#include "check.h"
#include <grp.h>
static struct sockaddr_un un; static socklen_t ul;
static socklen_t name(const char *n, int len) { memset(&un, 0, sizeof un); un.sun_family = AF_UNIX; memcpy(un.sun_path, n, len); return ul = (socklen_t)(2 + len); }
static int bound(int type, const char *n, int len) { int s = socket(AF_UNIX, type | SOCK_CLOEXEC, 0); name(n, len); CHECK(!bind(s, (void *)&un, ul)); return s; }
static int path(int type, const char *n) { return bound(type, n, strlen(n) + 1); }
static int listening(int type, const char *n) { int s = path(type, n); CHECK(!listen(s, 7)); return s; }
static int reach(int type, const char *n, int len) { int s = socket(AF_UNIX, type | SOCK_CLOEXEC, 0); name(n, len); if (connect(s, (void *)&un, ul)) bad("connect to %s", *n ? n : n + 1); return s; }
static void own_is(int s, const char *n, int len, int line) { struct sockaddr_un a; socklen_t l = sizeof a; if (getsockname(s, (void *)&a, &l) || l != (socklen_t)(2 + len) || memcmp(a.sun_path, n, len)) bad("line %d: its name is `%s` (%d)", line, l > 2 ? (*a.sun_path ? a.sun_path : a.sun_path + 1) : "", l); }
static void peer_is(int s, const char *n, int len, int line) { struct sockaddr_un a; socklen_t l = sizeof a; if (getpeername(s, (void *)&a, &l) || l != (socklen_t)(2 + len) || memcmp(a.sun_path, n, len)) bad("line %d: its peer is `%s` (%d)", line, l > 2 ? (*a.sun_path ? a.sun_path : a.sun_path + 1) : "", l); }
#define OWN(s, n, l) own_is(s, n, l, __LINE__)
#define PEER(s, n, l) peer_is(s, n, l, __LINE__)
static void says(int from, int at, const char *what, int line) { char b[64]; int n = strlen(what); if (send(from, what, n, MSG_NOSIGNAL) != n || recv(at, b, 64, MSG_DONTWAIT) != n || memcmp(b, what, n)) bad("line %d: it does not carry `%s`", line, what); }
#define SAYS(a, b, w) says(a, b, w, __LINE__)
static char *in(const char *n) { char *p = in_dir(n); CHECK(strlen(p) < 100); return p; }
static void cred_is(int s, uid_t uid, gid_t gid, int group, int line) { struct ucred c; socklen_t l = sizeof c; gid_t g[64]; if (getsockopt(s, SOL_SOCKET, SO_PEERCRED, &c, &l)) bad("line %d: SO_PEERCRED", line); if (c.pid != getpid() || c.uid != uid || c.gid != gid) bad("line %d: its peer is pid %d of %d/%d", line, c.pid, c.uid, c.gid);
    l = sizeof g; if (getsockopt(s, SOL_SOCKET, 59, g, &l)) bad("line %d: SO_PEERGROUPS", line); if (group >= 0 && (l != 4 || g[0] != (gid_t)group)) bad("line %d: %d groups, %d", line, l / 4, g[0]); }
#define CRED(s, u, g, o) cred_is(s, u, g, o, __LINE__)
int main(int argc, char **argv) {
    begin(argc, argv); signal(SIGPIPE, SIG_IGN); char b[64], abs_name[64], else_name[64]; int an = snprintf(abs_name, 64, "%ctorpor peers %d", 0, getpid()), en = snprintf(else_name, 64, "%ctorpor else %d", 0, getpid()); int root = geteuid() == 0; uid_t u = geteuid(); gid_t g = getegid();
    /* unlinked: a listener, and a datagram socket, with others at their paths now */
    char *lost = in("lost"), *reused = in("reused"), *closed = in("closed"), *plain = in("plain"), *box = in("box");
    int l1 = listening(SOCK_STREAM, lost), c1 = reach(SOCK_STREAM, lost, strlen(lost) + 1), s1 = accept(l1, 0, 0), w1 = reach(SOCK_STREAM, lost, strlen(lost) + 1); CHECK(!unlink(lost));
    int d1 = path(SOCK_DGRAM, reused), e1 = reach(SOCK_DGRAM, reused, strlen(reused) + 1); CHECK(!unlink(reused)); int d2 = path(SOCK_DGRAM, reused), e2 = reach(SOCK_DGRAM, reused, strlen(reused) + 1);
    int f = open(lost, O_CREAT | O_WRONLY | O_CLOEXEC, 0600); CHECK(write(f, "not a socket", 12) == 12); close(f);
    /* accepted from listeners that are gone: by path, twice, and abstract */
    int l = listening(SOCK_SEQPACKET, closed), c2 = reach(SOCK_SEQPACKET, closed, strlen(closed) + 1), s2 = accept(l, 0, 0), c3 = reach(SOCK_SEQPACKET, closed, strlen(closed) + 1), s3 = accept(l, 0, 0); close(l); CHECK(!unlink(closed));
    l = bound(SOCK_STREAM, abs_name, an); CHECK(!listen(l, 3)); int c4 = reach(SOCK_STREAM, abs_name, an), s4 = accept(l, 0, 0), c5 = reach(SOCK_STREAM, abs_name, an), s5 = accept(l, 0, 0); close(l);
    /* a client with a name of its own; a backlog with one that has gone, and two halves */
    int lp = listening(SOCK_STREAM, plain), c6 = bound(SOCK_STREAM, else_name, en); name(plain, strlen(plain) + 1); CHECK(!connect(c6, (void *)&un, ul)); int s6 = accept(lp, 0, 0);
    int q[4]; for (int i = 0; i < 4; i++) q[i] = reach(SOCK_STREAM, plain, strlen(plain) + 1); close(q[1]); CHECK(!shutdown(q[2], SHUT_WR));
    /* halves in every direction, with data behind them */
    int h[4][2]; for (int i = 0; i < 4; i++) { CHECK(!socketpair(AF_UNIX, i < 3 ? SOCK_STREAM : SOCK_SEQPACKET, 0, h[i])); CHECK(write(h[i][0], "rest", 4) == 4); } CHECK(!shutdown(h[0][0], SHUT_WR)); CHECK(!shutdown(h[1][0], SHUT_RD)); CHECK(!shutdown(h[2][0], SHUT_RDWR)); CHECK(!shutdown(h[3][0], SHUT_WR));
    /* gone: with a name (the first of the backlog, accepted and closed), and with something unread */
    int o1 = reach(SOCK_STREAM, plain, strlen(plain) + 1); close(accept(lp, 0, 0));
    int r[2]; CHECK(!socketpair(AF_UNIX, SOCK_STREAM, 0, r)); CHECK(write(r[0], "unread", 6) == 6); CHECK(write(r[1], "last", 4) == 4); close(r[1]);
    /* datagrams: one way, in a chain, to itself, to what is gone */
    int dbox = path(SOCK_DGRAM, box), to_box = reach(SOCK_DGRAM, box, strlen(box) + 1), to_box2 = reach(SOCK_DGRAM, box, strlen(box) + 1), chain = path(SOCK_DGRAM, in("chain")), before = reach(SOCK_DGRAM, in("chain"), strlen(in("chain")) + 1); name(box, strlen(box) + 1); CHECK(!connect(chain, (void *)&un, ul));
    int self = path(SOCK_DGRAM, in("self")); name(in("self"), strlen(in("self")) + 1); CHECK(!connect(self, (void *)&un, ul));
    char *away = in("away"); int x = path(SOCK_DGRAM, away), to_gone = reach(SOCK_DGRAM, away, strlen(away) + 1); close(x); CHECK(!unlink(away));
    int m1 = path(SOCK_DGRAM, in("m1")), m2 = path(SOCK_DGRAM, in("m2")); name(in("m2"), strlen(in("m2")) + 1); CHECK(!connect(m1, (void *)&un, ul)); name(in("m1"), strlen(in("m1")) + 1); CHECK(!connect(m2, (void *)&un, ul));
    /* made by another user */
    int o[2], lo = -1, co = -1, so = -1; gid_t some = 77; if (root) { char *other = in("other"); CHECK(!setgroups(1, &some)); CHECK(!setresgid(-1, 2000, -1)); CHECK(!setresuid(-1, 1000, -1)); CHECK(!socketpair(AF_UNIX, SOCK_STREAM, 0, o)); CHECK(!setresuid(-1, 0, -1)); lo = path(SOCK_STREAM, other); CHECK(!chmod(other, 0777)); CHECK(!setresuid(-1, 1000, -1)); CHECK(!listen(lo, 2)); CHECK(!setresuid(-1, 0, -1)); CHECK(!setresgid(-1, 0, -1)); CHECK(!setgroups(0, 0)); co = reach(SOCK_STREAM, other, strlen(other) + 1); so = accept(lo, 0, 0); }
    int p[2]; CHECK(!socketpair(AF_UNIX, SOCK_DGRAM, 0, p));
    for (int n = 0;; n++, tick()) {
        PEER(c1, lost, (int)strlen(lost) + 1); OWN(s1, lost, (int)strlen(lost) + 1); OWN(l1, lost, (int)strlen(lost) + 1); SAYS(c1, s1, "unlinked"); SAYS(s1, c1, "back"); struct stat st; CHECK(!stat(lost, &st) && S_ISREG(st.st_mode) && st.st_size == 12);
        SAYS(e1, d1, "first"); SAYS(e2, d2, "second"); PEER(e1, reused, (int)strlen(reused) + 1); OWN(d1, reused, (int)strlen(reused) + 1);
        SAYS(c2, s2, "gone"); SAYS(s3, c3, "gone too"); OWN(s2, closed, (int)strlen(closed) + 1); OWN(s3, closed, (int)strlen(closed) + 1); PEER(c3, closed, (int)strlen(closed) + 1); SAYS(c4, s4, "abstract"); SAYS(s5, c5, "abstract"); OWN(s4, abs_name, an); PEER(c5, abs_name, an);
        SAYS(c6, s6, "named"); OWN(c6, else_name, en); PEER(s6, else_name, en); OWN(s6, plain, (int)strlen(plain) + 1); PEER(c6, plain, (int)strlen(plain) + 1);
        SAME(recv(h[0][1], b, 64, MSG_PEEK), 4); CHECK(send(h[0][0], "x", 1, 0) < 0 && errno == EPIPE); CHECK(send(h[1][1], "x", 1, 0) < 0 && errno == EPIPE); SAME(read(h[1][0], b, 9), 0); SAME(write(h[1][0], "y", 1), 1); SAME(recv(h[1][1], b, 64, 0), n ? 1 : 5); SAME(read(h[2][0], b, 9), 0); SAME(recv(h[2][1], b, 9, MSG_PEEK), 4); CHECK(send(h[2][1], "x", 1, 0) < 0 && errno == EPIPE); SAME(recv(h[3][1], b, 9, MSG_PEEK), 4); SAYS(h[3][1], h[3][0], "open way");
        PEER(o1, plain, (int)strlen(plain) + 1); PEER(q[0], plain, (int)strlen(plain) + 1); CHECK(send(q[0], "x", 1, 0) < 0 && errno == EPIPE); CHECK(send(r[0], "x", 1, 0) < 0 && errno == EPIPE); SAME(recv(r[0], b, 9, MSG_PEEK), 4);
        SAYS(to_box, dbox, "one"); SAYS(to_box2, dbox, "two"); SAYS(chain, dbox, "three"); CHECK(send(before, "x", 1, MSG_DONTWAIT) < 0 && errno == EPERM); PEER(before, in("chain"), (int)strlen(in("chain")) + 1); SAYS(self, self, "me"); SAYS(m1, m2, "there"); SAYS(m2, m1, "and back"); PEER(to_gone, away, (int)strlen(away) + 1); OWN(chain, in("chain"), (int)strlen(in("chain")) + 1);
        CRED(c1, u, g, -1);
        CRED(s1, u, g, -1);
        CRED(l1, u, g, -1);
        CRED(h[0][0], u, g, -1);
        CRED(p[0], u, g, -1);
        CRED(o1, u, g, -1);
        CRED(c6, u, g, -1);
        if (root) { CRED(o[0], 1000, 2000, 77); CRED(o[1], 1000, 2000, 77); CRED(co, 1000, 2000, 77); CRED(so, 0, 0, -1); CRED(lo, 1000, 2000, 77); SAYS(co, so, "other"); struct sockaddr_un a; socklen_t al = sizeof a; CHECK(!getsockname(lo, (void *)&a, &al)); }
        if (n % 4 == 3) { /* the backlog in its order: one that has gone, a half, a whole, and one more */
            int s = accept(lp, 0, 0); CHECK(s >= 0); SAME(read(s, b, 9), 0); close(s); s = accept(lp, 0, 0); SAME(read(s, b, 9), 0); SAYS(s, q[2], "half"); close(s); s = accept(lp, 0, 0); SAYS(s, q[3], "whole"); SAYS(q[3], s, "back"); CRED(s, u, g, -1); CRED(q[3], u, g, -1); close(s); s = accept(lp, 0, 0); PEER(o1, plain, (int)strlen(plain) + 1); close(s);
            for (int i = 0; i < 4; i++) if (i != 1) close(q[i]);
            close(o1); for (int i = 0; i < 4; i++) q[i] = reach(SOCK_STREAM, plain, strlen(plain) + 1); close(q[1]); CHECK(!shutdown(q[2], SHUT_WR)); o1 = reach(SOCK_STREAM, plain, strlen(plain) + 1); s = accept(lp, 0, 0); close(s);
            s = accept(l1, 0, 0); SAYS(s, w1, "waited"); close(s); close(w1);
            SAME(read(r[0], b, 9), 4); CHECK(read(r[0], b, 9) < 0 && errno == ECONNRESET); SAME(read(r[0], b, 9), 0); close(r[0]); CHECK(!socketpair(AF_UNIX, SOCK_STREAM, 0, r)); CHECK(write(r[0], "unread", 6) == 6); CHECK(write(r[1], "last", 4) == 4); close(r[1]);
            /* nobody can reach the unlinked listener any more: a new one, and away with its name */
            close(l1); close(c1); close(s1); CHECK(!rename(lost, in("aside"))); l1 = listening(SOCK_STREAM, lost); c1 = reach(SOCK_STREAM, lost, strlen(lost) + 1); s1 = accept(l1, 0, 0); w1 = reach(SOCK_STREAM, lost, strlen(lost) + 1); CHECK(!unlink(lost)); CHECK(!rename(in("aside"), lost));
        }
        nap(20);
    }
}
