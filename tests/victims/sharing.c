/* Processes that share memory, descriptor table, directories or signal actions without being threads; another signal than SIGCHLD at the end. */
#include "family.h"
static volatile int common; static int table = -1; static char *stacks[8];
static int memory(void *arg) { (void)arg; for (;;) { CHECK(common >= 0); family->word[0] = common; beat(0); nap(3); } }
static int files(void *arg) { (void)arg; for (;;) { int fd = family->word[1]; if (fd > 0) { char x = 0; SAME(pread(fd, &x, 1, 0), 1); SAME(x, 'c'); } beat(1); nap(3); } }
static int directories(void *arg) { (void)arg; for (;;) { char a[4096]; CHECK(getcwd(a, sizeof a)); CHECK(!strcmp(a, "/tmp") || !strcmp(a, "/")); family->word[2] = !strcmp(a, "/tmp"); beat(2); nap(3); } }
static void handler(int s) { (void)s; family->word[3]++; }
static int actions(void *arg) { (void)arg; for (;;) { struct sigaction sa; CHECK(!sigaction(SIGUSR2, 0, &sa)); family->word[4] = sa.sa_handler == handler; beat(3); nap(3); } }
static int own(void *arg) { (void)arg; for (;;) { beat(4); nap(3); } return 0; }
static int make(int n, int (*f)(void *), int flags) { stacks[n] = (char *)mmap(0, 1 << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) + (1 << 20) - 64; int pid = clone(f, stacks[n], flags, 0); CHECK(pid > 0); return pid; }
static int exit_signal(int pid) { char path[64], text[1024]; snprintf(path, sizeof path, "/proc/%d/stat", pid); int f = open(path, O_RDONLY | O_CLOEXEC); CHECK(f >= 0); ssize_t n = read(f, text, sizeof text - 1); close(f); CHECK(n > 0); text[n] = 0; char *p = strrchr(text, ')') + 1; for (int i = 0; i < 35; i++) p = strchr(p + 1, ' '); return atoi(p); }
static void await(int word, int value) { for (int i = 0; i < 3000 && family->word[word] != value; i++) nap(2); SAME(family->word[word], value); }
static void turns_of(int member) { uint64_t before = family->beat[member]; for (int t = 0; family->beat[member] < before + 2; t++) { if (t > 20000) bad("member %d stands still", member); nap(1); } }
int main(int argc, char **argv) {
    begin_family(argc, argv); members = 5; signal(SIGUSR2, SIG_DFL); CHECK(!chdir("/"));
    make(0, memory, CLONE_VM | SIGCHLD); make(1, files, CLONE_FILES | SIGCHLD); make(2, directories, CLONE_FS | SIGCHLD); make(3, actions, CLONE_VM | CLONE_SIGHAND | SIGCHLD); int other = make(4, own, SIGUSR1);
    for (int n = 1;; n++) {
        common = n; tick_all(); CHECK(family->word[0] >= n - 1); await(0, n);
        if (table >= 0) { family->word[1] = 0; turns_of(1); close(table); } table = open(in_dir("f"), O_CREAT | O_RDWR, 0600); CHECK(table >= 0); SAME(pwrite(table, "c", 1, 0), 1); family->word[1] = table;
        CHECK(!chdir(n % 2 ? "/tmp" : "/")); await(2, n % 2);
        signal(SIGUSR2, n % 2 ? handler : SIG_DFL); await(4, n % 2);
        SAME(exit_signal(other), SIGUSR1);
    }
}
