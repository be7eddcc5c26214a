/* TCP with the outside. argv[3]: what to do, argv[4]: the port of somebody else's listening socket, or a number. */
#include "check.h"
#include <sys/wait.h>
#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <linux/filter.h>

static struct sockaddr_in to(int port) { return (struct sockaddr_in){.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK), .sin_port = htons(port)}; }
static int reach(int port, int flags) {
    int s = socket(AF_INET, SOCK_STREAM | flags, 0); struct sockaddr_in a = to(port);
    if (connect(s, (void *)&a, sizeof a) && errno != EINPROGRESS) bad("connect");
    return s;
}
static int option(int s, int level, int name) { int v = -1; socklen_t l = sizeof v; CHECK(!getsockopt(s, level, name, &v, &l)); return v; }
static int listening(int *port) {
    int s = socket(AF_INET, SOCK_STREAM, 0); struct sockaddr_in a = to(0); socklen_t l = sizeof a;
    CHECK(!bind(s, (void *)&a, l) && !listen(s, 1024) && !getsockname(s, (void *)&a, &l)); *port = ntohs(a.sin_port);
    return s;
}

static int unfit(const char *call) { dprintf(out, "repair %s\n", call); nap(20); return 1; }
static pid_t kin[4];
/* Relatives that have the connection, too, and live as long as all others do. */
static void beget(void) { for (int i = 0; i < 4; i++) if (!(kin[i] = fork())) { for (;;) { if (getppid() == 1) bad("the parent has ended"); nap(5); } } }
/* Sends back what it gets. */
static void echo(int port, int family, unsigned rate) {
    int s = reach(port, 0), on = 1; CHECK(!setsockopt(s, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on));
    if (rate) CHECK(!setsockopt(s, SOL_SOCKET, SO_MAX_PACING_RATE, &rate, sizeof rate));
    int segment = option(s, IPPROTO_TCP, TCP_MAXSEG);
    struct sock_filter all = {BPF_RET | BPF_K, 0, 0, 0xffffffff}, back[2]; struct sock_fprog prog = {1, &all}; CHECK(!setsockopt(s, SOL_SOCKET, SO_ATTACH_FILTER, &prog, sizeof prog));
    static char buf[300000]; size_t have = 0; int ended = 0; if (family) beget();
    for (uint64_t next = 0;;) {
        struct pollfd p = {s, (have < sizeof buf && !ended ? POLLIN : 0) | (have ? POLLOUT : 0), 0}; poll(&p, 1, 20);
        if (!ended && p.revents & (POLLIN | POLLHUP | POLLERR)) { ssize_t r = recv(s, buf + have, sizeof buf - have, MSG_DONTWAIT); if (r < 0 && errno == EPERM && unfit("recv")) continue; if (r < 0 && errno != EAGAIN) bad("recv"); if (r == 0) ended = 1; if (r > 0) have += r; }
        if (have) { ssize_t w = send(s, buf, have, MSG_DONTWAIT | MSG_NOSIGNAL); if (w < 0 && errno == EINVAL && unfit("send")) continue; if (w < 0 && errno != EAGAIN) bad("send"); if (w > 0) { memmove(buf, buf + w, have - w); have -= w; } }
        if (ended && !have) { dprintf(out, "end\n"); shutdown(s, SHUT_WR); for (;; tick()) nap(20); }
        for (int i = 0; family && i < 4; i++) CHECK(!kill(kin[i], 0) && !waitpid(kin[i], 0, WNOHANG));
        /* When a dumper is killed it takes a moment until all is as before. */
        socklen_t l = 2; if (option(s, IPPROTO_TCP, TCP_REPAIR) || getsockopt(s, SOL_SOCKET, SO_GET_FILTER, back, &l) || memcmp(back, &all, sizeof all) || option(s, SOL_SOCKET, SO_REUSEADDR)) nap(200);
        SAME(option(s, IPPROTO_TCP, TCP_REPAIR), 0); SAME(option(s, SOL_SOCKET, SO_REUSEADDR), 0); SAME(option(s, IPPROTO_TCP, TCP_NODELAY), 1);
        CHECK(option(s, IPPROTO_TCP, TCP_MAXSEG) >= segment);
        l = 2; CHECK(!getsockopt(s, SOL_SOCKET, SO_GET_FILTER, back, &l)); SAME(l, 1); CHECK(!memcmp(back, &all, sizeof all));
        if (now_ns(CLOCK_MONOTONIC) > next) { tick(); next = now_ns(CLOCK_MONOTONIC) + 20000000; }
    }
}
/* Waits for what comes, and says how it ends. */
static void until_reset(int port) {
    int s = reach(port, 0); char b[64];
    for (;; tick()) {
        ssize_t r = recv(s, b, sizeof b, MSG_DONTWAIT);
        if (r >= 0) dprintf(out, "got %zd\n", r); else if (errno != EAGAIN) dprintf(out, "error %d\n", errno);
        nap(20);
    }
}
/* Connects to somebody who does not answer yet. */
static void seek(int port) {
    int s = reach(port, SOCK_NONBLOCK), said = 0;
    for (;; tick()) {
        struct pollfd p = {s, POLLOUT, 0};
        if (!said && poll(&p, 1, 0) == 1) { SAME(option(s, SOL_SOCKET, SO_ERROR), 0); CHECK(p.revents == POLLOUT); CHECK(write(s, "hello", 5) == 5); dprintf(out, "connected\n"); said = 1; }
        nap(20);
    }
}
/* Never accepts what it has sent to itself. */
static void unread(void) { int port, l = listening(&port), s = reach(port, 0); CHECK(write(s, "unread", 6) == 6); CHECK(l >= 0); for (;; tick()) nap(20); }
/* Accepts after a while: a dump that waits a moment finds nothing in its way. */
static void slow(void) {
    int port, l = listening(&port); char b[8];
    for (;; tick()) { int s = reach(port, 0), c; CHECK(write(s, "soon", 4) == 4); nap(8); CHECK((c = accept(l, 0, 0)) >= 0); SAME(read(c, b, 8), 4); struct linger now = {1, 0}; CHECK(!setsockopt(s, SOL_SOCKET, SO_LINGER, &now, sizeof now)); close(s); close(c); nap(25); }
}
/* Listens, and accepts nothing. */
static void shy(void) { int port; listening(&port); dprintf(out, "port %d\n", port); for (;; tick()) nap(20); }
/* Many connections, each with a little in it. */
static void many(int n) {
    int port, l = listening(&port), (*c)[2] = calloc(n, sizeof *c); struct rlimit r = {2 * n + 100, 2 * n + 100}; char b[100];
    if (setrlimit(RLIMIT_NOFILE, &r) && getrlimit(RLIMIT_NOFILE, &r) | ((int)r.rlim_cur < 2 * n + 50)) { dprintf(out, "SKIP\n"); n = 100; }
    for (int i = 0; i < n; i++) { c[i][0] = reach(port, 0); CHECK((c[i][1] = accept(l, 0, 0)) >= 0); CHECK(write(c[i][0], &i, 4) == 4); }
    for (;; tick()) { for (int i = 0; i < n; i++) { int v = -1; SAME(read(c[i][1], &v, 4), 4); SAME(v, i); CHECK(write(c[i][1], b, 100) == 100); SAME(recv(c[i][0], b, 100, MSG_WAITALL), 100); CHECK(write(c[i][0], &i, 4) == 4); } nap(50); }
}
/* Both ends in different processes, both directions full. */
static void apart(void) {
    int port, l = listening(&port), s = reach(port, 0), c = accept(l, 0, 0); CHECK(c >= 0); pid_t child = fork(); CHECK(child >= 0);
    int end = child ? s : c; close(child ? c : s); if (!child) close(l);
    static unsigned char b[60000]; uint64_t in = 0, sent = 0, next = 0; CHECK(!fcntl(end, F_SETFL, O_RDWR | O_NONBLOCK)); int mine = child ? 1 : 2, theirs = 3 - mine;
    for (;;) {
        for (;;) { for (size_t i = 0; i < sizeof b; i++) b[i] = (unsigned char)(mix((sent + i) / 8 + mine * 7919) >> (sent + i) % 8 * 8); ssize_t w = send(end, b, sizeof b, MSG_NOSIGNAL); if (w < 0) { if (errno != EAGAIN) bad("send"); break; } sent += w; }
        ssize_t r = recv(end, b, 1 + now_ns(CLOCK_MONOTONIC) % 40000, 0); if (r < 0 && errno != EAGAIN) bad("recv"); if (r == 0) bad("end"); 
        for (ssize_t i = 0; i < r; i++) if (b[i] != (unsigned char)(mix((in + i) / 8 + theirs * 7919) >> (in + i) % 8 * 8)) bad("byte %llu is wrong", (unsigned long long)(in + i));
        if (r > 0) in += r;
        if (child && now_ns(CLOCK_MONOTONIC) > next) { static uint64_t last; static int idle; if (in > last) { last = in; idle = 0; tick(); } else CHECK(++idle < 50); next = now_ns(CLOCK_MONOTONIC) + 100000000; }
        nap(1);
    }
}
int main(int argc, char **argv) {
    begin(argc, argv); int n = argc > 4 ? atoi(argv[4]) : 0; const char *what = argc > 3 ? argv[3] : "";
    if (!strcmp(what, "echo")) echo(n, argc > 5 && !strcmp(argv[5], "family"), argc > 5 && !strcmp(argv[5], "paced") ? 20000000 : 0);
    if (!strcmp(what, "reset")) until_reset(n);
    if (!strcmp(what, "seek")) seek(n);
    if (!strcmp(what, "unread")) unread();
    if (!strcmp(what, "slow")) slow();
    if (!strcmp(what, "shy")) shy();
    if (!strcmp(what, "apart")) apart();
    if (!strcmp(what, "many")) many(n);
    bad("what?");
}
