/* inotify: several watches, a gap in their numbers, events for each only. */
#include "check.h"
static int next(int fd, int wd, uint32_t mask, const char *name) {
    char buf[4096]; ssize_t n = read(fd, buf, sizeof buf);
    for (char *p = buf; n > 0 && p < buf + n;) { struct inotify_event *e = (void *)p; if (e->wd == wd && (e->mask & mask) && (!name || (e->len && !strcmp(e->name, name)))) return 1; p += sizeof *e + e->len; }
    return 0;
}
static void touch(const char *name) { char *p = in_dir(name); int f = open(p, O_CREAT | O_WRONLY, 0600); CHECK(f >= 0); close(f); CHECK(!unlink(p)); free(p); }
int main(int argc, char **argv) {
    begin(argc, argv);
    CHECK(!mkdir(in_dir("a"), 0700)); CHECK(!mkdir(in_dir("b"), 0700)); CHECK(!mkdir(in_dir("c"), 0700)); close(open(in_dir("f"), O_CREAT | O_WRONLY, 0600));
    int i = inotify_init1(IN_NONBLOCK | IN_CLOEXEC), j = inotify_init1(IN_NONBLOCK);
    int a = inotify_add_watch(i, in_dir("a"), IN_CREATE | IN_DELETE), gap1 = inotify_add_watch(i, in_dir("b"), IN_CREATE), gap2 = inotify_add_watch(i, in_dir("c"), IN_CREATE), f = inotify_add_watch(i, in_dir("f"), IN_MODIFY | IN_ATTRIB);
    CHECK(!inotify_rm_watch(i, gap1)); CHECK(!inotify_rm_watch(i, gap2)); int c = inotify_add_watch(i, in_dir("c"), IN_CREATE | IN_ONLYDIR);
    int ja = inotify_add_watch(j, in_dir("a"), IN_CREATE);
    CHECK(a == 1 && f == 4 && c == 5); char buf[4096]; while (read(i, buf, sizeof buf) > 0) {}
    for (;; tick()) {
        CHECK(read(i, buf, sizeof buf) < 0 && errno == EAGAIN); CHECK(read(j, buf, sizeof buf) < 0 && errno == EAGAIN);
        touch("a/x"); CHECK(next(i, a, IN_CREATE, "x")); CHECK(next(j, ja, IN_CREATE, "x"));
        touch("b/x"); CHECK(read(i, buf, sizeof buf) < 0 && errno == EAGAIN);
        touch("c/y"); CHECK(next(i, c, IN_CREATE, "y")); CHECK(!next(i, c, IN_DELETE, "y"));
        int w = open(in_dir("f"), O_WRONLY); CHECK(write(w, "x", 1) == 1); close(w); CHECK(next(i, f, IN_MODIFY, 0)); while (read(j, buf, sizeof buf) > 0) {}
        SAME(inotify_add_watch(i, in_dir("f"), IN_MODIFY | IN_ATTRIB), f);
        nap(20);
    }
}
