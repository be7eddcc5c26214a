/* Threads that spin with known values in every register and see at once when one changes. */
#include "check.h"
#include <immintrin.h>
static volatile uint64_t rounds[8];
static volatile int kinds;
#define SPIN 20000

/* All general registers but rsp, and the flags' direction bit. */
static void general(uint64_t seed) {
    uint64_t v[16], w[16];
    for (int i = 0; i < 16; i++) w[i] = v[i] = mix(seed + i);
    uint64_t spins = SPIN, bp_ok = 0;
    asm volatile(
        "push %%rbp\n push %%rbx\n sub $128, %%rsp\n push %1\n"
        "mov %0, %%rax\n"
        "mov 8(%%rax), %%rbx\n mov 16(%%rax), %%rcx\n mov 24(%%rax), %%rdx\n mov 32(%%rax), %%rsi\n"
        "mov 40(%%rax), %%rdi\n mov 48(%%rax), %%rbp\n mov 56(%%rax), %%r8\n mov 64(%%rax), %%r9\n"
        "mov 72(%%rax), %%r10\n mov 80(%%rax), %%r11\n mov 88(%%rax), %%r12\n mov 96(%%rax), %%r13\n"
        "mov 104(%%rax), %%r14\n mov 112(%%rax), %%r15\n std\n stc\n"
        "1: decq (%%rsp)\n jnz 1b\n"
        "jnc 9f\n" /* dec leaves the carry alone */
        "2: cmp 8(%%rax), %%rbx\n jne 9f\n cmp 16(%%rax), %%rcx\n jne 9f\n cmp 24(%%rax), %%rdx\n jne 9f\n"
        "cmp 32(%%rax), %%rsi\n jne 9f\n cmp 40(%%rax), %%rdi\n jne 9f\n cmp 48(%%rax), %%rbp\n jne 9f\n"
        "cmp 56(%%rax), %%r8\n jne 9f\n cmp 64(%%rax), %%r9\n jne 9f\n cmp 72(%%rax), %%r10\n jne 9f\n"
        "cmp 80(%%rax), %%r11\n jne 9f\n cmp 88(%%rax), %%r12\n jne 9f\n cmp 96(%%rax), %%r13\n jne 9f\n"
        "cmp 104(%%rax), %%r14\n jne 9f\n cmp 112(%%rax), %%r15\n jne 9f\n"
        "pushfq\n pop %%rcx\n test $0x400, %%ecx\n jz 9f\n"
        "movq $1, 120(%%rax)\n jmp 10f\n"
        "9: movq $0, 120(%%rax)\n"
        "10: cld\n pop %%rax\n add $128, %%rsp\n pop %%rbx\n pop %%rbp\n"
        :: "a"(v), "d"(spins)
        : "rcx", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "memory", "cc");
    (void)bp_ok;
    if (v[15] != 1) bad("a general register changed");
    for (int i = 0; i < 15; i++) if (v[i] != w[i]) bad("memory of the general registers changed");
}
static void x87(uint64_t seed) {
    double a = (double)(seed % 1000) + 0.25, r;
    uint16_t cw = 0x0c7f | 0x0300, got; /* round toward zero */
    uint32_t mx = 0x1f80 | 0x6000, gmx;
    asm volatile("fninit\n fldcw %3\n fldl %2\n fld1\n fldpi\n mov %4, %%ecx\n 1: dec %%ecx\n jnz 1b\n"
                 "fnstcw %1\n fstp %%st(0)\n faddp\n fstpl %0\n fninit"
                 : "=m"(r), "=m"(got) : "m"(a), "m"(cw), "i"(SPIN) : "rcx", "st", "st(1)", "st(2)");
    if (r != a + 1 || got != cw) bad("x87 state changed");
    asm volatile("ldmxcsr %1\n mov %2, %%ecx\n 1: dec %%ecx\n jnz 1b\n stmxcsr %0" : "=m"(gmx) : "m"(mx), "i"(SPIN) : "rcx");
    uint32_t usual = 0x1f80;
    asm volatile("ldmxcsr %0" :: "m"(usual));
    if (gmx != mx) bad("mxcsr changed");
}
#define LOAD(k, r, w) "vmovdqu" k " " #w "*" #r "(%0), %%"
static void sse(uint64_t seed) {
    uint64_t in[32], back[32];
    fill(in, sizeof in, seed);
#define L(n) "movdqu " #n "*16(%0), %%xmm" #n "\n"
#define S(n) "movdqu %%xmm" #n ", " #n "*16(%1)\n"
    asm volatile(L(0) L(1) L(2) L(3) L(4) L(5) L(6) L(7) L(8) L(9) L(10) L(11) L(12) L(13) L(14) L(15)
                 "mov %2, %%ecx\n 1: dec %%ecx\n jnz 1b\n"
                 S(0) S(1) S(2) S(3) S(4) S(5) S(6) S(7) S(8) S(9) S(10) S(11) S(12) S(13) S(14) S(15)
                 :: "r"(in), "r"(back), "i"(SPIN) : "rcx", "memory", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6",
                 "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15");
#undef L
#undef S
    if (memcmp(in, back, sizeof in)) bad("an xmm register changed");
}
__attribute__((target("avx2"))) static void avx(uint64_t seed) {
    uint64_t in[64], back[64];
    fill(in, sizeof in, seed);
#define L(n) "vmovdqu " #n "*32(%0), %%ymm" #n "\n"
#define S(n) "vmovdqu %%ymm" #n ", " #n "*32(%1)\n"
    asm volatile(L(0) L(1) L(2) L(3) L(4) L(5) L(6) L(7) L(8) L(9) L(10) L(11) L(12) L(13) L(14) L(15)
                 "mov %2, %%ecx\n 1: dec %%ecx\n jnz 1b\n"
                 S(0) S(1) S(2) S(3) S(4) S(5) S(6) S(7) S(8) S(9) S(10) S(11) S(12) S(13) S(14) S(15) "vzeroupper"
                 :: "r"(in), "r"(back), "i"(SPIN) : "rcx", "memory", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6",
                 "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15");
#undef L
#undef S
    if (memcmp(in, back, sizeof in)) bad("a ymm register changed");
}
__attribute__((target("avx512f,avx512bw"))) static void avx512(uint64_t seed) {
    uint64_t in[264], back[264];
    fill(in, sizeof in, seed);
#define L(n) "vmovdqu64 " #n "*64(%0), %%zmm" #n "\n"
#define S(n) "vmovdqu64 %%zmm" #n ", " #n "*64(%1)\n"
#define K(n) "kmovq 2048+" #n "*8(%0), %%k" #n "\n"
#define T(n) "kmovq %%k" #n ", 2048+" #n "*8(%1)\n"
    asm volatile(L(0) L(1) L(2) L(3) L(4) L(5) L(6) L(7) L(8) L(9) L(10) L(11) L(12) L(13) L(14) L(15)
                 L(16) L(17) L(18) L(19) L(20) L(21) L(22) L(23) L(24) L(25) L(26) L(27) L(28) L(29) L(30) L(31)
                 K(0) K(1) K(2) K(3) K(4) K(5) K(6) K(7)
                 "mov %2, %%ecx\n 1: dec %%ecx\n jnz 1b\n"
                 S(0) S(1) S(2) S(3) S(4) S(5) S(6) S(7) S(8) S(9) S(10) S(11) S(12) S(13) S(14) S(15)
                 S(16) S(17) S(18) S(19) S(20) S(21) S(22) S(23) S(24) S(25) S(26) S(27) S(28) S(29) S(30) S(31)
                 T(0) T(1) T(2) T(3) T(4) T(5) T(6) T(7) "vzeroupper"
                 :: "r"(in), "r"(back), "i"(SPIN)
                 : "rcx", "memory", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10",
                 "xmm11", "xmm12", "xmm13", "xmm14", "xmm15", "xmm16", "xmm17", "xmm18", "xmm19", "xmm20", "xmm21",
                 "xmm22", "xmm23", "xmm24", "xmm25", "xmm26", "xmm27", "xmm28", "xmm29", "xmm30", "xmm31",
                 "k1", "k2", "k3", "k4", "k5", "k6", "k7");
    if (memcmp(in, back, sizeof in)) bad("a zmm or mask register changed");
}
static void *spin(void *p) {
    long kind = (long)p;
    for (uint64_t seed = kind * 1000003;; seed++) {
        switch (kind) {
            case 0: general(seed); break;
            case 1: x87(seed); break;
            case 2: sse(seed); break;
            case 3: avx(seed); break;
            default: avx512(seed);
        }
        rounds[kind]++;
    }
    return 0;
}
int main(int argc, char **argv) {
    begin(argc, argv);
    kinds = __builtin_cpu_supports("avx512bw") ? 5 : __builtin_cpu_supports("avx2") ? 4 : 3;
    for (long i = 0; i < kinds; i++) spawn(spin, (void *)i);
    uint64_t last[8] = {0};
    for (;;) {
        nap(50);
        for (int i = 0; i < kinds; i++) {
            for (int tries = 0; rounds[i] == last[i]; tries++) { if (tries > 500) bad("thread %d stands", i); nap(10); }
            last[i] = rounds[i];
        }
        tick();
    }
}
