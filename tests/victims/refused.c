/* Owns one thing that a dump refuses, named by its first argument. */
#include "check.h"
#include <arpa/inet.h>
#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/if_packet.h>
#include <linux/netlink.h>
#include <linux/perf_event.h>
#include <linux/rtnetlink.h>
#include <netinet/in.h>
#include <sys/fanotify.h>
#include <sys/ioctl.h>
#define ioctl_(k) ioctl(k, 0xae01, 0)
static int prog(void) { struct bpf_insn code[] = {{.code = BPF_ALU64 | BPF_MOV | BPF_K, .dst_reg = 0, .imm = 0xffff}, {.code = BPF_JMP | BPF_EXIT}}; union bpf_attr a = {.prog_type = BPF_PROG_TYPE_SOCKET_FILTER}; a.insns = (uintptr_t)code; a.insn_cnt = 2; a.license = (uintptr_t)"GPL"; return syscall(SYS_bpf, BPF_PROG_LOAD, &a, sizeof a); }
static int udp(void) { int s = socket(AF_INET, SOCK_DGRAM, 0); struct sockaddr_in a = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)}; CHECK(!bind(s, (void *)&a, sizeof a)); socklen_t l = sizeof a; CHECK(!getsockname(s, (void *)&a, &l)); CHECK(!connect(s, (void *)&a, sizeof a)); return s; }
int main(int argc, char **argv) {
    begin(argc, argv);
    const char *what = argv[3]; int fd = -1;
#define IS(n) if (!strcmp(what, n))
    IS("userfaultfd") fd = syscall(SYS_userfaultfd, 0);
    IS("perf_event") { struct perf_event_attr a = {.type = PERF_TYPE_SOFTWARE, .size = sizeof a, .config = PERF_COUNT_SW_TASK_CLOCK}; fd = syscall(SYS_perf_event_open, &a, 0, -1, -1, 0); }
    IS("fanotify") fd = fanotify_init(FAN_CLASS_NOTIF, O_RDONLY);
    IS("bpf") { union bpf_attr a = {.map_type = BPF_MAP_TYPE_ARRAY, .key_size = 4, .value_size = 8, .max_entries = 1}; fd = syscall(SYS_bpf, BPF_MAP_CREATE, &a, sizeof a); }
    IS("landlock") { uint64_t a = 1; fd = syscall(444, &a, 8, 0); }
    IS("fscontext") fd = syscall(430, "tmpfs", 0);
    IS("memfd_secret") { fd = syscall(447, 0); if (fd >= 0 && ftruncate(fd, 4096)) bad("ftruncate"); }
    IS("kvm") { int k = open("/dev/kvm", O_RDWR); if (k >= 0) { fd = ioctl_(k); close(k); } }
    IS("vsock") fd = socket(AF_VSOCK, SOCK_STREAM, 0);
    IS("alg") fd = socket(AF_ALG, SOCK_SEQPACKET, 0);
    IS("xdp") fd = socket(44, SOCK_RAW, 0);
    IS("can") fd = socket(AF_CAN, SOCK_RAW, 1);
    IS("mptcp") fd = socket(AF_INET, SOCK_STREAM, 262);
    IS("pidfd") fd = syscall(SYS_pidfd_open, getppid(), 0);
    IS("corked") { fd = udp(); CHECK(send(fd, "not yet", 7, MSG_MORE) == 7); }
    IS("filter") { fd = udp(); int p = prog(); if (p < 0) { close(fd); fd = -1; } else { CHECK(!setsockopt(fd, SOL_SOCKET, SO_ATTACH_BPF, &p, sizeof p)); close(p); } }
    IS("ring") { fd = socket(AF_PACKET, SOCK_RAW, 0); struct tpacket_req r = {4096, 4, 2048, 8}; if (fd >= 0) CHECK(!setsockopt(fd, SOL_PACKET, PACKET_RX_RING, &r, sizeof r)); }
    IS("netlink") { fd = socket(AF_NETLINK, SOCK_RAW, NETLINK_ROUTE); struct { struct nlmsghdr h; struct ifinfomsg i; } q = {{sizeof q, RTM_GETLINK, NLM_F_REQUEST | NLM_F_ACK, 1, 0}, {.ifi_index = 1}}; struct sockaddr_nl k = {.nl_family = AF_NETLINK}; CHECK(sendto(fd, &q, sizeof q, 0, (void *)&k, sizeof k) == sizeof q); }
    if (fd < 0) dprintf(out, "SKIP %s\n", what);
    for (;; tick()) { CHECK(fd < 0 || fcntl(fd, F_GETFD) >= 0); nap(10); }
}
