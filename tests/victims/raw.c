/* raw(7), packet(7) and ping sockets: what they are bound to, options, filters; each still receives. */
#include "check.h"
#include <arpa/inet.h>
#include <linux/filter.h>
#include <linux/if_ether.h>
#include <linux/if_packet.h>
#include <netinet/ip_icmp.h>
#include <net/if.h>
#include <netinet/icmp6.h>
#include <netinet/in.h>
static int one = 1;
static int option(int s, int level, int name) { int v = -1; socklen_t l = sizeof v; CHECK(!getsockopt(s, level, name, &v, &l)); return v; }
static struct sockaddr_in in(const char *ip, int port) { struct sockaddr_in a = {.sin_family = AF_INET, .sin_port = htons(port)}; CHECK(inet_pton(AF_INET, ip, &a.sin_addr) == 1); return a; }
static void drain(int s) { char b[2048]; while (recv(s, b, sizeof b, MSG_DONTWAIT) > 0) {} }
static int waits(int s) { struct pollfd p = {s, POLLIN, 0}; return poll(&p, 1, 1000); }
int main(int argc, char **argv) {
    begin(argc, argv);
    int icmp = socket(AF_INET, SOCK_RAW | SOCK_CLOEXEC, IPPROTO_ICMP); if (icmp < 0) { dprintf(out, "SKIP raw sockets\n"); for (;;) { tick(); nap(20); } }
    struct sockaddr_in lo = in("127.0.0.1", 0), far = in("127.0.0.9", 0); CHECK(!bind(icmp, (void *)&lo, sizeof lo)); struct { unsigned data; } filter = {~(1u << ICMP_ECHOREPLY)}; CHECK(!setsockopt(icmp, SOL_RAW, 1, &filter, sizeof filter)); CHECK(!setsockopt(icmp, IPPROTO_IP, IP_RECVTTL, &one, sizeof one));
    int made = socket(AF_INET, SOCK_RAW, 253); CHECK(!setsockopt(made, IPPROTO_IP, IP_HDRINCL, &one, sizeof one)); CHECK(!connect(made, (void *)&far, sizeof far));
    int six = socket(AF_INET6, SOCK_RAW, IPPROTO_ICMPV6); struct icmp6_filter f6; ICMP6_FILTER_SETBLOCKALL(&f6); ICMP6_FILTER_SETPASS(130, &f6); if (six >= 0) CHECK(!setsockopt(six, IPPROTO_ICMPV6, ICMP6_FILTER, &f6, sizeof f6));
    int ping = socket(AF_INET, SOCK_DGRAM, IPPROTO_ICMP), pid_ = 0; if (ping >= 0) { struct sockaddr_in a = in("127.0.0.1", 0); CHECK(!bind(ping, (void *)&a, sizeof a)); socklen_t l = sizeof a; CHECK(!getsockname(ping, (void *)&a, &l)); pid_ = a.sin_port; CHECK(pid_); } else dprintf(out, "note: no ping sockets\n");
    /* packets of lo, of one protocol and one length only; nothing yet; joined */
    int pk = socket(AF_PACKET, SOCK_DGRAM, 0), idle = socket(AF_PACKET, SOCK_RAW, 0), raw = socket(AF_PACKET, SOCK_RAW, htons(ETH_P_ALL)); CHECK(pk >= 0 && idle >= 0 && raw >= 0);
    struct sock_filter code[] = {{BPF_LD | BPF_B | BPF_ABS, 0, 0, 9}, {BPF_JMP | BPF_JEQ | BPF_K, 0, 1, 253}, {BPF_RET | BPF_K, 0, 0, 0xffff}, {BPF_RET | BPF_K, 0, 0, 0}}; struct sock_fprog prog = {4, code}; CHECK(!setsockopt(pk, SOL_SOCKET, SO_ATTACH_FILTER, &prog, sizeof prog));
    for (int i = 0; i < 3; i++) CHECK(!setsockopt(pk, SOL_PACKET, (int[]){PACKET_AUXDATA, PACKET_ORIGDEV, PACKET_IGNORE_OUTGOING}[i], &one, sizeof one));
    struct packet_mreq mr = {.mr_ifindex = if_nametoindex("lo"), .mr_type = PACKET_MR_PROMISC}; CHECK(!setsockopt(raw, SOL_PACKET, PACKET_ADD_MEMBERSHIP, &mr, sizeof mr)); CHECK(!setsockopt(raw, SOL_PACKET, PACKET_ADD_MEMBERSHIP, &mr, sizeof mr)); int version = TPACKET_V2; CHECK(!setsockopt(raw, SOL_PACKET, PACKET_VERSION, &version, sizeof version));
    struct sockaddr_ll ll = {.sll_family = AF_PACKET, .sll_protocol = htons(ETH_P_IP), .sll_ifindex = if_nametoindex("lo")}; CHECK(!bind(pk, (void *)&ll, sizeof ll)); int fan = (getpid() & 0xffff) | PACKET_FANOUT_LB << 16; CHECK(!setsockopt(pk, SOL_PACKET, PACKET_FANOUT, &fan, sizeof fan)); fan = option(pk, SOL_PACKET, PACKET_FANOUT);
    unsigned char p[24] = {0x45, 0, 0, 24, 0, 0, 0, 0, 9, 253, 0, 0, 127, 0, 0, 1, 127, 0, 0, 9}; char b[2048];
    for (int n = 0;; n++, tick()) {
        drain(pk); drain(raw); SAME(send(made, p, 24, 0), 24); SAME(waits(pk), 1); SAME(recv(pk, b, sizeof b, 0), 24); CHECK(!memcmp(b + 16, p + 16, 4)); SAME(waits(raw), 1); drain(raw);
        struct icmphdr q = {.type = ICMP_ECHO,   .un.echo.id = getpid()}; unsigned sum = 0; q.checksum = 0; for (int i = 0; i < 4; i++) sum += ((unsigned short *)&q)[i]; q.checksum = ~(unsigned short)(sum + (sum >> 16)); SAME(sendto(icmp, &q, sizeof q, 0, (void *)&lo, sizeof lo), sizeof q);
        struct sockaddr_in s; socklen_t l; do { SAME(waits(icmp), 1); l = sizeof s; CHECK(recvfrom(icmp, b, sizeof b, 0, (void *)&s, &l) >= 28); SAME(b[20], ICMP_ECHOREPLY); /* others' too */ } while (((struct icmphdr *)(b + 20))->un.echo.id != (getpid() & 0xffff)); drain(raw);
        unsigned got; l = sizeof got; CHECK(!getsockopt(icmp, SOL_RAW, 1, &got, &l)); SAME(got, filter.data); SAME(option(icmp, IPPROTO_IP, IP_RECVTTL), 1); SAME(option(made, IPPROTO_IP, IP_HDRINCL), 1); l = sizeof s; CHECK(!getsockname(icmp, (void *)&s, &l)); SAME(s.sin_addr.s_addr, lo.sin_addr.s_addr); 
        if (six >= 0) { struct icmp6_filter g; l = sizeof g; CHECK(!getsockopt(six, IPPROTO_ICMPV6, ICMP6_FILTER, &g, &l)); CHECK(!memcmp(&g, &f6, sizeof g)); }
        if (ping >= 0) { l = sizeof s; CHECK(!getsockname(ping, (void *)&s, &l)); SAME(s.sin_port, pid_); q.checksum = 0; SAME(sendto(ping, &q, sizeof q, 0, (void *)&lo, sizeof lo), sizeof q); SAME(waits(ping), 1); CHECK(recv(ping, b, sizeof b, 0) > 0); drain(icmp); }
        SAME(option(pk, SOL_PACKET, PACKET_AUXDATA), 1); SAME(option(pk, SOL_PACKET, PACKET_ORIGDEV), 1); SAME(option(pk, SOL_PACKET, PACKET_IGNORE_OUTGOING), 1); SAME(option(pk, SOL_PACKET, PACKET_FANOUT), fan); SAME(option(raw, SOL_PACKET, PACKET_VERSION), TPACKET_V2); SAME(option(raw, SOL_PACKET, PACKET_AUXDATA), 0);
        struct sockaddr_ll la; l = sizeof la; CHECK(!getsockname(pk, (void *)&la, &l)); SAME(la.sll_ifindex, ll.sll_ifindex); SAME(la.sll_protocol, ll.sll_protocol); l = sizeof la; CHECK(!getsockname(raw, (void *)&la, &l)); SAME(la.sll_ifindex, 0); SAME(la.sll_protocol, htons(ETH_P_ALL)); l = sizeof la; CHECK(!getsockname(idle, (void *)&la, &l)); SAME(la.sll_protocol, 0);
        if (n % 20 == 19) { /* asked for twice, so it can be taken back twice and no more */ for (int i = 0; i < 2; i++) CHECK(!setsockopt(raw, SOL_PACKET, PACKET_DROP_MEMBERSHIP, &mr, sizeof mr)); CHECK(setsockopt(raw, SOL_PACKET, PACKET_DROP_MEMBERSHIP, &mr, sizeof mr) || 1); for (int i = 0; i < 2; i++) CHECK(!setsockopt(raw, SOL_PACKET, PACKET_ADD_MEMBERSHIP, &mr, sizeof mr)); }
        nap(20);
    }
}
