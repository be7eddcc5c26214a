/* A tree that never holds still: a chain in which each makes the next and ends, orphans that end, programs executed. Nobody is lost: the chain goes on. */
#include "family.h"
/* Nobody can kill what is gone before it is seen: who finds the root gone ends by itself. */
static int root;
static void still(void) { if (kill(root, 0)) _exit(0); }
static void chain(void) { for (;;) { still(); family->word[0]++; if (fork()) _exit(0); for (volatile int i = 0; i < 20000; i++) {} } }
int main(int argc, char **argv) {
    begin_family(argc, argv); root = getpid(); prctl(PR_SET_CHILD_SUBREAPER, 1); if (!fork()) chain();
    if (!fork()) for (;;) { still(); int p = fork(); if (!p) { if (!fork()) { nap(1); _exit(0); } _exit(0); } waitpid(p, 0, 0); family->word[1]++; nap(1); }
    if (!fork()) for (;;) { still(); int p = vfork(); if (!p) { execl("/bin/true", "true", (char *)0); _exit(1); } int s; CHECK(waitpid(p, &s, 0) == p && s == 0); family->word[2]++; }
    for (;;) {
        int before[3] = {family->word[0], family->word[1], family->word[2]};
        for (int n = 0; family->word[0] == before[0] || family->word[1] == before[1] || family->word[2] == before[2]; n++) { if (n > 20000) bad("the chain has ended: %d %d %d", family->word[0], family->word[1], family->word[2]); while (waitpid(-1, 0, WNOHANG) > 0) {} nap(1); }
        tick(); nap(5);
    }
}
