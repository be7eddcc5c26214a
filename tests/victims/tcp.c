/* Listening TCP sockets, v4 and v6, with their options; bound and fresh ones. */
#include "check.h"
#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
static int option(int s, int level, int name) { int v = -1; socklen_t l = sizeof v; CHECK(!getsockopt(s, level, name, &v, &l)); return v; }
static void set(int s, int level, int name, int v) { CHECK(!setsockopt(s, level, name, &v, sizeof v)); }
static int port_of(int s) { struct sockaddr_storage a; socklen_t l = sizeof a; CHECK(!getsockname(s, (void *)&a, &l)); return ntohs(a.ss_family == AF_INET ? ((struct sockaddr_in *)&a)->sin_port : ((struct sockaddr_in6 *)&a)->sin6_port); }
int main(int argc, char **argv) {
    begin(argc, argv);
    int v4 = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0); set(v4, SOL_SOCKET, SO_REUSEADDR, 1); set(v4, SOL_SOCKET, SO_KEEPALIVE, 1); set(v4, IPPROTO_TCP, TCP_NODELAY, 1); set(v4, IPPROTO_TCP, TCP_DEFER_ACCEPT, 0); set(v4, SOL_SOCKET, SO_RCVBUF, 50000); set(v4, IPPROTO_TCP, TCP_KEEPIDLE, 77);
    struct sockaddr_in a = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK), .sin_port = htons(argc > 3 ? atoi(argv[3]) : 0)}; CHECK(!bind(v4, (void *)&a, sizeof a)); CHECK(!listen(v4, 17)); int p4 = port_of(v4), rcv = option(v4, SOL_SOCKET, SO_RCVBUF);
    int v6 = socket(AF_INET6, SOCK_STREAM, 0), p6 = 0; struct sockaddr_in6 b = {.sin6_family = AF_INET6, .sin6_addr = IN6ADDR_LOOPBACK_INIT};
    if (v6 >= 0) { set(v6, IPPROTO_IPV6, IPV6_V6ONLY, 1); if (bind(v6, (void *)&b, sizeof b)) { close(v6); v6 = -1; } else { CHECK(!listen(v6, 5)); p6 = port_of(v6); b.sin6_port = htons(p6); } }
    int any = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0); struct sockaddr_in c = {.sin_family = AF_INET}; set(any, SOL_SOCKET, SO_REUSEPORT, 1); CHECK(!bind(any, (void *)&c, sizeof c)); CHECK(!listen(any, 3)); int pa = port_of(any);
    int bound = socket(AF_INET, SOCK_STREAM, 0); c.sin_port = 0; CHECK(!bind(bound, (void *)&c, sizeof c)); int pb = port_of(bound); int fresh = socket(AF_INET, SOCK_STREAM, 0); set(fresh, IPPROTO_TCP, TCP_NODELAY, 1);
    a.sin_port = htons(p4);
    dprintf(out, "port %d\n", p4);
    for (;; tick()) {
        SAME(port_of(v4), p4); SAME(port_of(any), pa); SAME(port_of(bound), pb); SAME(option(v4, SOL_SOCKET, SO_ACCEPTCONN), 1); SAME(option(bound, SOL_SOCKET, SO_ACCEPTCONN), 0);
        SAME(option(v4, SOL_SOCKET, SO_REUSEADDR), 1); SAME(option(v4, SOL_SOCKET, SO_KEEPALIVE), 1); SAME(option(v4, IPPROTO_TCP, TCP_NODELAY), 1); SAME(option(v4, SOL_SOCKET, SO_RCVBUF), rcv); SAME(option(v4, IPPROTO_TCP, TCP_KEEPIDLE), 77); SAME(option(any, SOL_SOCKET, SO_REUSEPORT), 1); SAME(option(fresh, IPPROTO_TCP, TCP_NODELAY), 1);
        int s = socket(AF_INET, SOCK_STREAM, 0), t; struct linger now = {1, 0}; CHECK(!setsockopt(s, SOL_SOCKET, SO_LINGER, &now, sizeof now)); CHECK(!connect(s, (void *)&a, sizeof a)); t = accept(v4, 0, 0); CHECK(t >= 0); CHECK(write(s, "x", 1) == 1); char x; CHECK(read(t, &x, 1) == 1); CHECK(!setsockopt(t, SOL_SOCKET, SO_LINGER, &now, sizeof now)); close(s); close(t);
        if (v6 >= 0) { SAME(port_of(v6), p6); SAME(option(v6, IPPROTO_IPV6, IPV6_V6ONLY), 1); s = socket(AF_INET6, SOCK_STREAM, 0); CHECK(!setsockopt(s, SOL_SOCKET, SO_LINGER, &now, sizeof now)); CHECK(!connect(s, (void *)&b, sizeof b)); t = accept(v6, 0, 0); CHECK(t >= 0); close(s); close(t); }
        CHECK(accept(any, 0, 0) < 0 && errno == EAGAIN); 
        nap(50); /* dumps between two connections: an open one is refused so far */
    }
}
