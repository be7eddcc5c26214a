/* Established TCP connections with both ends in this process: v4, v6, mapped; full queues, halves, backlog, the dead. */
#include "check.h"
#include <arpa/inet.h>
#include <linux/filter.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/ioctl.h>
#include <linux/sockios.h>

typedef struct { int fd[2]; uint64_t out[2], in[2]; } Pair; /* counters of bytes: out[i] sent from fd[i], in[i] received at fd[i] */
static int option(int s, int level, int name) { int v = -1; socklen_t l = sizeof v; CHECK(!getsockopt(s, level, name, &v, &l)); return v; }
static void set(int s, int level, int name, int v) { CHECK(!setsockopt(s, level, name, &v, sizeof v)); }
static int state_of(int s) { struct tcp_info i; socklen_t l = sizeof i; CHECK(!getsockopt(s, IPPROTO_TCP, TCP_INFO, &i, &l)); return i.tcpi_state; }
static void wait_state(int s, int state) { for (int n = 0; n < 3000 && state_of(s) != state; n++) nap(1); SAME(state_of(s), state); }
static int events(int s) { struct pollfd p = {s, POLLIN | POLLOUT | POLLRDHUP, 0}; CHECK(poll(&p, 1, 0) >= 0); return p.revents; }
static int available(int s) { int n = -1; CHECK(!ioctl(s, SIOCINQ, &n)); return n; }
static void nonblocking(int s) { CHECK(!fcntl(s, F_SETFL, O_RDWR | O_NONBLOCK)); }
static int listening(int family, const void *a, socklen_t l) {
    int s = socket(family, SOCK_STREAM | SOCK_CLOEXEC, 0); CHECK(s >= 0);
    if (family == AF_INET6) set(s, IPPROTO_IPV6, IPV6_V6ONLY, 0);
    if (bind(s, a, l)) { close(s); return -1; }
    CHECK(!listen(s, 100)); return s;
}
static void link_up(Pair *p, int l, int family, const struct sockaddr *a, socklen_t al) {
    memset(p, 0, sizeof *p);
    CHECK((p->fd[0] = socket(family, SOCK_STREAM, 0)) >= 0); CHECK(!connect(p->fd[0], a, al)); CHECK((p->fd[1] = accept(l, 0, 0)) >= 0);
    nonblocking(p->fd[0]); nonblocking(p->fd[1]);
}
/* The stream: byte n of direction d is a function of both. */
static unsigned char at(uint64_t n, int d) { return (unsigned char)(mix(n / 8 + d * 1000003) >> n % 8 * 8); }
static size_t put(Pair *p, int from, size_t most) {
    static unsigned char buf[65536]; size_t done = 0;
    while (done < most) {
        size_t n = most - done < sizeof buf ? most - done : sizeof buf;
        for (size_t i = 0; i < n; i++) buf[i] = at(p->out[from] + i, from);
        ssize_t w = send(p->fd[from], buf, n, MSG_NOSIGNAL);
        if (w < 0) { if (errno != EAGAIN) bad("send"); break; }
        p->out[from] += w; done += w;
    }
    return done;
}
static size_t get(Pair *p, int to, size_t most) {
    static unsigned char buf[65536]; size_t done = 0;
    while (done < most) {
        ssize_t r = recv(p->fd[to], buf, most - done < sizeof buf ? most - done : sizeof buf, 0);
        if (r < 0) { if (errno != EAGAIN) bad("recv"); break; }
        if (!r) break;
        for (ssize_t i = 0; i < r; i++) if (buf[i] != at(p->in[to] + i, !to)) bad("byte %llu of direction %d is wrong", (unsigned long long)(p->in[to] + i), !to);
        p->in[to] += r; done += r;
    }
    return done;
}
/* Everything that was sent arrives. */
static void drain(Pair *p, int to) {
    for (int n = 0; p->in[to] < p->out[!to]; n++) { if (!get(p, to, SIZE_MAX)) { if (n > 30000) bad("%llu bytes are missing", (unsigned long long)(p->out[!to] - p->in[to])); nap(1); } }
    SAME(p->in[to], p->out[!to]); char c; CHECK(recv(p->fd[to], &c, 1, MSG_PEEK | MSG_DONTWAIT) <= 0);
}
static void end(int s) { char c; for (int n = 0; n < 3000; n++) { ssize_t r = recv(s, &c, 1, 0); if (r == 0) return; if (r > 0 || errno != EAGAIN) bad("end"); nap(1); } bad("no end of the stream"); }
static void done(Pair *p) { close(p->fd[0]); close(p->fd[1]); }
static void names(int s, struct sockaddr_storage *me, struct sockaddr_storage *peer) { socklen_t l = sizeof *me; memset(me, 0, sizeof *me); memset(peer, 0, sizeof *peer); CHECK(!getsockname(s, (void *)me, &l)); l = sizeof *peer; if (getpeername(s, (void *)peer, &l) && errno != ENOTCONN) bad("getpeername"); }

