/* Rings that a dump refuses, by what they have under way or are: it must go on unharmed. */
#include "io_uring.h"
#include <linux/futex.h>
int main(int argc, char **argv) {
    begin(argc, argv);
    const char *what = argv[3];
    static char back[64];
    static struct __kernel_timespec far = {1000, 0};
    struct ring r;
#define IS(n) if (!strcmp(what, n))
    unsigned flags = 0;
    IS("sqpoll") flags = IORING_SETUP_SQPOLL;
    IS("iopoll") flags = IORING_SETUP_IOPOLL;
    IS("restricted") flags = IORING_SETUP_R_DISABLED;
    make(&r, 8, 16, flags);
    int p[2], fds[2] = {-1, -1}; CHECK(!pipe(p));
    char *fifo = in_dir("fifo"); unlink(fifo); CHECK(!mkfifo(fifo, 0600));
    struct io_uring_sqe *s = 0;
    IS("poll") { s = request(&r, IORING_OP_POLL_ADD); s->fd = p[0]; s->poll32_events = POLLIN; }
    IS("read") { s = request(&r, IORING_OP_READ); s->fd = p[0]; s->addr = (uintptr_t)back; s->len = 1; }
    IS("timeout") { s = request(&r, IORING_OP_TIMEOUT); s->addr = (uintptr_t)&far; s->len = 1; }
    /* Opening a FIFO that nobody writes to: only a worker can wait for that. */
    IS("worker") { s = request(&r, IORING_OP_OPENAT); s->fd = AT_FDCWD; s->addr = (uintptr_t)fifo; s->open_flags = O_RDONLY; s->flags = IOSQE_ASYNC; }
    IS("deferred") { s = request(&r, IORING_OP_TIMEOUT); s->addr = (uintptr_t)&far; s->len = 1; s = request(&r, IORING_OP_NOP); s->flags = IOSQE_IO_DRAIN; }
    if (s) { unsigned n = r.tail; SAME(submit(&r, n, 0), n); }
    IS("skipped") { s = request(&r, IORING_OP_NOP); s->flags = IOSQE_CQE_SKIP_SUCCESS; SAME(submit(&r, 1, 0), 1); r.wanted++; s = 0; }
    IS("hidden") {
        /* As many requests under way as completions too many: counts alone look like rest. */
        s = request(&r, IORING_OP_POLL_ADD); s->fd = p[0]; s->poll32_events = POLLIN; s->len = IORING_POLL_ADD_MULTI; SAME(submit(&r, 1, 0), 1);
        for (int i = 0; i < 2; i++) { CHECK(write(p[1], "x", 1) == 1); CHECK(read(p[0], back, 1) == 1); syscall(SYS_io_uring_enter, r.fd, 0, 0, IORING_ENTER_GETEVENTS, 0, 0); }
        s = request(&r, IORING_OP_TIMEOUT); s->addr = (uintptr_t)&far; s->len = 1; SAME(submit(&r, 1, 0), 1);
        SAME(*r.sq_head, *r.cq_tail);
    }
    IS("file") { int fd = open(in_dir("file"), O_CREAT | O_RDWR, 0600); fds[0] = fd; CHECK(!ring_register(r.fd, IORING_REGISTER_FILES, fds, 2)); close(fd); }
    IS("eventfd") { int fd = eventfd(0, 0); CHECK(!ring_register(r.fd, IORING_REGISTER_EVENTFD, &fd, 1)); close(fd); }
    IS("personality") CHECK(ring_register(r.fd, IORING_REGISTER_PERSONALITY, 0, 0) > 0);
    IS("provided") { s = request(&r, IORING_OP_PROVIDE_BUFFERS); s->addr = (uintptr_t)back; s->len = 16; s->fd = 2; s->buf_group = 3; SAME(submit(&r, 1, 0), 1); SAME(take(&r), 0); s = 0; }
    IS("restricted") { struct io_uring_restriction l[1] = {{.opcode = IORING_RESTRICTION_SQE_OP, .sqe_op = IORING_OP_NOP}}; CHECK(!ring_register(r.fd, IORING_REGISTER_RESTRICTIONS, l, 1)); CHECK(!ring_register(r.fd, IORING_REGISTER_ENABLE_RINGS, 0, 0)); }
    IS("unmapped") { request(&r, IORING_OP_NOP); SAME(submit(&r, 1, 0), 1); SAME(take(&r), 0); CHECK(!munmap(r.queues, r.length)); }
    for (uint64_t n = 0;; n++, tick()) {
        /* What is under way stays so, and the ring goes on beside it. */
        unsigned before = strcmp(what, "unmapped") ? *r.cq_tail : 0;
        if (!strcmp(what, "poll") || !strcmp(what, "timeout") || !strcmp(what, "read") || !strcmp(what, "worker")) {
            SAME(r.sent - before, 1);
            request(&r, IORING_OP_NOP)->user_data = 4711; SAME(submit(&r, 1, 1), 1);
            struct io_uring_cqe *c = (void *)(r.cqes + (r.head & 15) * 16); SAME(c->user_data, 4711); SAME(c->res, 0);
            *r.cq_head = ++r.head;
        }
        nap(10);
    }
}
