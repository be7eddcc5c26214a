/* udp(7): bound, connected, grouped, with options, groups and filters; datagrams of all sorts waiting in them. */
#include "check.h"
#include <arpa/inet.h>
#include <linux/filter.h>
#include <netinet/in.h>
#include <netinet/udp.h>
#include <net/if.h>
typedef struct sockaddr_in In; typedef struct sockaddr_in6 In6;
static int option(int s, int level, int name) { int v = -1; socklen_t l = sizeof v; CHECK(!getsockopt(s, level, name, &v, &l)); return v; }
static void set(int s, int level, int name, int v) { errno = 0; if (setsockopt(s, level, name, &v, sizeof v)) bad("option %d/%d", level, name); }
static In in(const char *ip, int port) { In a = {.sin_family = AF_INET, .sin_port = htons(port)}; CHECK(inet_pton(AF_INET, ip, &a.sin_addr) == 1); return a; }
static In6 in6(const char *ip, int port) { In6 a = {.sin6_family = AF_INET6, .sin6_port = htons(port)}; CHECK(inet_pton(AF_INET6, ip, &a.sin6_addr) == 1); return a; }
static int port_of(int s) { struct sockaddr_storage a; socklen_t l = sizeof a; CHECK(!getsockname(s, (void *)&a, &l)); return ntohs(((In *)&a)->sin_port); }
static int udp(int family, const char *ip, int port, int reuse) { int s = socket(family, SOCK_DGRAM | SOCK_NONBLOCK, 0); if (s < 0) return s; if (reuse) set(s, SOL_SOCKET, SO_REUSEPORT, 1); if (family == AF_INET) { In a = in(ip, port); CHECK(!bind(s, (void *)&a, sizeof a)); } else { In6 a = in6(ip, port); if (bind(s, (void *)&a, sizeof a)) { close(s); return -1; } } return s; }
static void to(int from, int target, const void *data, int n) { In a = in("127.0.0.1", port_of(target)); SAME(sendto(from, data, n, 0, (void *)&a, sizeof a), n); }
/* Receives one and looks at its sender. */
static int got(int s, char *buf, int size, int port) { In a; socklen_t l = sizeof a; errno = 0; int n = recvfrom(s, buf, size, 0, (void *)&a, &l); if (n < 0) return -1; SAME(ntohs(a.sin_port), port); SAME(a.sin_addr.s_addr, htonl(INADDR_LOOPBACK)); return n; }
static int on_ = 1;
int main(int argc, char **argv) {
    begin(argc, argv);
    static char buf[70000], big[60000]; fill(big, sizeof big, 7);
    int from = udp(AF_INET, "127.0.0.1", 0, 0), pf = port_of(from);
    int plain = udp(AF_INET, "127.0.0.1", 0, 0), pp = port_of(plain), any = udp(AF_INET, "0.0.0.0", 0, 0), pa = port_of(any), fresh = socket(AF_INET, SOCK_DGRAM, 0);
    dprintf(out, "port %d\n", pp);
    set(fresh, IPPROTO_IP, IP_TTL, 33); set(fresh, SOL_SOCKET, SO_BROADCAST, 1); set(fresh, SOL_SOCKET, SO_PRIORITY, 3);
    int settings[][3] = {{SOL_SOCKET, SO_RCVBUF, 77000}, {SOL_SOCKET, SO_MARK, 42}, {SOL_SOCKET, SO_RXQ_OVFL, 1}, {SOL_SOCKET, SO_TIMESTAMPNS, 1}, {IPPROTO_IP, IP_PKTINFO, 1}, {IPPROTO_IP, IP_RECVTTL, 1}, {IPPROTO_IP, IP_RECVTOS, 1}, {IPPROTO_IP, IP_RECVERR, 1}, {IPPROTO_IP, IP_TOS, 0x10}, {IPPROTO_IP, IP_MULTICAST_TTL, 9}, {IPPROTO_IP, IP_MULTICAST_LOOP, 0}, {IPPROTO_IP, IP_MULTICAST_ALL, 0}, {IPPROTO_IP, IP_TRANSPARENT, 1}, {IPPROTO_IP, IP_FREEBIND, 1}, {IPPROTO_IP, IP_MTU_DISCOVER, IP_PMTUDISC_DO}, {IPPROTO_IP, IP_MINTTL, 2}, {IPPROTO_IP, IP_RECVORIGDSTADDR, 1}, {IPPROTO_UDP, UDP_SEGMENT, 1200}, {IPPROTO_UDP, UDP_GRO, 1}, {IPPROTO_UDP, UDP_CORK, 1}, {IPPROTO_IP, IP_UNICAST_IF, 0}};
    enum { SETTINGS = sizeof settings / sizeof *settings }; settings[SETTINGS - 1][2] = htonl(if_nametoindex("lo"));
    int tuned = udp(AF_INET, "127.0.0.1", 0, 0), pt = port_of(tuned), was[SETTINGS]; for (int i = 0; i < SETTINGS; i++) { set(tuned, settings[i][0], settings[i][1], settings[i][2]); was[i] = option(tuned, settings[i][0], settings[i][1]); }
    CHECK(!setsockopt(tuned, SOL_SOCKET, SO_BINDTODEVICE, "lo", 3)); int stamps = 0x58; CHECK(!setsockopt(tuned, SOL_SOCKET, SO_TIMESTAMPING, &stamps, sizeof stamps)); stamps = option(tuned, SOL_SOCKET, SO_TIMESTAMPING);
    /* told where it was sent to, and with what */
    int told = udp(AF_INET, "0.0.0.0", 0, 0); set(told, IPPROTO_IP, IP_PKTINFO, 1); set(told, IPPROTO_IP, IP_RECVTTL, 1); set(told, IPPROTO_IP, IP_RECVTOS, 1);
    set(from, IPPROTO_IP, IP_TTL, 17); set(from, IPPROTO_IP, IP_TOS, 0x20);
    /* connected to one another, and one to a peer that is gone */
    int a = udp(AF_INET, "127.0.0.1", 0, 0), b = udp(AF_INET, "127.0.0.1", 0, 0); In ia = in("127.0.0.1", port_of(a)), ib = in("127.0.0.1", port_of(b)); CHECK(!connect(a, (void *)&ib, sizeof ib)); CHECK(!connect(b, (void *)&ia, sizeof ia));
    int roamer = socket(AF_INET, SOCK_DGRAM | SOCK_NONBLOCK, 0); In ip = in("127.0.0.1", pp); CHECK(!connect(roamer, (void *)&ip, sizeof ip)); int pr = port_of(roamer);
    /* a group of three on one port, and one connected by the same port */
    int group[3]; group[0] = udp(AF_INET, "127.0.0.1", 0, 0); int pg = port_of(group[0]); close(group[0]); group[0] = udp(AF_INET, "127.0.0.1", pg, 1); group[1] = udp(AF_INET, "127.0.0.1", pg, 1); group[2] = udp(AF_INET, "127.0.0.1", pg, 1); int counts[3] = {0};
    for (int i = 0; i < 30; i++) { int s = udp(AF_INET, "127.0.0.1", 0, 0); to(s, group[0], "member", 6); close(s); }
    for (int i = 0; i < 3; i++) { while (recv(group[i], buf, 99, 0) == 6) counts[i]++; } CHECK(counts[0] + counts[1] + counts[2] == 30);
    /* multicast on lo, and with senders named */
    In mb = in("224.0.0.251", 0); int mc = socket(AF_INET, SOCK_DGRAM | SOCK_NONBLOCK, 0); CHECK(!bind(mc, (void *)&mb, sizeof mb)); int pm = port_of(mc); struct ip_mreqn mr = {.imr_multiaddr = mb.sin_addr, .imr_ifindex = if_nametoindex("lo")}; int has_mc = !setsockopt(mc, IPPROTO_IP, IP_ADD_MEMBERSHIP, &mr, sizeof mr);
    struct group_source_req gs = {.gsr_interface = if_nametoindex("lo")}; In g2 = in("239.1.2.3", 0), s1 = in("127.0.0.1", 0); memcpy(&gs.gsr_group, &g2, sizeof g2); memcpy(&gs.gsr_source, &s1, sizeof s1); if (has_mc) CHECK(!setsockopt(mc, IPPROTO_IP, MCAST_JOIN_SOURCE_GROUP, &gs, sizeof gs));
    /* a filter that lets through only what begins with 'y', and is locked */
    struct sock_filter code[] = {{BPF_LD | BPF_B | BPF_ABS, 0, 0, 8}, {BPF_JMP | BPF_JEQ | BPF_K, 0, 1, 'y'}, {BPF_RET | BPF_K, 0, 0, 0xffff}, {BPF_RET | BPF_K, 0, 0, 0}}; struct sock_fprog prog = {4, code};
    int picky = udp(AF_INET, "127.0.0.1", 0, 0); CHECK(!setsockopt(picky, SOL_SOCKET, SO_ATTACH_FILTER, &prog, sizeof prog)); set(picky, SOL_SOCKET, SO_LOCK_FILTER, 1);
    /* IPv6, alone and with IPv4 inside */
    int v6 = udp(AF_INET6, "::1", 0, 0), dual = udp(AF_INET6, "::", 0, 0), only = socket(AF_INET6, SOCK_DGRAM, 0), p6 = 0, pd = 0; if (v6 >= 0 && dual >= 0) { p6 = port_of(v6); pd = port_of(dual); set(only, IPPROTO_IPV6, IPV6_V6ONLY, 1); In6 o = in6("::", 0); CHECK(!bind(only, (void *)&o, sizeof o)); set(v6, IPPROTO_IPV6, IPV6_RECVPKTINFO, 1); set(v6, IPPROTO_IPV6, IPV6_TCLASS, 0x28); set(v6, IPPROTO_IPV6, IPV6_UNICAST_HOPS, 5); set(v6, IPPROTO_IPV6, IPV6_MULTICAST_IF, if_nametoindex("lo")); } else v6 = -1;
    struct ipv6_mreq m6 = {.ipv6mr_interface = if_nametoindex("lo")}; if (v6 >= 0) { inet_pton(AF_INET6, "ff12::77", &m6.ipv6mr_multiaddr); CHECK(!setsockopt(v6, IPPROTO_IPV6, IPV6_JOIN_GROUP, &m6, sizeof m6)); }
    int peeking = udp(AF_INET, "127.0.0.1", 0, 0); to(from, peeking, "first", 5); to(from, peeking, "second", 6); set(peeking, SOL_SOCKET, SO_PEEK_OFF, 5);
    int shut = udp(AF_INET, "127.0.0.1", 0, 0); CHECK(!connect(shut, (void *)&ip, sizeof ip)); CHECK(!shutdown(shut, SHUT_RD));
    int lite = socket(AF_INET, SOCK_DGRAM | SOCK_NONBLOCK, 136), pl = 0; if (lite >= 0) { In la = in("127.0.0.1", 0); CHECK(!bind(lite, (void *)&la, sizeof la)); pl = port_of(lite); set(lite, 136, 10, 12); set(lite, 136, 11, 8); }
    int foreign = -1, hops = 0; { int raw = socket(AF_INET, SOCK_RAW, IPPROTO_RAW); foreign = udp(AF_INET, "127.0.0.1", 0, 0); unsigned char p[33] = {0x45, 0, 0, 33, 0, 0, 0, 0, 9, 17, 0, 0, 192, 0, 2, 7, 127, 0, 0, 1, 0, 53, 0, 0, 0, 13}; p[22] = port_of(foreign) >> 8; p[23] = port_of(foreign) & 255; memcpy(p + 28, "alien", 5); In lo = in("127.0.0.1", 0); CHECK(raw >= 0); SAME(sendto(raw, p, 33, 0, (void *)&lo, sizeof lo), 33); close(raw); }
    for (int round = 0;; round++, tick()) {
        /* everything that waits across dumps is sent at the end of a round, and read at the begin of the next */
        if (round) {
            SAME(got(plain, buf, sizeof buf, pf), 3); CHECK(!memcmp(buf, "one", 3)); SAME(got(plain, buf, sizeof buf, pf), 0); SAME(got(plain, buf, sizeof buf, pf), 5); CHECK(!memcmp(buf, "three", 5)); SAME(got(plain, buf, sizeof buf, pf), sizeof big); CHECK(same(buf, sizeof big, 7)); SAME(got(plain, buf, sizeof buf, pr), 6); SAME(got(plain, buf, sizeof buf, pf), -1);
            SAME(got(any, buf, sizeof buf, pf), 3); SAME(got(any, buf, sizeof buf, pf), -1); SAME(got(b, buf, sizeof buf, ntohs(ia.sin_port)), 7); SAME(got(a, buf, sizeof buf, ntohs(ib.sin_port)), 5); SAME(got(a, buf, sizeof buf, 0), -1); SAME(got(picky, buf, sizeof buf, pf), 3); SAME(got(picky, buf, sizeof buf, pf), -1);
            for (int i = 0; i < 3; i++) { int n = 0; while (got(group[i], buf, sizeof buf, pf) == i + 1) n++; SAME(n, group[i] >= 0 ? 2 : 0); }
            if (lite >= 0) { SAME(got(lite, buf, 99, pl), 4); CHECK(!memcmp(buf, "lite", 4)); SAME(got(lite, buf, 99, pl), 0 - 1); SAME(port_of(lite), pl); SAME(option(lite, 136, 10), 12); SAME(option(lite, 136, 11), 8); }
            char control[512]; struct iovec iov = {buf, sizeof buf}; struct msghdr m = {.msg_iov = &iov, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control}; SAME(recvmsg(told, &m, 0), 4); int seen = 0;
            for (struct cmsghdr *c = CMSG_FIRSTHDR(&m); c; c = CMSG_NXTHDR(&m, c)) { if (c->cmsg_type == IP_PKTINFO) { SAME(((struct in_pktinfo *)CMSG_DATA(c))->ipi_addr.s_addr, htonl(INADDR_LOOPBACK + 1)); seen |= 1; } if (c->cmsg_type == IP_TTL) { SAME(*(int *)CMSG_DATA(c), 17); seen |= 2; } if (c->cmsg_type == IP_TOS) { SAME(*CMSG_DATA(c), 0x20); seen |= 4; } } SAME(seen, 7);
            if (v6 >= 0) { In6 s; socklen_t l = sizeof s; SAME(recvfrom(v6, buf, 99, 0, (void *)&s, &l), 3); SAME(ntohs(s.sin6_port), p6); CHECK(IN6_IS_ADDR_LOOPBACK(&s.sin6_addr)); l = sizeof s; SAME(recvfrom(dual, buf, 99, 0, (void *)&s, &l), 4); CHECK(IN6_IS_ADDR_V4MAPPED(&s.sin6_addr)); SAME(ntohs(s.sin6_port), pf); l = sizeof s; SAME(recvfrom(dual, buf, 99, 0, (void *)&s, &l), 2); CHECK(IN6_IS_ADDR_LOOPBACK(&s.sin6_addr)); }
        }
        SAME(port_of(plain), pp); SAME(port_of(any), pa); SAME(port_of(tuned), pt); SAME(port_of(roamer), pr); SAME(port_of(fresh), 0); SAME(option(fresh, IPPROTO_IP, IP_TTL), 33); SAME(option(fresh, SOL_SOCKET, SO_BROADCAST), 1); SAME(option(fresh, SOL_SOCKET, SO_PRIORITY), 3);
        for (int i = 0; i < SETTINGS; i++) if (option(tuned, settings[i][0], settings[i][1]) != was[i]) bad("option %d/%d is %d, not %d", settings[i][0], settings[i][1], option(tuned, settings[i][0], settings[i][1]), was[i]);
        char name[16] = ""; socklen_t l = sizeof name; CHECK(!getsockopt(tuned, SOL_SOCKET, SO_BINDTODEVICE, name, &l)); CHECK(!strcmp(name, "lo")); SAME(option(tuned, SOL_SOCKET, SO_TIMESTAMPING), stamps); SAME(option(plain, SOL_SOCKET, SO_RCVBUF), option(fresh, SOL_SOCKET, SO_RCVBUF)); SAME(option(picky, SOL_SOCKET, SO_LOCK_FILTER), 1); CHECK(setsockopt(picky, SOL_SOCKET, SO_DETACH_FILTER, &on_, sizeof on_) && errno == EPERM);
        /* a dumper that was killed may put it back a moment later */
        for (int i = 0; i < 20 && (option(plain, SOL_SOCKET, SO_PEEK_OFF) != -1 || option(peeking, SOL_SOCKET, SO_PEEK_OFF) != 5); i++) nap(10);
        SAME(option(plain, SOL_SOCKET, SO_PEEK_OFF), -1);
        if (round % 5 == 4) { /* what was not read for long */
            SAME(option(peeking, SOL_SOCKET, SO_PEEK_OFF), 5); SAME(recv(peeking, buf, 99, MSG_PEEK), 6); CHECK(!memcmp(buf, "second", 6)); set(peeking, SOL_SOCKET, SO_PEEK_OFF, 5);
            In s; l = sizeof s; SAME(recvfrom(foreign, buf, 99, MSG_PEEK, (void *)&s, &l), 5); CHECK(!memcmp(buf, "alien", 5)); SAME(s.sin_addr.s_addr, htonl(0xc0000207)); SAME(ntohs(s.sin_port), 53);
            /* members of the group still get each what they got */
            int sum = 0; for (int i = 0; i < 30; i++) { int s = udp(AF_INET, "127.0.0.1", 0, 0); to(s, group[0], "member", 6); close(s); } for (int i = 0; i < 3; i++) while (recv(group[i], buf, 99, 0) == 6) sum++; SAME(sum, 30); hops++;
        }
        { struct pollfd pf_ = {shut, POLLRDHUP, 0}; SAME(poll(&pf_, 1, 0), 1); CHECK(pf_.revents & POLLRDHUP); CHECK(!(pf_.revents & POLLHUP)); }
        if (has_mc) { char f[2048]; struct ip_msfilter *mf = (void *)f; memset(f, 0, sizeof f); mf->imsf_multiaddr = g2.sin_addr; mf->imsf_interface.s_addr = htonl(INADDR_LOOPBACK); mf->imsf_numsrc = 4; l = sizeof f; CHECK(!getsockopt(mc, IPPROTO_IP, IP_MSFILTER, f, &l)); SAME(mf->imsf_fmode, MCAST_INCLUDE); SAME(mf->imsf_numsrc, 1);
            CHECK(setsockopt(mc, IPPROTO_IP, IP_ADD_MEMBERSHIP, &mr, sizeof mr) && errno == EADDRINUSE); SAME(port_of(mc), pm); }
        if (v6 >= 0) { CHECK(setsockopt(v6, IPPROTO_IPV6, IPV6_JOIN_GROUP, &m6, sizeof m6) && errno == EADDRINUSE); SAME(option(v6, IPPROTO_IPV6, IPV6_MULTICAST_IF), if_nametoindex("lo")); SAME(option(v6, IPPROTO_IPV6, IPV6_TCLASS), 0x28); SAME(option(v6, IPPROTO_IPV6, IPV6_UNICAST_HOPS), 5); SAME(option(v6, IPPROTO_IPV6, IPV6_RECVPKTINFO), 1); SAME(option(only, IPPROTO_IPV6, IPV6_V6ONLY), 1); SAME(option(dual, IPPROTO_IPV6, IPV6_V6ONLY), 0); SAME(port_of(v6), p6); SAME(port_of(dual), pd); }
        /* the roamer may go elsewhere, as it was never bound */
        if (round % 7 == 6) { In away = in("127.0.0.5", pa); CHECK(!connect(roamer, (void *)&away, sizeof away)); CHECK(!connect(roamer, (void *)&ip, sizeof ip)); SAME(port_of(roamer), pr); }
        to(from, plain, "one", 3); to(from, plain, "", 0); to(from, plain, "three", 5); to(from, plain, big, sizeof big); SAME(send(roamer, "roamer", 6, 0), 6); to(from, any, "any", 3); SAME(send(a, "a to b!", 7, 0), 7); SAME(send(b, "to a!", 5, 0), 5); to(from, picky, "yes", 3); to(from, picky, "no", 2);
        if (lite >= 0) to(lite, lite, "lite", 4);
        { In t = in("127.0.0.2", port_of(told)); SAME(sendto(from, "told", 4, 0, (void *)&t, sizeof t), 4); }
        /* each member by itself: the others are full of what the kernel chose, so connect it for a moment */
        for (int i = 0; i < 3; i++) { In f = in("127.0.0.1", pf), none = {.sin_family = AF_UNSPEC}; CHECK(!connect(group[i], (void *)&f, sizeof f)); to(from, group[i], "abc", i + 1); to(from, group[i], "abc", i + 1); CHECK(!connect(group[i], (void *)&none, sizeof none)); }
        if (v6 >= 0) { In6 t = in6("::1", p6); SAME(sendto(v6, "six", 3, 0, (void *)&t, sizeof t), 3); to(from, dual, "four", 4); t = in6("::1", pd); SAME(sendto(v6, "66", 2, 0, (void *)&t, sizeof t), 2); }
        nap(30);
    }
}
