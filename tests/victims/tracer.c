/* Traces process argv[3] and says so. */
#include "check.h"
#include <sys/ptrace.h>
int main(int argc, char **argv) {
    begin(argc, argv);
    CHECK(argc > 3 && !ptrace(PTRACE_SEIZE, atoi(argv[3]), 0, 0));
    for (;;) { tick(); nap(10); }
}
