/* Files, directories, devices: offsets, flags, duplicates, deleted ones with their content. */
#include "check.h"
static int opened(const char *name, int flags) { char *p = in_dir(name); int fd = open(p, flags | O_CREAT, 0640); if (fd < 0) bad("%s", name); free(p); return fd; }
int main(int argc, char **argv) {
    begin(argc, argv);
    char buf[128]; struct stat s;
    int plain = opened("plain", O_RDWR | O_TRUNC); CHECK(write(plain, "0123456789", 10) == 10); CHECK(lseek(plain, 4, SEEK_SET) == 4);
    int dup1 = fcntl(plain, F_DUPFD_CLOEXEC, 200), dup2_ = dup(plain);
    int again = opened("plain", O_RDONLY); CHECK(lseek(again, 7, SEEK_SET) == 7);
    int high = fcntl(again, F_DUPFD, 900); close(again);
    int append = opened("append", O_WRONLY | O_APPEND | O_TRUNC | O_NONBLOCK); CHECK(write(append, "a", 1) == 1);
    int sync_ = opened("sync", O_RDWR | O_DSYNC);
    int path = open(in_dir("plain"), O_PATH); int directory = open(dir, O_RDONLY | O_DIRECTORY);
    int noatime = open(in_dir("plain"), O_RDONLY | O_NOATIME);
    /* Deleted: small, and 100 MiB with little in it. */
    int gone = opened("gone", O_RDWR | O_TRUNC); CHECK(write(gone, "deleted but open", 16) == 16); CHECK(lseek(gone, 3, SEEK_SET) == 3); CHECK(!fchmod(gone, 0604)); unlink(in_dir("gone"));
    int gonero = opened("gonero", O_RDWR | O_TRUNC); CHECK(write(gonero, "read only", 9) == 9); close(gonero); gonero = open(in_dir("gonero"), O_RDONLY); int gonewr = open(in_dir("gonero"), O_WRONLY | O_APPEND); unlink(in_dir("gonero"));
    int sparse = opened("sparse", O_RDWR | O_TRUNC); CHECK(!ftruncate(sparse, 100 << 20)); char block[4096]; for (int i = 0; i < 10; i++) { fill(block, sizeof block, 50 + i); CHECK(pwrite(sparse, block, sizeof block, (10l << 20) * i + 4096) == 4096); } CHECK(pwrite(sparse, "tail", 4, (100 << 20) - 4) == 4); unlink(in_dir("sparse"));
    int null = open("/dev/null", O_WRONLY), zero_ = open("/dev/zero", O_RDONLY), full = open("/dev/full", O_WRONLY), rnd = open("/dev/urandom", O_RDONLY), rnd2 = open("/dev/random", O_RDONLY | O_NONBLOCK);
    /* Files about itself, and one of /proc about nobody. */
    int status = open("/proc/self/status", O_RDONLY), status2 = fcntl(status, F_DUPFD_CLOEXEC, 300), maps = open("/proc/self/maps", O_RDONLY | O_CLOEXEC), comm = open("/proc/thread-self/comm", O_RDWR), self = open("/proc/self", O_RDONLY | O_DIRECTORY), ostype = open("/proc/sys/kernel/ostype", O_RDONLY);
    int closed = dup(null); close(closed); /* a hole in the table */
    int last = fcntl(null, F_DUPFD, 1000);
    CHECK(!fcntl(plain, F_SETOWN, getpid()));
    CHECK(read(maps, buf, 100) == 100); CHECK(lseek(status, 5, SEEK_SET) == 5);
    char name[32], about[4096];
    for (uint64_t n = 1;; n++, tick()) {
        SAME(lseek(plain, 0, SEEK_CUR), 4); SAME(lseek(dup1, 0, SEEK_CUR), 4); SAME(lseek(dup1, 6, SEEK_SET), 6); SAME(lseek(dup2_, 0, SEEK_CUR), 6); SAME(lseek(plain, 4, SEEK_SET), 4);
        SAME(lseek(high, 0, SEEK_CUR), 7); CHECK(read(high, buf, 3) == 3 && !memcmp(buf, "789", 3)); SAME(lseek(high, 7, SEEK_SET), 7);
        SAME(fcntl(dup1, F_GETFD), FD_CLOEXEC); SAME(fcntl(plain, F_GETFD), 0); SAME(fcntl(plain, F_GETOWN), getpid());
        SAME(fcntl(plain, F_GETFL) & O_ACCMODE, O_RDWR); CHECK(write(high, "x", 1) < 0 && errno == EBADF);
        SAME(fcntl(append, F_GETFL) & (O_ACCMODE | O_APPEND | O_NONBLOCK), O_WRONLY | O_APPEND | O_NONBLOCK); CHECK(write(append, "b", 1) == 1); CHECK(!fstat(append, &s)); SAME(s.st_size, (off_t)n + 1);
        SAME(fcntl(sync_, F_GETFL) & O_DSYNC, O_DSYNC); SAME(fcntl(path, F_GETFL) & O_PATH, O_PATH); CHECK(read(path, buf, 1) < 0 && errno == EBADF); SAME(fcntl(noatime, F_GETFL) & O_NOATIME, O_NOATIME);
        CHECK(!fstat(directory, &s) && S_ISDIR(s.st_mode)); CHECK(faccessat(directory, "plain", F_OK, 0) == 0);
        SAME(lseek(gone, 0, SEEK_CUR), 3); CHECK(pread(gone, buf, 64, 0) == 16 && !memcmp(buf, "deleted but open", 16)); CHECK(!fstat(gone, &s)); SAME(s.st_nlink, 0); SAME(s.st_mode & 0777, 0604);
        CHECK(pread(gonero, buf, 64, 0) == (ssize_t)(8 + n) && !memcmp(buf, "read only", 9)); CHECK(write(gonewr, "+", 1) == 1); CHECK(pread(gonero, buf, 1, 8 + n) == 1 && *buf == '+'); if (n > 50) { CHECK(!ftruncate(gonewr, 9)); n = 0; CHECK(!ftruncate(append, 1)); }
        CHECK(!fstat(sparse, &s)); SAME(s.st_size, 100 << 20); CHECK(s.st_blocks < 20000); for (int i = 0; i < 10; i++) { CHECK(pread(sparse, block, sizeof block, (10l << 20) * i + 4096) == 4096 && same(block, sizeof block, 50 + i)); CHECK(pread(sparse, block, sizeof block, (10l << 20) * i + 8192) == 4096 && zero(block, sizeof block)); } CHECK(pread(sparse, buf, 8, (100 << 20) - 4) == 4 && !memcmp(buf, "tail", 4));
        CHECK(write(null, "x", 1) == 1); CHECK(read(zero_, buf, 8) == 8 && zero(buf, 8)); CHECK(write(full, "x", 1) < 0 && errno == ENOSPC); CHECK(read(rnd, buf, 8) == 8); CHECK(read(rnd2, buf, 8) == 8); CHECK(write(last, "x", 1) == 1); SAME(fcntl(closed, F_GETFD), -1);
        SAME(lseek(maps, 0, SEEK_CUR), 100); SAME(fcntl(maps, F_GETFD), FD_CLOEXEC); SAME(lseek(status, 0, SEEK_CUR), 5); SAME(lseek(status2, 0, SEEK_CUR), 5); SAME(fcntl(status2, F_GETFD), FD_CLOEXEC); SAME(fcntl(status, F_GETFD), 0);
        ssize_t got = pread(status2, about, sizeof about - 1, 0); CHECK(got > 0); about[got] = 0; snprintf(name, sizeof name, "Pid:\t%d\n", getpid()); CHECK(strstr(about, name));
        CHECK(pread(maps, buf, 12, 0) == 12); snprintf(name, sizeof name, "n%lu", (unsigned long)n); CHECK(write(comm, name, strlen(name)) == (ssize_t)strlen(name)); CHECK(!prctl(PR_GET_NAME, about) && !strcmp(about, name)); CHECK(!faccessat(self, "task", F_OK, 0)); CHECK(pread(ostype, buf, 6, 0) == 6 && !memcmp(buf, "Linux\n", 6));
        int fresh = dup(null); SAME(fresh, closed); close(fresh);
        nap(20);
    }
}
