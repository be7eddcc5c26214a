/* Many threads: argv[3] of them, "sleep" or "spin". */
#include "check.h"
static volatile uint64_t *rounds; static int spinning;
static void *work(void *p) { long i = (long)p; for (;;) { rounds[i]++; if (spinning) for (volatile int k = 0; k < 50000; k++) {} else nap(200); } return p; }
int main(int argc, char **argv) {
    begin(argc, argv);
    int n = atoi(argv[3]); spinning = !strcmp(argv[4], "spin"); rounds = calloc(n, 8);
    for (long i = 0; i < n; i++) spawn(work, (void *)i);
    for (uint64_t *last = calloc(n, 8);; tick()) for (int i = 0; i < n; i++) { for (int tries = 0; rounds[i] == last[i]; tries++) { errno = 0; if (tries > 3000) bad("thread %d stands", i); nap(10); } last[i] = rounds[i]; }
}
