/* Pipes and FIFOs: content in order, packets, capacity, ends that are closed. */
#include "check.h"
#define PACKETS do { static char page[4096]; fill(page, 4096, 7); CHECK(write(packet[1], "1", 1) == 1 && write(packet[1], page, 4096) == 4096 && write(packet[1], "cut off", 7) == 7 && write(packet[1], "last", 4) == 4); } while (0)
/* A short packet behind a stream becomes a part of it, unless the page is full: then it stays one. */
#define MIXED do { int w = mixed[1]; static char page[4096]; fill(page, 4096, 9); CHECK(write(w, "stream", 6) == 6); fcntl(w, F_SETFL, O_NONBLOCK | O_DIRECT); CHECK(write(w, page, 4096) == 4096 && write(w, "34", 2) == 2); fcntl(w, F_SETFL, O_NONBLOCK); CHECK(write(w, "xy", 2) == 2 && write(w, "!!", 2) == 2); fcntl(w, F_SETFL, O_NONBLOCK | O_DIRECT); CHECK(write(w, "5", 1) == 1); fcntl(w, F_SETFL, O_NONBLOCK); } while (0)
#define FULL do { int w = full_[1]; static char page[4096]; fill(page, 4096, 10); CHECK(write(w, page, 4090) == 4090 && read(full_[0], page, 4000) == 4000); fcntl(w, F_SETFL, O_NONBLOCK | O_DIRECT); CHECK(write(w, page, 50) == 50); fcntl(w, F_SETFL, O_NONBLOCK); } while (0)
int main(int argc, char **argv) {
    begin(argc, argv);
    signal(SIGPIPE, SIG_IGN);
    char buf[70000];
    int a[2]; CHECK(!pipe2(a, O_NONBLOCK | O_CLOEXEC)); SAME(fcntl(a[1], F_SETPIPE_SZ, 32768), 32768); fill(buf, 32768, 1); CHECK(write(a[1], buf, 32768) == 32768); CHECK(write(a[1], "x", 1) < 0);
    int b[2]; CHECK(!pipe2(b, O_NONBLOCK)); CHECK(write(b[1], "in three", 8) == 8); CHECK(write(b[1], " parts", 6) == 6); CHECK(write(b[1], ".", 1) == 1); int b2 = dup(b[0]);
    int eof[2]; CHECK(!pipe(eof)); CHECK(write(eof[1], "last words", 10) == 10); close(eof[1]); fcntl(eof[0], F_SETFL, O_NONBLOCK);
    int broken[2]; CHECK(!pipe(broken)); close(broken[0]);
    int empty[2]; CHECK(!pipe2(empty, O_NONBLOCK)); fcntl(empty[1], F_SETFL, 0); /* flags of each end */
    /* Packets: of one byte, of a page, behind a stream, behind which a stream; and with the mode changed since. */
    int packet[2]; CHECK(!pipe2(packet, O_DIRECT | O_NONBLOCK)); PACKETS;
    int mixed[2]; CHECK(!pipe2(mixed, O_NONBLOCK)); MIXED;
    int full_[2]; CHECK(!pipe2(full_, O_NONBLOCK)); FULL;
    int turned[2]; CHECK(!pipe2(turned, O_DIRECT | O_NONBLOCK)); CHECK(write(turned[1], "one", 3) == 3 && write(turned[1], "2", 1) == 1); fcntl(turned[1], F_SETFL, O_NONBLOCK); int turns = 0;
    mkfifo(in_dir("fifo"), 0600); int ff = open(in_dir("fifo"), O_RDWR | O_NONBLOCK); CHECK(write(ff, "fifo", 4) == 4); int fr = open(in_dir("fifo"), O_RDONLY | O_NONBLOCK);
    mkfifo(in_dir("fifo2"), 0600); int f2 = open(in_dir("fifo2"), O_RDONLY | O_NONBLOCK); int f3 = open(in_dir("fifo2"), O_WRONLY | O_NONBLOCK); CHECK(write(f3, "one way", 7) == 7);
    mkfifo(in_dir("fifo3"), 0600); int fp = open(in_dir("fifo3"), O_RDWR | O_NONBLOCK); CHECK(!fcntl(fp, F_SETFL, O_NONBLOCK | O_DIRECT)); CHECK(write(fp, "ab", 2) == 2 && write(fp, "c", 1) == 1);
    for (int n = 0;; n++, tick()) {
        SAME(fcntl(a[1], F_GETPIPE_SZ), 32768); CHECK(write(a[1], "x", 1) < 0 && errno == EAGAIN); SAME(read(a[0], buf, sizeof buf), 32768); CHECK(same(buf, 32768, 1 + n)); fill(buf, 32768, 2 + n); CHECK(write(a[1], buf, 32768) == 32768);
        SAME(fcntl(a[0], F_GETFD), FD_CLOEXEC); SAME(fcntl(b[0], F_GETFD), 0);
        SAME(read(b2, buf, 100), 15); CHECK(!memcmp(buf, "in three parts.", 15)); CHECK(write(b[1], "in three", 8) == 8 && write(b[1], " parts", 6) == 6 && write(b[1], ".", 1) == 1);
        if (n % 30 == 29) { SAME(read(eof[0], buf, 4), 4); CHECK(!memcmp(buf, "last", 4)); SAME(read(eof[0], buf, 100), 6); SAME(read(eof[0], buf, 100), 0); close(eof[0]); CHECK(!pipe(eof)); CHECK(write(eof[1], "last words", 10) == 10); close(eof[1]); fcntl(eof[0], F_SETFL, O_NONBLOCK); }
        CHECK(write(broken[1], "x", 1) < 0 && errno == EPIPE); CHECK(read(empty[0], buf, 1) < 0 && errno == EAGAIN); SAME(fcntl(empty[1], F_GETFL) & O_NONBLOCK, 0);
        SAME(fcntl(packet[1], F_GETFL) & O_DIRECT, O_DIRECT); SAME(fcntl(mixed[1], F_GETFL) & O_DIRECT, 0);
        SAME(read(packet[0], buf, 100), 1); SAME(read(packet[0], buf, sizeof buf), 4096); CHECK(same(buf, 4096, 7)); SAME(read(packet[0], buf, 2), 2); CHECK(!memcmp(buf, "cu", 2)); SAME(read(packet[0], buf, 100), 4); CHECK(!memcmp(buf, "last", 4)); SAME(read(packet[0], buf, 100), -1); PACKETS;
        SAME(read(mixed[0], buf, 3), 3); CHECK(!memcmp(buf, "str", 3)); SAME(read(mixed[0], buf, 5000), 4099); CHECK(!memcmp(buf, "eam", 3)); memmove(buf, buf + 3, 4096); CHECK(same(buf, 4096, 9)); SAME(read(mixed[0], buf, 100), 2); CHECK(!memcmp(buf, "34", 2)); SAME(read(mixed[0], buf, 100), 5); CHECK(!memcmp(buf, "xy!!5", 5)); SAME(read(mixed[0], buf, 1), -1); MIXED;
        SAME(read(full_[0], buf, 100), 100); SAME(read(full_[0], buf, 100), -1); FULL;
        if (++turns == 8) { SAME(read(turned[0], buf, 100), 3); SAME(read(turned[0], buf, 100), 1); }
        SAME(read(fp, buf, 100), 2); SAME(read(fp, buf, 100), 1); CHECK(write(fp, "ab", 2) == 2 && write(fp, "c", 1) == 1);
        struct stat s; CHECK(!fstat(ff, &s) && S_ISFIFO(s.st_mode)); SAME(read(fr, buf, 64), 4); CHECK(!memcmp(buf, "fifo", 4)); CHECK(write(ff, "fifo", 4) == 4);
        int other = open(in_dir("fifo"), O_WRONLY | O_NONBLOCK); CHECK(other >= 0 && write(other, "!", 1) == 1); close(other); SAME(read(ff, buf, 64), 5); CHECK(!memcmp(buf, "fifo!", 5)); CHECK(write(ff, "fifo", 4) == 4);
        SAME(read(f2, buf, 64), 7); CHECK(write(f3, "one way", 7) == 7); CHECK(write(f2, "x", 1) < 0 && errno == EBADF);
        nap(20);
    }
}
