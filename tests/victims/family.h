/* For victims of several processes: each has a beat in shared memory, and the root ticks only when all have beaten. */
#include "check.h"
#include <sys/wait.h>
#define MEMBERS 64
static struct { volatile uint64_t beat[MEMBERS]; volatile int pid[MEMBERS]; volatile int ready[MEMBERS]; volatile int word[64]; } *family;
static int members;

static void begin_family(int argc, char **argv) {
    begin(argc, argv);
    family = mmap(0, sizeof *family, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0); CHECK(family != MAP_FAILED);
}
/* What every member knows of itself. */
__attribute__((unused)) static void relations(int ppid, int sid, int pgid) { if (ppid) SAME(getppid(), ppid); SAME(getsid(0), sid); SAME(getpgid(0), pgid); }
__attribute__((unused)) static void beat(int member) { family->beat[member]++; }
/* Waits until all members have beaten twice more. */
__attribute__((unused)) static void tick_all(void) {
    uint64_t before[MEMBERS];
    for (int i = 0; i < members; i++) before[i] = family->beat[i];
    for (int i = 0; i < members; i++) for (int n = 0; family->beat[i] < before[i] + 2; n++) { if (n > 20000) bad("member %d (pid %d) stands still", i, family->pid[i]); nap(1); }
    tick();
}
