/* Threads that live in restartable sequences: per-cpu counters without atomics. A section that was
 * interrupted by the freeze must begin again, never go on where it was: then another thread may have been
 * at the same counter meanwhile, or it runs on another cpu than it thinks. */
#include "check.h"
#include <sys/rseq.h>
#define THREADS 6
#define DWELL 3000
static struct { volatile uint64_t count, owner; char pad[112]; } percpu[1024];
static volatile uint64_t done[THREADS], aborted[THREADS];
static void *work(void *p) {
    long me = (long)p + 1;
    struct rseq *rs = (void *)((char *)__builtin_thread_pointer() + __rseq_offset);
    for (;;) {
        uint32_t cpu = rs->cpu_id_start;
        volatile uint64_t *count = &percpu[cpu].count, *owner = &percpu[cpu].owner;
        asm goto(
            ".pushsection __rseq_cs, \"aw\"\n .balign 32\n 3: .long 0, 0\n .quad 1f, 2f - 1f, 4f\n .popsection\n"
            "leaq 3b(%%rip), %%rax\n movq %%rax, %[cs]\n"
            "1: cmpl %[cpu], %[now]\n jne 4f\n"
            "movq %[me], (%[owner])\n"
            "movq (%[count]), %%rax\n"
            "movl %[dwell], %%ecx\n 5: decl %%ecx\n jnz 5b\n"
            "cmpq %[me], (%[owner])\n jne %l[torn]\n"
            "incq %%rax\n movq %%rax, (%[count])\n"
            "2:\n"
            ".pushsection __rseq_failure, \"ax\"\n .byte 0x0f, 0xb9, 0x3d\n .long 0x53053053\n 4: jmp %l[again]\n .popsection\n"
            :: [cs] "m"(rs->rseq_cs), [now] "m"(rs->cpu_id), [cpu] "r"(cpu), [me] "r"(me), [owner] "r"(owner),
               [count] "r"(count), [dwell] "i"(DWELL)
            : "rax", "rcx", "memory", "cc" : again, torn);
        done[me - 1]++;
        continue;
    again:
        aborted[me - 1]++;
        continue;
    torn:
        bad("a section went on although another thread had been there");
    }
    return 0;
}
int main(int argc, char **argv) {
    begin(argc, argv);
    if (!__rseq_size) { dprintf(out, "SKIP no rseq\n"); return 0; }
    for (long i = 0; i < THREADS; i++) spawn(work, (void *)i);
    for (uint64_t last[THREADS] = {0};; tick()) {
        nap(100);
        for (int i = 0; i < THREADS; i++) {
            for (int tries = 0; done[i] == last[i]; tries++) { if (tries > 500) bad("thread %d stands", i); nap(10); }
            last[i] = done[i];
        }
        /* Others go on while this adds up: the counts lie between two sums of what was done. */
        uint64_t before = 0, counted = 0, after = 0;
        for (int i = 0; i < THREADS; i++) before += done[i];
        __sync_synchronize();
        for (int i = 0; i < 1024; i++) counted += percpu[i].count;
        __sync_synchronize();
        for (int i = 0; i < THREADS; i++) after += done[i];
        if (counted < before || counted > after + THREADS) bad("counted %lu, done %lu to %lu", counted, before, after);
    }
}
