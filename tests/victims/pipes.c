/* Pipes and FIFOs: content in order, capacity, ends that are closed. */
#include "check.h"
int main(int argc, char **argv) {
    begin(argc, argv);
    signal(SIGPIPE, SIG_IGN);
    char buf[70000];
    int a[2]; CHECK(!pipe2(a, O_NONBLOCK | O_CLOEXEC)); SAME(fcntl(a[1], F_SETPIPE_SZ, 32768), 32768); fill(buf, 32768, 1); CHECK(write(a[1], buf, 32768) == 32768); CHECK(write(a[1], "x", 1) < 0);
    int b[2]; CHECK(!pipe2(b, O_NONBLOCK)); CHECK(write(b[1], "in three", 8) == 8); CHECK(write(b[1], " parts", 6) == 6); CHECK(write(b[1], ".", 1) == 1); int b2 = dup(b[0]);
    int eof[2]; CHECK(!pipe(eof)); CHECK(write(eof[1], "last words", 10) == 10); close(eof[1]); fcntl(eof[0], F_SETFL, O_NONBLOCK);
    int broken[2]; CHECK(!pipe(broken)); close(broken[0]);
    int empty[2]; CHECK(!pipe2(empty, O_NONBLOCK)); fcntl(empty[1], F_SETFL, 0); /* flags of each end */
    int packet[2]; int has_packets = !pipe2(packet, O_DIRECT | O_NONBLOCK);
    mkfifo(in_dir("fifo"), 0600); int ff = open(in_dir("fifo"), O_RDWR | O_NONBLOCK); CHECK(write(ff, "fifo", 4) == 4); int fr = open(in_dir("fifo"), O_RDONLY | O_NONBLOCK);
    mkfifo(in_dir("fifo2"), 0600); int f2 = open(in_dir("fifo2"), O_RDONLY | O_NONBLOCK); int f3 = open(in_dir("fifo2"), O_WRONLY | O_NONBLOCK); CHECK(write(f3, "one way", 7) == 7);
    (void)has_packets; if (has_packets) { close(packet[0]); close(packet[1]); }
    for (int n = 0;; n++, tick()) {
        SAME(fcntl(a[1], F_GETPIPE_SZ), 32768); CHECK(write(a[1], "x", 1) < 0 && errno == EAGAIN); SAME(read(a[0], buf, sizeof buf), 32768); CHECK(same(buf, 32768, 1 + n)); fill(buf, 32768, 2 + n); CHECK(write(a[1], buf, 32768) == 32768);
        SAME(fcntl(a[0], F_GETFD), FD_CLOEXEC); SAME(fcntl(b[0], F_GETFD), 0);
        SAME(read(b2, buf, 100), 15); CHECK(!memcmp(buf, "in three parts.", 15)); CHECK(write(b[1], "in three", 8) == 8 && write(b[1], " parts", 6) == 6 && write(b[1], ".", 1) == 1);
        if (n % 30 == 29) { SAME(read(eof[0], buf, 4), 4); CHECK(!memcmp(buf, "last", 4)); SAME(read(eof[0], buf, 100), 6); SAME(read(eof[0], buf, 100), 0); close(eof[0]); CHECK(!pipe(eof)); CHECK(write(eof[1], "last words", 10) == 10); close(eof[1]); fcntl(eof[0], F_SETFL, O_NONBLOCK); }
        CHECK(write(broken[1], "x", 1) < 0 && errno == EPIPE); CHECK(read(empty[0], buf, 1) < 0 && errno == EAGAIN); SAME(fcntl(empty[1], F_GETFL) & O_NONBLOCK, 0);
        struct stat s; CHECK(!fstat(ff, &s) && S_ISFIFO(s.st_mode)); SAME(read(fr, buf, 64), 4); CHECK(!memcmp(buf, "fifo", 4)); CHECK(write(ff, "fifo", 4) == 4);
        int other = open(in_dir("fifo"), O_WRONLY | O_NONBLOCK); CHECK(other >= 0 && write(other, "!", 1) == 1); close(other); SAME(read(ff, buf, 64), 5); CHECK(!memcmp(buf, "fifo!", 5)); CHECK(write(ff, "fifo", 4) == 4);
        SAME(read(f2, buf, 64), 7); CHECK(write(f3, "one way", 7) == 7); CHECK(write(f2, "x", 1) < 0 && errno == EBADF);
        nap(20);
    }
}
