/* Memory that changes all the time in an order of which every instant can be told: each page is written the number of the
 * round, one after the other, so that a picture of two instants shows. Beside it areas that children do not get, or find
 * empty; shared memory that counts who has it; and no child, which is asked in every way, nor a SIGCHLD. */
#include "check.h"
#include <sys/ipc.h>
#include <sys/shm.h>
#include <sys/wait.h>
#define PAGES 6000
#define FEW (1 << 20)
static int subreaper;
static void *rounds(void *arg) {
    (void)arg;
    volatile uint64_t *m = mmap(0, PAGES * 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(m != MAP_FAILED);
    for (uint64_t round = 1;; round++) {
        for (size_t i = 0; i < PAGES; i++) {
            volatile uint64_t *word = m + i * 512 + i % 512;
            if (*word != round - 1) bad("page %zu is of round %lu, not %lu", i, (unsigned long)*word, (unsigned long)round - 1);
            *word = round;
        }
        for (size_t i = 1; i < PAGES; i++) if (m[i * 512 + i % 512] != m[0]) bad("page %zu differs in round %lu", i, (unsigned long)round);
        if (round % 64 == 0) nap(1);
    }
    return 0;
}
static volatile sig_atomic_t told;
static void on_child(int s) { (void)s; told++; }
static void no_child(int options) {
    errno = 0;
    int status, got = waitpid(-1, &status, WNOHANG | options);
    if (got != -1 || errno != ECHILD) bad("waitpid(-1, %#x) gives %d", options, got);
}
int main(int argc, char **argv) {
    begin(argc, argv);
    subreaper = argc > 3 && !strcmp(argv[3], "subreaper");
    if (subreaper) CHECK(!prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0));
    struct sigaction action = {.sa_handler = on_child, .sa_flags = SA_RESTART};
    CHECK(!sigaction(SIGCHLD, &action, 0));
    unsigned char *apart = mmap(0, FEW, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    unsigned char *wiped = mmap(0, FEW, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(!madvise(apart, FEW, MADV_DONTFORK)); CHECK(!madvise(wiped, FEW, MADV_WIPEONFORK));
    unsigned char *shared = mmap(0, FEW, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    int id = shmget(IPC_PRIVATE, FEW, 0600); CHECK(id >= 0);
    unsigned char *attached = shmat(id, 0, 0); CHECK(attached != (void *)-1); CHECK(!shmctl(id, IPC_RMID, 0));
    CHECK(shmat(id, 0, SHM_RDONLY) != (void *)-1);
    for (int i = 0; i < FEW; i++) { apart[i] = i * 3 + 1; wiped[i] = i * 5 + 1; shared[i] = i * 7 + 1; attached[i] = i * 11 + 1; }
    spawn(rounds, 0); spawn(rounds, 0);
    for (unsigned n = 0;; n++) {
        no_child(0); no_child(__WALL); no_child(__WCLONE);
        siginfo_t info; errno = 0;
        if (waitid(P_ALL, 0, &info, WEXITED | WSTOPPED | WCONTINUED | WNOHANG | WNOWAIT | __WALL) != -1 || errno != ECHILD) bad("waitid finds pid %d", info.si_pid);
        SAME(told, 0);
        struct shmid_ds about; CHECK(!shmctl(id, IPC_STAT, &about)); SAME(about.shm_nattch, 2);
        size_t i = n * 37 % FEW;
        SAME(apart[i], (unsigned char)(i * 3 + 1)); SAME(wiped[i], (unsigned char)(i * 5 + 1));
        SAME(shared[i], (unsigned char)(i * 7 + 1)); SAME(attached[i], (unsigned char)(i * 11 + 1));
        if (n % 200 == 0) { for (i = 0; i < FEW; i++) { SAME(apart[i], (unsigned char)(i * 3 + 1)); SAME(wiped[i], (unsigned char)(i * 5 + 1)); } }
        if (n % 20 == 0) tick();
        nap(1);
    }
}