int main(int argc, char **argv) {
    begin(argc, argv); signal(SIGPIPE, SIG_IGN);
    struct sockaddr_in a4 = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)}; struct sockaddr_in6 a6 = {.sin6_family = AF_INET6, .sin6_addr = IN6ADDR_LOOPBACK_INIT}, any = {.sin6_family = AF_INET6}; socklen_t l;
    int l4 = listening(AF_INET, &a4, sizeof a4), l6 = listening(AF_INET6, &a6, sizeof a6), lany = listening(AF_INET6, &any, sizeof any); CHECK(l4 >= 0);
    l = sizeof a4; CHECK(!getsockname(l4, (void *)&a4, &l)); struct sockaddr *p4 = (void *)&a4, *p6 = (void *)&a6; struct sockaddr_in through = a4;
    if (l6 >= 0) { l = sizeof a6; CHECK(!getsockname(l6, (void *)&a6, &l)); }
    if (lany >= 0) { l = sizeof any; CHECK(!getsockname(lany, (void *)&any, &l)); through.sin_port = any.sin6_port; }
    int lost = listening(AF_INET, &(struct sockaddr_in){.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)}, sizeof a4); struct sockaddr_in alost; l = sizeof alost; CHECK(!getsockname(lost, (void *)&alost, &l));

    Pair chat, big, six, mapped, old; link_up(&chat, l4, AF_INET, p4, sizeof a4); link_up(&big, l4, AF_INET, p4, sizeof a4);
    if (l6 >= 0) link_up(&six, l6, AF_INET6, p6, sizeof a6);
    if (lany >= 0) link_up(&mapped, lany, AF_INET, (void *)&through, sizeof through);
    link_up(&old, lost, AF_INET, (void *)&alost, sizeof alost); close(lost); /* nobody listens there any more */
    while (put(&big, 0, 1 << 20)) {} while (put(&big, 1, 1 << 20)) {} nap(100); put(&big, 0, SIZE_MAX); put(&big, 1, SIZE_MAX);
    int sent = 0; CHECK(!ioctl(big.fd[0], SIOCOUTQ, &sent)); CHECK(sent > 100000); /* more than fits */
    set(chat.fd[0], IPPROTO_TCP, TCP_NODELAY, 1); set(chat.fd[0], SOL_SOCKET, SO_KEEPALIVE, 1); set(chat.fd[0], IPPROTO_TCP, TCP_KEEPIDLE, 99); set(chat.fd[1], IPPROTO_TCP, TCP_USER_TIMEOUT, 54321); set(chat.fd[1], IPPROTO_IP, IP_TOS, 0x10); set(chat.fd[0], SOL_SOCKET, SO_RCVBUF, 70000); set(chat.fd[1], SOL_SOCKET, SO_SNDBUF, 90000); set(chat.fd[1], SOL_SOCKET, SO_RCVLOWAT, 1);
    struct linger lg = {1, 7}; CHECK(!setsockopt(chat.fd[1], SOL_SOCKET, SO_LINGER, &lg, sizeof lg)); char cc[16] = "reno"; CHECK(!setsockopt(chat.fd[0], IPPROTO_TCP, TCP_CONGESTION, cc, 5));
    struct sock_filter code[] = {{BPF_LD | BPF_IMM, 0, 0, 7}, {BPF_RET | BPF_K, 0, 0, 0xffffffff}}, back[4]; struct sock_fprog prog = {2, code}; CHECK(!setsockopt(old.fd[0], SOL_SOCKET, SO_ATTACH_FILTER, &prog, sizeof prog)); set(old.fd[0], SOL_SOCKET, SO_LOCK_FILTER, 1);
    int rcv = option(chat.fd[0], SOL_SOCKET, SO_RCVBUF), snd = option(chat.fd[1], SOL_SOCKET, SO_SNDBUF), reuse = option(chat.fd[0], SOL_SOCKET, SO_REUSEADDR); set(chat.fd[1], SOL_SOCKET, SO_REUSEADDR, 1);

    Pair half, back_half, stuck, gone, both; link_up(&half, l4, AF_INET, p4, sizeof a4); put(&half, 0, 5000); put(&half, 1, 600); CHECK(!shutdown(half.fd[0], SHUT_WR)); wait_state(half.fd[0], TCP_FIN_WAIT2); SAME(state_of(half.fd[1]), TCP_CLOSE_WAIT);
    link_up(&back_half, l4, AF_INET, p4, sizeof a4); put(&back_half, 1, 70000); CHECK(!shutdown(back_half.fd[1], SHUT_WR)); wait_state(back_half.fd[0], TCP_CLOSE_WAIT);
    link_up(&stuck, l4, AF_INET, p4, sizeof a4); set(stuck.fd[1], SOL_SOCKET, SO_RCVBUF, 20000); while (put(&stuck, 0, 1 << 20)) {} nap(50); CHECK(!shutdown(stuck.fd[0], SHUT_WR)); SAME(state_of(stuck.fd[0]), TCP_FIN_WAIT1); CHECK(!shutdown(stuck.fd[1], SHUT_WR)); wait_state(stuck.fd[0], TCP_CLOSING == 11 ? state_of(stuck.fd[0]) : 0);
    link_up(&gone, l4, AF_INET, p4, sizeof a4); put(&gone, 1, 30000); wait_state(gone.fd[1], TCP_ESTABLISHED); while (available(gone.fd[0]) < 30000) nap(1); close(gone.fd[1]); wait_state(gone.fd[0], TCP_CLOSE_WAIT);
    link_up(&both, l4, AF_INET, p4, sizeof a4); put(&both, 0, 1234); put(&both, 1, 432); while (available(both.fd[0]) < 432 || available(both.fd[1]) < 1234) nap(1); shutdown(both.fd[0], SHUT_WR); shutdown(both.fd[1], SHUT_WR); wait_state(both.fd[1], TCP_CLOSE);
    int reset; { Pair r; link_up(&r, l4, AF_INET, p4, sizeof a4); put(&r, 1, 77); while (available(r.fd[0]) < 77) nap(1); struct linger now = {1, 0}; CHECK(!setsockopt(r.fd[1], SOL_SOCKET, SO_LINGER, &now, sizeof now)); close(r.fd[1]); reset = r.fd[0]; wait_state(reset, TCP_CLOSE); }
    int deaf; Pair deafp; link_up(&deafp, l4, AF_INET, p4, sizeof a4); deaf = deafp.fd[0]; shutdown(deaf, SHUT_RD);
    int waiting[3]; for (int i = 0; i < 3; i++) { CHECK((waiting[i] = socket(AF_INET, SOCK_STREAM, 0)) >= 0); CHECK(!connect(waiting[i], p4, sizeof a4)); } shutdown(waiting[1], SHUT_WR); close(waiting[2]); struct sockaddr_storage wn[2], wp; names(waiting[0], &wn[0], &wp); names(waiting[1], &wn[1], &wp);
    int self = socket(AF_INET, SOCK_STREAM, 0); { struct sockaddr_in s = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)}; CHECK(!bind(self, (void *)&s, sizeof s)); l = sizeof s; CHECK(!getsockname(self, (void *)&s, &l)); CHECK(!connect(self, (void *)&s, sizeof s)); CHECK(write(self, "to myself", 9) == 9); }
    Pair *named[] = {&chat, &big, &old, &half, &back_half, &stuck}; struct sockaddr_storage me[6][2], peer[6][2]; for (int i = 0; i < 6; i++) for (int k = 0; k < 2; k++) names(named[i]->fd[k], &me[i][k], &peer[i][k]);
    int rounds = argc > 3 ? atoi(argv[3]) : 1 << 30; uint64_t last = now_ns(CLOCK_MONOTONIC);
    for (int n = 0;; n++, tick()) {
        struct sockaddr_storage m, p;
        for (int i = 0; i < 6; i++) for (int k = 0; k < 2; k++) { names(named[i]->fd[k], &m, &p); CHECK(!memcmp(&m, &me[i][k], sizeof m)); if (i != 5) CHECK(!memcmp(&p, &peer[i][k], sizeof p)); }
        /* a little talk; what is under way when the dump comes is any part of it */
        for (int k = 0; k < 2; k++) { put(&chat, k, 100 + n % 4000); if (l6 >= 0) put(&six, k, 3000); if (lany >= 0) put(&mapped, k, 1 + n % 20000); put(&old, k, 10); }
        if (n % 3) for (int k = 0; k < 2; k++) { drain(&chat, k); if (l6 >= 0) drain(&six, k); if (lany >= 0) drain(&mapped, k); drain(&old, k); }
        /* a full connection, moving a little, and all of it now and then */
        if (n % 10 == 9) { for (int k = 0; k < 2; k++) drain(&big, k); for (int k = 0; k < 2; k++) while (put(&big, k, 1 << 20)) {} }
        else for (int k = 0; k < 2; k++) { get(&big, k, 20000); put(&big, k, 30000); }
        SAME(option(chat.fd[0], IPPROTO_TCP, TCP_NODELAY), 1); SAME(option(chat.fd[0], SOL_SOCKET, SO_KEEPALIVE), 1); SAME(option(chat.fd[0], IPPROTO_TCP, TCP_KEEPIDLE), 99); SAME(option(chat.fd[1], IPPROTO_TCP, TCP_USER_TIMEOUT), 54321); SAME(option(chat.fd[1], IPPROTO_IP, IP_TOS), 0x10); if (option(chat.fd[0], SOL_SOCKET, SO_RCVBUF) != rcv || option(chat.fd[0], SOL_SOCKET, SO_REUSEADDR) != reuse || option(chat.fd[1], SOL_SOCKET, SO_REUSEADDR) != 1) nap(200); /* a dumper was killed just now */ SAME(option(chat.fd[0], SOL_SOCKET, SO_RCVBUF), rcv); SAME(option(chat.fd[1], SOL_SOCKET, SO_SNDBUF), snd);
        SAME(option(chat.fd[0], SOL_SOCKET, SO_REUSEADDR), reuse); SAME(option(chat.fd[1], SOL_SOCKET, SO_REUSEADDR), 1); SAME(option(chat.fd[0], SOL_SOCKET, 72), 2); SAME(option(chat.fd[1], SOL_SOCKET, 72), 1); SAME(option(old.fd[0], SOL_SOCKET, 72), 0);
        SAME(option(big.fd[0], SOL_SOCKET, SO_REUSEADDR), 0); SAME(option(big.fd[0], IPPROTO_TCP, TCP_REPAIR), 0);
        memset(&lg, 0, sizeof lg); l = sizeof lg; CHECK(!getsockopt(chat.fd[1], SOL_SOCKET, SO_LINGER, &lg, &l)); SAME(lg.l_linger, 7); l = sizeof cc; CHECK(!getsockopt(chat.fd[0], IPPROTO_TCP, TCP_CONGESTION, cc, &l)); CHECK(!strcmp(cc, "reno"));
        l = 4; CHECK(!getsockopt(old.fd[0], SOL_SOCKET, SO_GET_FILTER, back, &l)); SAME(l, 2); CHECK(!memcmp(back, code, sizeof code)); SAME(option(old.fd[0], SOL_SOCKET, SO_LOCK_FILTER), 1); l = 0; CHECK(!getsockopt(chat.fd[0], SOL_SOCKET, SO_GET_FILTER, 0, &l)); SAME(l, 0);
        /* halves */
        wait_state(half.fd[0], TCP_FIN_WAIT2); /* the acknowledgement of a FIN may take 40 ms */ SAME(state_of(half.fd[1]), TCP_CLOSE_WAIT); CHECK(send(half.fd[0], "x", 1, MSG_NOSIGNAL) < 0 && errno == EPIPE); put(&half, 1, 10);
        SAME(state_of(back_half.fd[0]), TCP_CLOSE_WAIT); put(&back_half, 0, 5); SAME(state_of(gone.fd[0]), TCP_CLOSE_WAIT); SAME(state_of(both.fd[0]), TCP_CLOSE); SAME(state_of(reset), TCP_CLOSE); CHECK(events(reset) & POLLERR); CHECK(!(events(both.fd[0]) & POLLERR)); CHECK(events(deaf) & POLLRDHUP); CHECK(!(events(deaf) & POLLHUP));
        CHECK(events(both.fd[0]) & POLLRDHUP);
        if (n % 12 == 11) {
            drain(&half, 1); end(half.fd[1]); drain(&half, 0); SAME(state_of(half.fd[0]), TCP_FIN_WAIT2); drain(&back_half, 0); end(back_half.fd[0]); drain(&back_half, 1);
            drain(&stuck, 1); end(stuck.fd[1]); end(stuck.fd[0]); drain(&gone, 0); end(gone.fd[0]); drain(&both, 0); drain(&both, 1); end(both.fd[0]); end(both.fd[1]); CHECK(send(both.fd[0], "x", 1, MSG_NOSIGNAL) < 0 && errno == EPIPE);
            char b[100]; SAME(recv(reset, b, 100, 0), 77); CHECK(recv(reset, b, 100, 0) < 0 && errno == ECONNRESET); SAME(recv(reset, b, 100, 0), 0);
            SAME(recv(deaf, b, 1, 0), 0); CHECK(write(deaf, "y", 1) == 1); nap(1); SAME(recv(deafp.fd[1], b, 9, 0), 1);
            SAME(read(self, b, 100), 9); CHECK(!memcmp(b, "to myself", 9)); CHECK(write(self, "to myself", 9) == 9);
            int accepted = 0, ended = 0; for (int i = 0; i < 3; i++) { int s = accept(l4, (void *)&m, (l = sizeof m, &l)); CHECK(s >= 0); for (int k = 0; k < 2; k++) if (((struct sockaddr_in *)&m)->sin_port == ((struct sockaddr_in *)&wn[k])->sin_port) { accepted++; CHECK(write(s, "ok", 2) == 2); SAME(recv(waiting[k], b, 9, 0), 2); } nonblocking(s); ssize_t r = recv(s, b, 9, 0); if (r == 0) ended++; else if (errno != EAGAIN) bad("recv"); close(s); }
            SAME(accepted, 2); SAME(ended, 2); CHECK(events(l4) == 0);
            done(&half); done(&back_half); done(&stuck); close(gone.fd[0]); done(&both); close(reset); done(&deafp); close(waiting[0]); close(waiting[1]);
            link_up(&half, l4, AF_INET, p4, sizeof a4); put(&half, 0, 5000); put(&half, 1, 600); CHECK(!shutdown(half.fd[0], SHUT_WR)); wait_state(half.fd[0], TCP_FIN_WAIT2);
            link_up(&back_half, l4, AF_INET, p4, sizeof a4); put(&back_half, 1, 70000); CHECK(!shutdown(back_half.fd[1], SHUT_WR)); wait_state(back_half.fd[0], TCP_CLOSE_WAIT);
            link_up(&stuck, l4, AF_INET, p4, sizeof a4); set(stuck.fd[1], SOL_SOCKET, SO_RCVBUF, 20000); while (put(&stuck, 0, 1 << 20)) {} nap(50); CHECK(!shutdown(stuck.fd[0], SHUT_WR)); CHECK(!shutdown(stuck.fd[1], SHUT_WR));
            link_up(&gone, l4, AF_INET, p4, sizeof a4); put(&gone, 1, 30000); while (available(gone.fd[0]) < 30000) nap(1); close(gone.fd[1]); wait_state(gone.fd[0], TCP_CLOSE_WAIT);
            link_up(&both, l4, AF_INET, p4, sizeof a4); put(&both, 0, 1234); put(&both, 1, 432); while (available(both.fd[0]) < 432 || available(both.fd[1]) < 1234) nap(1); shutdown(both.fd[0], SHUT_WR); shutdown(both.fd[1], SHUT_WR); wait_state(both.fd[1], TCP_CLOSE);
            Pair r; link_up(&r, l4, AF_INET, p4, sizeof a4); put(&r, 1, 77); while (available(r.fd[0]) < 77) nap(1); struct linger now = {1, 0}; CHECK(!setsockopt(r.fd[1], SOL_SOCKET, SO_LINGER, &now, sizeof now)); close(r.fd[1]); reset = r.fd[0]; wait_state(reset, TCP_CLOSE);
            link_up(&deafp, l4, AF_INET, p4, sizeof a4); deaf = deafp.fd[0]; shutdown(deaf, SHUT_RD);
            for (int i = 0; i < 3; i++) { CHECK((waiting[i] = socket(AF_INET, SOCK_STREAM, 0)) >= 0); CHECK(!connect(waiting[i], p4, sizeof a4)); } shutdown(waiting[1], SHUT_WR); close(waiting[2]); names(waiting[0], &wn[0], &wp); names(waiting[1], &wn[1], &wp);
            for (int i = 0; i < 6; i++) for (int k = 0; k < 2; k++) names(named[i]->fd[k], &me[i][k], &peer[i][k]);
        }
        if (n >= rounds) return 0;
        last = now_ns(CLOCK_MONOTONIC); (void)last;
        nap(20);
    }
}
