/* A thread that waits for its vfork child for good. */
#include "family.h"
static void *wait_for_ever(void *arg) { (void)arg; if (!vfork()) for (;;) syscall(SYS_pause); return 0; }
int main(int argc, char **argv) { begin_family(argc, argv); pthread_t t; pthread_create(&t, 0, wait_for_ever, 0); for (;;) { tick(); nap(20); } }
