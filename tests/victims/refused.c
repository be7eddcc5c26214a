/* Owns one thing that a dump refuses, named by its first argument. What is to be refused may be a child: then the log
 * tells its pid (`CHILD`). `outsider` makes a process that is none of ours, and ends with us. */
#include "check.h"
#include <arpa/inet.h>
#include <linux/bpf.h>
#include <linux/filter.h>
#include <linux/if_ether.h>
#include <linux/if_packet.h>
#include <linux/netlink.h>
#include <linux/perf_event.h>
#include <linux/rtnetlink.h>
#include <linux/seccomp.h>
#include <linux/userfaultfd.h>
#include <mqueue.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/fanotify.h>
#include <sys/ioctl.h>
#include <sys/msg.h>
#include <sys/sem.h>
#include <sys/shm.h>
#include <sys/wait.h>
#define ioctl_(k) ioctl(k, 0xae01, 0)
static int prog(void) { struct bpf_insn code[] = {{.code = BPF_ALU64 | BPF_MOV | BPF_K, .dst_reg = 0, .imm = 0xffff}, {.code = BPF_JMP | BPF_EXIT}}; union bpf_attr a = {.prog_type = BPF_PROG_TYPE_SOCKET_FILTER}; a.insns = (uintptr_t)code; a.insn_cnt = 2; a.license = (uintptr_t)"GPL"; return syscall(SYS_bpf, BPF_PROG_LOAD, &a, sizeof a); }
static int udp(void) { int s = socket(AF_INET, SOCK_DGRAM, 0); struct sockaddr_in a = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)}; CHECK(!bind(s, (void *)&a, sizeof a)); socklen_t l = sizeof a; CHECK(!getsockname(s, (void *)&a, &l)); CHECK(!connect(s, (void *)&a, sizeof a)); return s; }
static const char *what;
#define IS(n) if (!strcmp(what, n))
static char stack[65536] __attribute__((aligned(16)));
static int forever(void *unused) { (void)unused; CHECK(!prctl(PR_SET_PDEATHSIG, SIGKILL)); for (;;) nap(1000); return 0; }
static int outsider(void) { pid_t own = getpid(), p = fork(); CHECK(p >= 0); if (p) { int st; CHECK(waitpid(p, &st, 0) == p); return 0; } p = fork(); if (p) _exit(0); setsid(); while (!kill(own, 0)) { char path[40], state = 'Z'; snprintf(path, sizeof path, "/proc/%d/stat", own); FILE *f = fopen(path, "re"); if (f) { if (fscanf(f, "%*d %*s %c", &state) != 1) state = 'Z'; fclose(f); } if (state == 'Z') break; nap(50); } _exit(0); }
static int filters(int flags) { struct sock_filter f[] = {BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW)}; struct sock_fprog p = {1, f}; CHECK(!prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)); return syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, flags, &p); }
static int listener(void) { int s = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0); struct sockaddr_in a = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)}; CHECK(!bind(s, (void *)&a, sizeof a)); CHECK(!listen(s, 8)); return s; }
static int client(int of) { int s = socket(AF_INET, SOCK_STREAM, 0); struct sockaddr_in a; socklen_t l = sizeof a; CHECK(!getsockname(of, (void *)&a, &l)); CHECK(!connect(s, (void *)&a, sizeof a)); return s; }
static void pass(int s, int fd) { char c[CMSG_SPACE(4)]; struct iovec v = {"x", 1}; struct msghdr m = {.msg_iov = &v, .msg_iovlen = 1, .msg_control = c, .msg_controllen = sizeof c}; struct cmsghdr *h = CMSG_FIRSTHDR(&m); h->cmsg_level = SOL_SOCKET; h->cmsg_type = SCM_RIGHTS; h->cmsg_len = CMSG_LEN(4); memcpy(CMSG_DATA(h), &fd, 4); CHECK(sendmsg(s, &m, 0) == 1); close(fd); }
static int watched(int fd) { int e = epoll_create1(EPOLL_CLOEXEC); struct epoll_event v = {.events = EPOLLIN}; CHECK(!epoll_ctl(e, EPOLL_CTL_ADD, fd, &v)); return e; }
static volatile int ready;
static void *thread(void *unused) {
    (void)unused; static char on;
    IS("seccomp thread") CHECK(!filters(0));
    IS("dispatch") if (prctl(59, 1, 0, 0, &on)) dprintf(out, "SKIP\n");
    IS("files of a thread") CHECK(!unshare(CLONE_FILES));
    IS("directory of a thread") CHECK(!unshare(CLONE_FS));
    IS("namespace of a thread") CHECK(!unshare(CLONE_NEWUTS));
    ready = 1; for (;;) nap(1000);
}
static void leave(int how) { pid_t p = how & CLONE_VM ? clone(forever, stack + sizeof stack, how | SIGCHLD, 0) : syscall(SYS_clone, how | SIGCHLD, 0, 0, 0, 0); CHECK(p >= 0); if (!p) forever(0); dprintf(out, "CHILD %d\n", p); }
int main(int argc, char **argv) {
    begin(argc, argv);
    what = argv[3]; int fd = -1, own = open(".", O_RDONLY | O_CLOEXEC), p[2]; char path[128]; CHECK(!chdir(dir));
    if (strstr(what, "thread") || !strcmp(what, "dispatch")) { spawn(thread, 0); while (!ready) nap(1); fd = own; }
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
    /* the process */
    IS("seccomp") { CHECK(!filters(0)); fd = own; }
    IS("seccomp listener") fd = filters(SECCOMP_FILTER_FLAG_NEW_LISTENER);
    IS("working directory") { CHECK(!mkdir("gone", 0755)); CHECK(!chdir("gone")); CHECK(!rmdir("../gone")); fd = own; }
    IS("root directory") { CHECK(!mkdir("gone", 0755)); CHECK(!chdir("gone")); CHECK(!rmdir("../gone")); CHECK(!chroot(".")); fd = own; }
    IS("memory of the parent") { leave(CLONE_VM); fd = own; }
    IS("table of the parent") { leave(CLONE_FILES); fd = own; }
    IS("directory of the parent") { leave(CLONE_FS); fd = own; }
    IS("actions of the parent") { leave(CLONE_VM | CLONE_SIGHAND); fd = own; }
    IS("clock of a thread") { timer_t t; CHECK(!timer_create(CLOCK_THREAD_CPUTIME_ID, 0, &t)); }
    IS("sealed") { if (!syscall(462, map(4096, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0), 4096, 0)) fd = own; }
    IS("droppable") if (mmap(0, 4096, PROT_READ | PROT_WRITE, 8 | MAP_ANONYMOUS, -1, 0) != MAP_FAILED) fd = own;
    IS("huge") if (mmap(0, 2 << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB, -1, 0) != MAP_FAILED) fd = own;
    IS("aio") { unsigned long c = 0; if (!syscall(SYS_io_setup, 8, &c)) fd = own; }
    IS("watched memory") { int u = syscall(SYS_userfaultfd, O_CLOEXEC); struct uffdio_api a = {.api = UFFD_API}; if (u >= 0 && !ioctl(u, UFFDIO_API, &a)) { struct uffdio_register r = {.range = {(uintptr_t)map(4096, 3, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0), 4096}, .mode = UFFDIO_REGISTER_MODE_MISSING}; CHECK(!ioctl(u, UFFDIO_REGISTER, &r)); fd = u; } }
    IS("mapped ring") { int s = socket(AF_PACKET, SOCK_RAW, 0); struct tpacket_req r = {4096, 4, 2048, 8}; if (s >= 0) { CHECK(!setsockopt(s, SOL_PACKET, PACKET_RX_RING, &r, sizeof r)); map(16384, PROT_READ, MAP_SHARED, s, 0); close(s); fd = own; } }
    IS("mapped link") { int f = open("old", O_RDWR | O_CREAT, 0600); CHECK(!mkdir("far", 0755)); CHECK(!ftruncate(f, 4096)); map(4096, PROT_READ, MAP_SHARED, f, 0); CHECK(!link("old", "far/new")); CHECK(!unlink("old")); close(f); fd = own; }
    /* files */
    IS("removed directory") { CHECK(!mkdir("gone", 0755)); fd = open("gone", O_RDONLY); CHECK(!rmdir("gone")); }
    IS("symbolic link") { CHECK(!symlink("nowhere", "link")); fd = open("link", O_PATH | O_NOFOLLOW); }
    IS("namespace") fd = open("/proc/self/ns/uts", O_RDONLY);
    IS("detached mount") fd = syscall(428, AT_FDCWD, dir, 1 | O_CLOEXEC);
    IS("character device") fd = open("/dev/kmsg", O_RDONLY | O_NONBLOCK);
    IS("block device") fd = open("/dev/loop0", O_RDONLY | O_NONBLOCK);
    IS("pipe") { CHECK(!pipe(p)); outsider(); close(p[0]); fd = p[1]; }
    IS("fifo") { CHECK(!mkfifo("fifo", 0600)); p[0] = open("fifo", O_RDONLY | O_NONBLOCK); fd = open("fifo", O_WRONLY); outsider(); close(p[0]); }
    IS("lost entry") { CHECK(!pipe(p)); fd = watched(p[0]); outsider(); close(p[0]); close(p[1]); }
    IS("set in flight") { fd = eventfd(0, 0); CHECK(!socketpair(AF_UNIX, SOCK_STREAM, 0, p)); pass(p[0], watched(fd)); }
    IS("userfaultfd in flight") { int u = syscall(SYS_userfaultfd, 0); if (u >= 0) { CHECK(!socketpair(AF_UNIX, SOCK_STREAM, 0, p)); pass(p[0], u); fd = own; } }
    IS("watch") { CHECK(open("gone", O_CREAT | O_RDWR, 0600) >= 0); fd = inotify_init1(0); CHECK(inotify_add_watch(fd, "gone", IN_MODIFY) >= 0); CHECK(!unlink("gone")); }
    /* sockets */
    IS("md5") { int l = listener(); struct tcp_md5sig m = {.tcpm_keylen = 3, .tcpm_key = "abc"}; struct sockaddr_in a = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)}; memcpy(&m.tcpm_addr, &a, sizeof a); if (!setsockopt(l, IPPROTO_TCP, TCP_MD5SIG, &m, sizeof m)) fd = l; }
    IS("urgent") { int l = listener(); fd = client(l); CHECK(accept(l, 0, 0) >= 0); CHECK(send(fd, "ab!", 3, MSG_OOB) == 3); }
    IS("tcp filter") { fd = listener(); int b = prog(); if (b < 0) fd = -1; else { CHECK(!setsockopt(fd, SOL_SOCKET, SO_ATTACH_BPF, &b, sizeof b)); close(b); } }
    IS("fanout") { fd = socket(AF_PACKET, SOCK_RAW, htons(ETH_P_ALL)); int f = (getpid() & 0xffff) | 6 << 16; struct sock_filter c[] = {BPF_STMT(BPF_RET | BPF_K, 0)}; struct sock_fprog g = {1, c}; if (fd >= 0) { CHECK(!setsockopt(fd, SOL_PACKET, 18, &f, sizeof f)); CHECK(!setsockopt(fd, SOL_PACKET, 22, &g, sizeof g)); } }
    IS("unix filter") { CHECK(!socketpair(AF_UNIX, SOCK_DGRAM, 0, p)); struct sock_filter c[] = {BPF_STMT(BPF_RET | BPF_K, -1)}; struct sock_fprog g = {1, c}; CHECK(!setsockopt(p[0], SOL_SOCKET, SO_ATTACH_FILTER, &g, sizeof g)); fd = p[0]; }
    IS("pair") { CHECK(!socketpair(AF_UNIX, SOCK_STREAM, 0, p)); outsider(); close(p[0]); fd = p[1]; }
    /* IPC */
    IS("undo list") { int id = semget(IPC_PRIVATE, 1, 0600 | IPC_CREAT); struct sembuf o = {0, 1, SEM_UNDO}; CHECK(!semop(id, &o, 1)); CHECK(!semctl(id, 0, IPC_RMID)); if (!syscall(SYS_clone, CLONE_SYSVSEM | SIGCHLD, 0, 0, 0, 0)) forever(0); fd = own; }
    IS("notification") { snprintf(path, sizeof path, "/torpor-%d", getpid()); fd = mq_open(path, O_CREAT | O_RDWR, 0600, 0); if (fd >= 0) { CHECK(!mq_unlink(path)); struct sigevent e = {.sigev_notify = SIGEV_SIGNAL, .sigev_signo = SIGUSR1}; CHECK(!mq_notify(fd, &e)); } }
    IS("shared queue") { snprintf(path, sizeof path, "/torpor-%d", getpid()); fd = mq_open(path, O_CREAT | O_RDWR, 0600, 0); if (fd >= 0) { CHECK(!mq_unlink(path)); outsider(); } }
    if (fd < 0) dprintf(out, "SKIP %s\n", what);
    for (;; tick()) { CHECK(fd < 0 || fcntl(fd, F_GETFD) >= 0); nap(10); }
}
