/* unix(7): a connection with data in it that nobody has accepted: for 30 ms out of 60, or with "ever", for good. */
#include "check.h"
static int late(const char *path) { int s = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0); struct sockaddr_un un = {.sun_family = AF_UNIX}; strncpy(un.sun_path, path, sizeof un.sun_path - 1); CHECK(!connect(s, (void *)&un, sizeof un)); CHECK(write(s, "early", 5) == 5); return s; }
int main(int argc, char **argv) {
    begin(argc, argv); char *path = in_dir("late"); int l = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0); struct sockaddr_un un = {.sun_family = AF_UNIX}; strncpy(un.sun_path, path, sizeof un.sun_path - 1); CHECK(!bind(l, (void *)&un, sizeof un) && !listen(l, 3));
    for (int n = 0;; n++, tick()) { char b[9]; int c = n && argc > 3 ? -1 : late(path), s; nap(30); if (argc > 3) continue; s = accept(l, 0, 0); CHECK(s >= 0); SAME(read(s, b, 9), 5); close(s); close(c); nap(30); }
}
