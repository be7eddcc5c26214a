/* Open file descriptions that several processes have, at other numbers: one position, one set of flags; pipes and FIFOs across the tree; epoll sets
 * shared, watching what is closed here and open there; locks that others see. */
#include "family.h"
static int is_locked(int fd, int start) { struct flock l = {.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = start, .l_len = 1}; CHECK(!fcntl(fd, F_GETLK, &l)); return l.l_type != F_UNLCK ? l.l_pid : 0; }
int main(int argc, char **argv) {
    begin_family(argc, argv); members = 3; int self = getpid();
    int file = open(in_dir("f"), O_CREAT | O_RDWR, 0600); int there[2], back[2]; CHECK(!pipe(there) && !pipe(back)); int pair[2]; CHECK(!socketpair(AF_UNIX, SOCK_STREAM, 0, pair));
    int ep = epoll_create1(0); int ev[2]; CHECK(!pipe(ev)); struct epoll_event e = {.events = EPOLLIN, .data.u64 = 0x1234567890}; CHECK(!epoll_ctl(ep, EPOLL_CTL_ADD, ev[0], &e));
    int flocked = open(in_dir("l"), O_CREAT | O_RDWR, 0600); CHECK(!flock(flocked, LOCK_EX)); int posix = open(in_dir("p"), O_CREAT | O_RDWR, 0600); struct flock l = {.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = 5, .l_len = 1}; CHECK(!fcntl(posix, F_SETLK, &l));
    CHECK(!mkfifo(in_dir("fifo"), 0600)); int fifo = open(in_dir("fifo"), O_RDWR);
    int one = fork();
    if (!one) { /* echoes, and moves the common position */
        CHECK(dup2(file, 100) == 100); close(file); close(ev[0]); l.l_start = 9; CHECK(!fcntl(posix, F_SETLK, &l)); char x;
        for (;;) { SAME(read(there[0], &x, 1), 1); CHECK(lseek(100, 1, SEEK_CUR) >= 1); int fl = fcntl(100, F_GETFL); CHECK(!fcntl(100, F_SETFL, fl ^ O_APPEND)); SAME(is_locked(posix, 5), self); int again = open(in_dir("l"), O_RDWR); SAME(flock(again, LOCK_EX | LOCK_NB), -1); close(again); SAME(write(back[1], &x, 1), 1); beat(0); }
    }
    int two = fork();
    if (!two) { /* answers on the socket; has closed what the set watches, and hears of it all the same */
        close(ev[0]); close(pair[0]); char text[64];
        for (;;) { ssize_t n = read(pair[1], text, sizeof text); CHECK(n > 0); struct epoll_event got; SAME(epoll_wait(ep, &got, 1, 0), 1); SAME(got.data.u64, 0x1234567890); SAME(write(pair[1], text, n), n); beat(1); }
    }
    if (!fork()) { char x; for (;;) { SAME(read(fifo, &x, 1), 1); beat(2); } }
    CHECK(write(ev[1], "!", 1) == 1); close(pair[1]);
    for (int n = 0;; n++) {
        off_t at = lseek(file, 0, SEEK_CUR); int flags = fcntl(file, F_GETFL); char x = 'a' + n % 26, y = 0, text[8] = {0};
        for (int i = 0; i < 2; i++) { SAME(write(there[1], &x, 1), 1); SAME(read(back[0], &y, 1), 1); SAME(x, y); CHECK(write(pair[0], "hello", 5) == 5); SAME(read(pair[0], text, 5), 5); CHECK(!strcmp(text, "hello")); SAME(write(fifo, "z", 1), 1); }
        SAME(lseek(file, 0, SEEK_CUR), at + 2); SAME(fcntl(file, F_GETFL), flags); while (is_locked(posix, 9) == 0) nap(1); SAME(is_locked(posix, 9), one);
        for (int i = 0; family->beat[2] < 2 * (uint64_t)(n + 1); i++) { CHECK(i < 5000); nap(1); }
        tick(); nap(5);
    }
}
