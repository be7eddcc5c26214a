/* netlink(7): port ids, groups, options, a filter; asked and answered all the time. */
#include "check.h"
#include <linux/filter.h>
#include <linux/genetlink.h>
#include <linux/netlink.h>
#include <linux/rtnetlink.h>
#include <linux/sock_diag.h>
#include <net/if.h>
typedef struct sockaddr_nl Nl;
static int one = 1;
static Nl name(int s) { Nl a; socklen_t l = sizeof a; CHECK(!getsockname(s, (void *)&a, &l)); return a; }
static int option(int s, int n) { int v = -1; socklen_t l = sizeof v; CHECK(!getsockopt(s, SOL_NETLINK, n, &v, &l)); return v; }
static void wants(int s, int group, int wanted) { unsigned bits[64] = {0}; socklen_t l = sizeof bits; CHECK(!getsockopt(s, SOL_NETLINK, NETLINK_LIST_MEMBERSHIPS, bits, &l)); SAME(bits[(group - 1) / 32] >> (group - 1) % 32 & 1, wanted); }
/* Asks for loopback and looks who is answered. */
static void ask(int s) {
    static int seq; struct { struct nlmsghdr h; struct ifinfomsg i; } q = {{sizeof q, RTM_GETLINK, NLM_F_REQUEST, ++seq, 0}, {.ifi_index = if_nametoindex("lo")}}; static char buf[32768]; Nl k = {.nl_family = AF_NETLINK};
    SAME(sendto(s, &q, sizeof q, 0, (void *)&k, sizeof k), sizeof q); struct nlmsghdr *h = (void *)buf; do CHECK(recv(s, buf, sizeof buf, 0) > 0); while (!h->nlmsg_seq); /* notices that others caused */ SAME(h->nlmsg_type, RTM_NEWLINK); SAME(h->nlmsg_seq, seq); SAME(h->nlmsg_pid, name(s).nl_pid);
}
int main(int argc, char **argv) {
    begin(argc, argv);
    int route = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_ROUTE); Nl a = {.nl_family = AF_NETLINK, .nl_groups = RTMGRP_LINK | RTMGRP_IPV4_IFADDR}; CHECK(route >= 0); CHECK(!bind(route, (void *)&a, sizeof a));
    int group = RTNLGRP_IPV6_PREFIX; CHECK(!setsockopt(route, SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, &group, sizeof group)); group = 34; int far = !setsockopt(route, SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, &group, sizeof group);
    int second = socket(AF_NETLINK, SOCK_DGRAM | SOCK_NONBLOCK, NETLINK_ROUTE); a.nl_groups = 0; a.nl_pid = 0x80000000u | getpid(); CHECK(!bind(second, (void *)&a, sizeof a));
    for (int n = 0; n < 3; n++) CHECK(!setsockopt(second, SOL_NETLINK, (int[]){NETLINK_EXT_ACK, NETLINK_CAP_ACK, NETLINK_PKTINFO}[n], &one, sizeof one));
    int uevent = socket(AF_NETLINK, SOCK_RAW, NETLINK_KOBJECT_UEVENT); a.nl_pid = 0; a.nl_groups = 1; CHECK(!bind(uevent, (void *)&a, sizeof a)); int big = 3000000; CHECK(!setsockopt(uevent, SOL_SOCKET, SO_RCVBUFFORCE, &big, sizeof big)); CHECK(!setsockopt(uevent, SOL_SOCKET, SO_PASSCRED, &one, sizeof one));
    struct sock_filter code[] = {{BPF_RET | BPF_K, 0, 0, 0xffff}}; struct sock_fprog prog = {1, code}; CHECK(!setsockopt(uevent, SOL_SOCKET, SO_ATTACH_FILTER, &prog, sizeof prog)); CHECK(!setsockopt(uevent, SOL_NETLINK, NETLINK_NO_ENOBUFS, &one, sizeof one));
    int generic = socket(AF_NETLINK, SOCK_RAW, NETLINK_GENERIC); a.nl_groups = 0; CHECK(!bind(generic, (void *)&a, sizeof a)); CHECK(!connect(generic, (void *)&(Nl){.nl_family = AF_NETLINK, .nl_pid = 4242}, sizeof a));
    int unbound = socket(AF_NETLINK, SOCK_RAW, NETLINK_SOCK_DIAG);
    unsigned me = name(route).nl_pid, other = name(second).nl_pid, gen = name(generic).nl_pid, ue = name(uevent).nl_pid; SAME(me, getpid());
    for (;; tick()) {
        ask(route); ask(second); SAME(name(route).nl_pid, me); SAME(name(second).nl_pid, other); SAME(name(generic).nl_pid, gen); SAME(name(uevent).nl_pid, ue); SAME(name(unbound).nl_pid, 0);
        SAME(name(route).nl_groups & (RTMGRP_LINK | RTMGRP_IPV4_IFADDR), RTMGRP_LINK | RTMGRP_IPV4_IFADDR); wants(route, RTNLGRP_IPV6_PREFIX, 1); if (far) wants(route, 34, 1); wants(route, 3, 0); wants(second, 1, 0); wants(uevent, 1, 1);
        SAME(option(second, NETLINK_EXT_ACK), 1); SAME(option(second, NETLINK_CAP_ACK), 1); SAME(option(second, NETLINK_PKTINFO), 1); SAME(option(route, NETLINK_EXT_ACK), 0); SAME(option(uevent, NETLINK_NO_ENOBUFS), 1);
        int v; socklen_t l = sizeof v; CHECK(!getsockopt(uevent, SOL_SOCKET, SO_PASSCRED, &v, &l)); SAME(v, 1); CHECK(!getsockopt(uevent, SOL_SOCKET, SO_RCVBUF, &v, &l)); SAME(v, 2 * big); l = 0; CHECK(!getsockopt(uevent, SOL_SOCKET, SO_GET_FILTER, 0, &l)); SAME(l, 1);
        Nl p; l = sizeof p; CHECK(!getpeername(generic, (void *)&p, &l)); SAME(p.nl_pid, 4242);
        nap(20);
    }
}
