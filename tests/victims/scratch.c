/* Files that live as long as the program: on tmpfs (argv[3] is a directory there), and scratch files elsewhere.
 * Names must lead to what is open and mapped, with modes and contents, whoever wiped or changed them meanwhile.
 * argv[4] is what it has besides: "given", a file that was there before; "linked", one with a name elsewhere only;
 * "large", one that no spare copy is taken of; "other", one of /proc about a process that is not dumped;
 * "pair", a child with which it shares a page of a file that neither has open. */
#include "check.h"
#define SIZE 65536
static const char *memory;
static char *in_memory(const char *name) { char *p; if (asprintf(&p, "%s/%s", memory, name) < 0) abort(); return p; }
static int make(char *path, int flags, mode_t mode) { int fd = open(path, flags | O_CREAT | O_EXCL | O_CLOEXEC, mode); if (fd < 0) bad("%s", path); CHECK(!fchmod(fd, mode)); return fd; }
/* The name leads to the file with this mode and, if it is open, to the open one. */
static void is(char *path, int fd, mode_t mode) {
    struct stat named, held;
    if (stat(path, &named)) bad("%s is gone", path);
    SAME(named.st_mode, mode);
    if (fd < 0) return;
    CHECK(!fstat(fd, &held));
    if (held.st_ino != named.st_ino || held.st_dev != named.st_dev) bad("%s is inode %lu, with %lu links, and what is open is %lu, with %lu", path, (unsigned long)named.st_ino, (unsigned long)named.st_nlink, (unsigned long)held.st_ino, (unsigned long)held.st_nlink);
}
static void *shared(char *path, mode_t mode) { int fd = make(path, O_RDWR, mode); CHECK(!ftruncate(fd, SIZE)); void *p = map(SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0); fill(p, SIZE, 1); close(fd); return p; }
/* A mapping without a descriptor: what was written to it last is in it, and in the file of its name. */
static void turn(char *path, char *p, uint64_t n) {
    static char buf[SIZE];
    if (!same(p, SIZE, n)) bad("%s, as mapped, is not of turn %lu", path, (unsigned long)n);
    fill(p, SIZE, n + 1);
    int fd = open(path, O_RDONLY | O_CLOEXEC); if (fd < 0) bad("%s", path);
    CHECK(read(fd, buf, SIZE) == SIZE); if (!same(buf, SIZE, n + 1)) bad("%s is another file than the one mapped", path);
    close(fd);
}
/* Two processes that met at a file, which neither has open any more; the child answers each odd number by the next. */
static volatile uint64_t *pair(void) { int fd = open(in_memory("pair"), O_RDWR | O_CLOEXEC); CHECK(fd >= 0); void *p = map(4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0); close(fd); return p; }
static void child(void) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    for (volatile uint64_t *word = pair();; nap(1)) if (*word & 1) ++*word;
}
int main(int argc, char **argv) {
    begin(argc, argv);
    memory = argc > 3 ? argv[3] : dir;
    const char *what = argc > 4 ? argv[4] : "";
    char buf[64];
    for (const char **d = (const char *[]){"run", "run/deep", "run/open", "run/cwd", 0}; *d; d++) { CHECK(!mkdir(in_dir(*d), 0700)); CHECK(!chmod(in_dir(*d), 0751)); }
    CHECK(!chown(in_dir("run/deep"), 65534, 65533) || getuid());
    CHECK(!mkdir(in_memory("a"), 0750)); CHECK(!mkdir(in_memory("a/b"), 0710));
    char *segment = in_memory("a/b/segment"), *map1 = shared(segment, 0640);
    char *database = in_dir("run/deep/database"), *map2 = shared(database, 0604);
    char *held = in_memory("held"); int held_fd = make(held, O_RDWR, 0600); CHECK(!ftruncate(held_fd, 64 << 20)); CHECK(pwrite(held_fd, "middle", 6, 32 << 20) == 6); CHECK(pwrite(held_fd, "end", 3, (64 << 20) - 3) == 3); CHECK(lseek(held_fd, 5, SEEK_SET) == 5);
    char *shown = in_memory("shown"); int shown_fd = make(shown, O_RDWR, 0644); CHECK(write(shown_fd, "as it was", 9) == 9); close(shown_fd); shown_fd = open(shown, O_RDONLY | O_CLOEXEC);
    char *small = in_dir("run/small"); int small_fd = make(small, O_RDWR, 0660); CHECK(write(small_fd, "small one", 9) == 9);
    char *fifo = in_dir("run/fifo"); CHECK(!mkfifo(fifo, 0620)); CHECK(!chmod(fifo, 0620)); int fifo_fd = open(fifo, O_RDWR | O_NONBLOCK | O_CLOEXEC); CHECK(write(fifo_fd, "queue", 5) == 5);
    int open_dir = open(in_dir("run/open"), O_RDONLY | O_DIRECTORY | O_CLOEXEC); CHECK(open_dir >= 0); CHECK(!chdir(in_dir("run/cwd")));
    struct sockaddr_un name = {.sun_family = AF_UNIX}; snprintf(name.sun_path, sizeof name.sun_path, "%s", in_dir("run/deep/sock"));
    int listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0); CHECK(!bind(listener, (void *)&name, sizeof name) && !listen(listener, 3));
    /* Renamed, or left with its second name, while open. */
    int moved = make(in_dir("moved-1"), O_RDWR, 0600); CHECK(write(moved, "moved", 5) == 5); CHECK(!rename(in_dir("moved-1"), in_dir("moved-2")));
    int second = make(in_dir("name-1"), O_RDWR, 0600); CHECK(write(second, "second", 6) == 6); CHECK(!link(in_dir("name-1"), in_dir("name-2"))); CHECK(!unlink(in_dir("name-1")));
    int nameless = open(dir, O_TMPFILE | O_RDWR | O_CLOEXEC, 0600); CHECK(nameless >= 0 && write(nameless, "nameless", 8) == 8);
    int given = -1; if (!strcmp(what, "given")) { given = open(in_dir("given"), O_RDONLY | O_CLOEXEC); CHECK(given >= 0); }
    if (!strcmp(what, "large")) { int fd = make(in_dir("large"), O_RDWR, 0600); CHECK(!posix_fallocate(fd, 0, 300 << 20)); map(300 << 20, PROT_READ, MAP_SHARED, fd, 0); close(fd); }
    if (!strcmp(what, "other")) CHECK(open("/proc/1/status", O_RDONLY | O_CLOEXEC) >= 0);
    if (!strcmp(what, "linked")) { int fd = make(in_dir("here"), O_RDWR, 0600); CHECK(!link(in_dir("here"), in_dir("run/there"))); CHECK(!unlink(in_dir("here"))); (void)fd; }
    volatile uint64_t *word = 0;
    if (!strcmp(what, "pair")) { int fd = make(in_memory("pair"), O_RDWR, 0600); CHECK(!ftruncate(fd, 4096)); close(fd); pid_t pid = fork(); CHECK(pid >= 0); if (!pid) child(); dprintf(out, "child %d\n", pid); word = pair(); }
    for (uint64_t n = 1;; n++, tick()) {
        if (word) { SAME(*word & 1, 0); uint64_t now = ++*word; for (int i = 0; *word == now; i++) { if (i == 5000) bad("nobody answers in the shared page"); nap(1); } SAME(*word, now + 1); }
        turn(segment, map1, n); turn(database, map2, n);
        is(segment, -1, S_IFREG | 0640); is(database, -1, S_IFREG | 0604); is(in_memory("a"), -1, S_IFDIR | 0750); is(in_memory("a/b"), -1, S_IFDIR | 0710);
        is(held, held_fd, S_IFREG | 0600); SAME(lseek(held_fd, 0, SEEK_CUR), 5); SAME(lseek(held_fd, 0, SEEK_END), 64 << 20); SAME(lseek(held_fd, 5, SEEK_SET), 5);
        CHECK(pread(held_fd, buf, 6, 32 << 20) == 6 && !memcmp(buf, "middle", 6)); CHECK(pread(held_fd, buf, 4, (64 << 20) - 3) == 3 && !memcmp(buf, "end", 3)); CHECK(pread(held_fd, buf, 64, 48 << 20) == 64 && zero(buf, 64));
        struct stat s; CHECK(!fstat(held_fd, &s)); CHECK(s.st_blocks < 200);
        is(shown, shown_fd, S_IFREG | 0644); SAME(pread(shown_fd, buf, 64, 0), 9);
        is(small, small_fd, S_IFREG | 0660); CHECK(pread(small_fd, buf, 64, 0) == 9 && !memcmp(buf, "small one", 9));
        is(fifo, fifo_fd, S_IFIFO | 0620); SAME(read(fifo_fd, buf, 64), 5); CHECK(!memcmp(buf, "queue", 5)); CHECK(write(fifo_fd, "queue", 5) == 5);
        is(in_dir("run"), -1, S_IFDIR | 0751); is(in_dir("run/deep"), -1, S_IFDIR | 0751); is(in_dir("run/open"), open_dir, S_IFDIR | 0751); is(in_dir("run/cwd"), -1, S_IFDIR | 0751); CHECK(!stat(in_dir("run/deep"), &s)); SAME(s.st_uid, getuid() ? getuid() : 65534);
        struct stat t; CHECK(!stat(".", &s) && !stat(in_dir("run/cwd"), &t)); SAME(s.st_ino, t.st_ino);
        /* Now and then: a dump that sees it halfway is refused. */
        if (n % 5 == 0) { int client = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0); if (connect(client, (void *)&name, sizeof name)) bad("nobody answers at %s", name.sun_path); int server = accept4(listener, 0, 0, SOCK_CLOEXEC); CHECK(server >= 0); close(client); close(server); }
        is(in_dir("moved-2"), moved, S_IFREG | 0600); is(in_dir("name-2"), second, S_IFREG | 0600); CHECK(pread(second, buf, 64, 0) == 6 && !memcmp(buf, "second", 6));
        CHECK(pread(nameless, buf, 64, 0) == 8 && !memcmp(buf, "nameless", 8)); CHECK(!fstat(nameless, &s)); SAME(s.st_nlink, 0);
        if (given >= 0) { is(in_dir("given"), given, S_IFREG | 0644); CHECK(pread(given, buf, 64, 0) == 5 && !memcmp(buf, "given", 5)); }
        nap(20);
    }
}
