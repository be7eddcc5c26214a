/* A thread that nothing interrupts: it asks a file system (argv[3]) that never answers. */
#include "check.h"
static void *ask(void *path) { struct stat st; stat(path, &st); for (;;) nap(1000); }
int main(int argc, char **argv) {
    begin(argc, argv); CHECK(argc > 3);
    spawn(ask, argv[3]);
    for (;;) { tick(); nap(5); }
}
