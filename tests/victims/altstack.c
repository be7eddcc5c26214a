/* A thread that lives in a handler on its alternate stack, and another whose stack is armed but unused. */
#include "check.h"
#define SS_AUTODISARM_FLAG (1U << 31)
static char *stack[2];
static const size_t size = 65536;
static volatile uint64_t in_handler, outside;
static volatile sig_atomic_t hit;
static int on(int i, void *p) { return (char *)p >= stack[i] && (char *)p < stack[i] + size; }
static void stay(int s) {
    char here;
    volatile uint64_t canary[64];
    fill((void *)canary, sizeof canary, 5);
    (void)s;
    for (;;) {
        CHECK(on(0, &here)); CHECK(same((void *)canary, sizeof canary, 5));
        stack_t st; CHECK(!sigaltstack(0, &st));
        CHECK(st.ss_sp == stack[0] && st.ss_size == size); SAME(st.ss_flags, SS_ONSTACK);
        in_handler++;
        if (in_handler % 50 == 0) return; /* the frame it goes back through must hold */
        usleep(1000);
    }
}
static void mark(int s) { char here; (void)s; hit = on(1, &here); }
static void arm(int i, int flags) {
    stack[i] = map(size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    stack_t st = {.ss_sp = stack[i], .ss_size = size, .ss_flags = flags};
    CHECK(!sigaltstack(&st, 0));
}
static void *inside(void *p) {
    (void)p; arm(0, 0);
    for (uint64_t n = 0;; n++) {
        double x = 1.5 * n;
        raise(SIGUSR1);
        CHECK(x == 1.5 * n);
        stack_t st; CHECK(!sigaltstack(0, &st)); SAME(st.ss_flags, 0); CHECK(st.ss_sp == stack[0]);
    }
    return 0;
}
static void *ready(void *p) {
    (void)p; arm(1, SS_AUTODISARM_FLAG);
    for (;;) {
        stack_t st; CHECK(!sigaltstack(0, &st)); CHECK(st.ss_sp == stack[1] && st.ss_size == size); SAME((unsigned)st.ss_flags, (unsigned)SS_AUTODISARM_FLAG);
        hit = 0; raise(SIGUSR2); CHECK(hit == 1);
        outside++;
        usleep(1000);
    }
    return 0;
}
int main(int argc, char **argv) {
    begin(argc, argv);
    struct sigaction sa = {.sa_handler = stay, .sa_flags = SA_ONSTACK}; CHECK(!sigaction(SIGUSR1, &sa, 0));
    sa.sa_handler = mark; CHECK(!sigaction(SIGUSR2, &sa, 0));
    spawn(inside, 0); spawn(ready, 0);
    for (uint64_t a = 0, b = 0;; tick()) {
        nap(60);
        for (int tries = 0; in_handler == a || outside == b; tries++) { CHECK(tries < 500); nap(10); }
        a = in_handler; b = outside;
    }
}
