/* Rings at rest, with completions not taken and requests not submitted. */
#include "io_uring.h"
#include <sys/wait.h>
/* Several requests that do nothing; two completions and one request are always left over. */
static void nothing(struct ring *r, unsigned n) {
    for (unsigned i = 0; i < n; i++) request(r, IORING_OP_NOP);
    SAME(submit(r, n + 1, 0), n + 1);
    for (unsigned i = 0; i < n + 1; i++) SAME(take(r), 0);
    request(r, IORING_OP_NOP); tell(r);
    positions(r);
}
static void leave(struct ring *r) { for (int i = 0; i < 2; i++) request(r, IORING_OP_NOP); SAME(submit(r, 2, 0), 2); request(r, IORING_OP_NOP); tell(r); }
/* A request that fails ends a submission, unless the ring is to go on. */
static void failing(struct ring *r, int goes_on) {
    struct io_uring_sqe *s = (void *)request(r, 200); (void)s;
    request(r, IORING_OP_NOP); request(r, IORING_OP_NOP);
    int n = submit(r, 4, 0);
    if (goes_on) SAME(n, 4); else { SAME(n, 2); SAME(submit(r, 2, 0), 2); }
    int seen = 0;
    for (int i = 0; i < 4; i++) { int res = take(r); if (res) { SAME(res, -EINVAL); seen++; } }
    request(r, IORING_OP_NOP); tell(r);
    /* It is among the two that are left, or was taken. */
    CHECK(seen <= 1);
    for (int i = 0; i < 2; i++) { request(r, IORING_OP_NOP); }
    SAME(submit(r, 3, 0), 3);
    for (int i = 0; i < 3; i++) { int res = take(r); if (res) { SAME(res, -EINVAL); seen++; } }
    SAME(seen, 1);
    request(r, IORING_OP_NOP); tell(r);
}
/* What is written to a file comes back; completions in between are taken. */
static void file(struct ring *r, int fd, uint64_t n) {
    static uint64_t text[64], back[64];
    fill(text, sizeof text, n);
    /* Alone: a worker may be done before the completions of a submission are told. */
    SAME(submit(r, 1, 0), 1);
    struct io_uring_sqe *s = request(r, IORING_OP_WRITE); s->fd = fd; s->addr = (uintptr_t)text; s->len = sizeof text; s->off = n % 8 * sizeof text; s->flags = IOSQE_IO_LINK;
    s = request(r, IORING_OP_READ); s->fd = fd; s->addr = (uintptr_t)back; s->len = sizeof back; s->off = n % 8 * sizeof text;
    SAME(submit(r, 2, 5), 2);
    for (int i = 0; i < 3; i++) SAME(take(r), 0);
    SAME(take(r), sizeof text); SAME(take(r), sizeof back);
    CHECK(same(back, sizeof back, n));
    leave(r);
    positions(r);
}
static void plain(long before) {
    struct ring one, all, odd, off;
    make(&one, 8, 0, 0); make(&all, 4, 64, IORING_SETUP_SUBMIT_ALL | IORING_SETUP_SQE128 | IORING_SETUP_CQE32); make(&off, 32, 32, IORING_SETUP_R_DISABLED);
    int bare = syscall(SYS_io_uring_setup, 8, &(struct io_uring_params){.flags = IORING_SETUP_NO_SQARRAY});
    if (bare >= 0) { close(bare); make(&odd, 8, 0, IORING_SETUP_NO_SQARRAY | IORING_SETUP_COOP_TASKRUN | IORING_SETUP_TASKRUN_FLAG); leave(&odd); }
    CHECK(!madvise(one.queues, one.length, MADV_DONTFORK)); CHECK(!mprotect(off.sqes, 4096, PROT_READ));
    for (long i = 0; i < before; i += 8) { for (int j = 0; j < 8; j++) request(&one, IORING_OP_NOP); SAME(submit(&one, 8, 0), 8); for (int j = 0; j < 8; j++) take(&one); }
    leave(&one); leave(&all);
    int fd = open(in_dir("file"), O_CREAT | O_RDWR | O_CLOEXEC, 0600), ep = epoll_create1(0); CHECK(fd >= 0);
    struct epoll_event e = {.events = EPOLLIN, .data.u64 = 1}; CHECK(!epoll_ctl(ep, EPOLL_CTL_ADD, one.fd, &e));
    e.data.u64 = 2; CHECK(!epoll_ctl(ep, EPOLL_CTL_ADD, off.fd, &e));
    for (uint64_t n = 0;; n++, tick()) {
        nothing(&one, n % 5); nothing(&all, n % 3); if (bare >= 0) nothing(&odd, n % 7);
        failing(&one, 0); failing(&all, 1);
        file(&one, fd, n);
        SAME(epoll_wait(ep, &e, 1, 0), 1); SAME(e.data.u64, 1);
        CHECK(syscall(SYS_io_uring_enter, off.fd, 0, 0, 0, 0, 0) < 0 && errno == EBADFD);
        SAME(vm_flag(one.queues, "dc"), 1); SAME(vm_flag(one.sqes, "dc"), 0); SAME(vm_flag(off.sqes, "wr"), 0);
        nap(5);
    }
}
static void registered(void) {
    struct ring r;
    make(&r, 16, 64, 0);
    static uint64_t buffer[1024] __attribute__((aligned(4096))), other[600];
    int fd = open(in_dir("file"), O_CREAT | O_RDWR | O_CLOEXEC, 0600), p[2], ev = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC), decoy = eventfd(0, EFD_NONBLOCK); CHECK(fd >= 0 && !pipe2(p, O_CLOEXEC));
    int again = dup(fd); close(fd); fd = again;
    struct iovec areas[3] = {{buffer, sizeof buffer}, {0, 0}, {(char *)other + 24, 4000}};
    uint64_t tags[3] = {77, 0, 0};
    struct io_uring_rsrc_register b = {.nr = 3, .data = (uintptr_t)areas, .tags = (uintptr_t)tags}; CHECK(!ring_register(r.fd, IORING_REGISTER_BUFFERS2, &b, sizeof b));
    int stat = open("/proc/self/stat", O_RDONLY | O_CLOEXEC), pidfd = syscall(SYS_pidfd_open, getpid(), 0); CHECK(stat >= 0);
    int files[8] = {p[1], -1, fd, p[0], -1, -1, stat, pidfd}; CHECK(!ring_register(r.fd, IORING_REGISTER_FILES, files, 8));
    struct io_uring_file_index_range range = {.off = 4, .len = 2}; CHECK(!ring_register(r.fd, IORING_REGISTER_FILE_ALLOC_RANGE, &range, 0));
    CHECK(!ring_register(r.fd, IORING_REGISTER_EVENTFD, &ev, 1));
    unsigned workers[2] = {3, 5}; CHECK(!ring_register(r.fd, IORING_REGISTER_IOWQ_MAX_WORKERS, workers, 2));
    struct io_uring_rsrc_update name = {.offset = 3, .data = r.fd}; SAME(ring_register(r.fd, IORING_REGISTER_RING_FDS, &name, 1), 1);
    for (uint64_t n = 0, v;; n++, tick()) {
        fill(buffer, sizeof buffer, n);
        struct io_uring_sqe *s = request(&r, IORING_OP_WRITE_FIXED); s->fd = 2; s->addr = (uintptr_t)buffer; s->len = sizeof buffer; s->off = 0; s->buf_index = 0; s->flags = IOSQE_FIXED_FILE | IOSQE_IO_LINK;
        s = request(&r, IORING_OP_READ_FIXED); s->fd = 2; s->addr = (uintptr_t)other + 24; s->len = 4000; s->buf_index = 2; s->flags = IOSQE_FIXED_FILE | IOSQE_IO_LINK;
        s = request(&r, IORING_OP_WRITE); s->fd = 0; s->addr = (uintptr_t)&n; s->len = 8; s->flags = IOSQE_FIXED_FILE | IOSQE_IO_LINK;
        s = request(&r, IORING_OP_READ); s->fd = 3; s->addr = (uintptr_t)&v; s->len = 8; s->flags = IOSQE_FIXED_FILE | IOSQE_IO_LINK;
        s = request(&r, IORING_OP_OPENAT); s->fd = AT_FDCWD; s->addr = (uintptr_t)"/dev/null"; s->open_flags = O_RDONLY; s->file_index = IORING_FILE_INDEX_ALLOC;
        tell(&r);
        SAME(enter_as(&r, 3, 5, 0, IORING_ENTER_REGISTERED_RING), 5); SAME(submit(&r, 0, 5), 0);
        SAME(take(&r), sizeof buffer); SAME(take(&r), 4000); SAME(take(&r), 8); SAME(take(&r), 8);
        CHECK(!memcmp((char *)other + 24, buffer, 4000)); SAME(v, n);
        int slot = take(&r); CHECK(slot == 4 || slot == 5);
        s = request(&r, IORING_OP_CLOSE); s->file_index = slot + 1;
        SAME(submit(&r, 1, 1), 1); SAME(take(&r), 0);
        char text[64] = {0};
        s = request(&r, IORING_OP_READ); s->fd = 6; s->addr = (uintptr_t)text; s->len = 63; s->flags = IOSQE_FIXED_FILE;
        SAME(submit(&r, 1, 1), 1); SAME(take(&r), 63); SAME(atoi(text), getpid());
        CHECK(read(ev, &v, 8) == 8); CHECK(v >= 1 && v <= 8); CHECK(read(decoy, &v, 8) < 0 && errno == EAGAIN);
        unsigned now[2] = {0, 0}; CHECK(!ring_register(r.fd, IORING_REGISTER_IOWQ_MAX_WORKERS, now, 2)); SAME(now[0], 3); SAME(now[1], 5);
        name.offset = 3; name.data = r.fd; CHECK(ring_register(r.fd, IORING_REGISTER_RING_FDS, &name, 1) < 0 && errno == EBUSY);
        CHECK(ring_register(r.fd, IORING_REGISTER_FILES, files, 8) < 0 && errno == EBUSY);
        positions(&r);
        nap(5);
    }
}
/* A ring for one thread, which is not the first, and one for the first. */
static struct ring theirs;
static volatile int there;
static void *issuer(void *arg) {
    (void)arg;
    make(&theirs, 8, 16, IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN | IORING_SETUP_SUBMIT_ALL);
    leave(&theirs); there = 1;
    for (uint64_t n = 0;; n++) { nothing(&theirs, n % 5); failing(&theirs, 1); there++; nap(3); }
    return 0;
}
static void threads(void) {
    struct ring own;
    make(&own, 8, 16, IORING_SETUP_SINGLE_ISSUER); leave(&own);
    spawn(issuer, 0);
    while (!there) nap(1);
    for (uint64_t n = 0;; n++, tick()) {
        nothing(&own, n % 5); failing(&own, 0);
        CHECK(syscall(SYS_io_uring_enter, theirs.fd, 0, 0, IORING_ENTER_GETEVENTS, 0, 0) < 0 && errno == EEXIST);
        for (int before = there, i = 0; there == before; i++) { CHECK(i < 2000); nap(2); }
    }
}
/* A ring of two processes, used in turn. */
static void turn(struct ring *r, uint64_t n) {
    request(r, IORING_OP_NOP); s: ; int sent = submit(r, 1, 1); if (sent != 1) goto s;
    SAME(take(r), 0); SAME(*r->cq_tail, n);
}
static void shared(void) {
    static struct ring *r; r = map(4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    make(r, 4, 8, 0);
    int to[2], from[2]; CHECK(!pipe(to) && !pipe(from));
    pid_t child = fork(); uint64_t n = 0;
    if (!child) for (;;) { CHECK(read(to[0], &n, 8) == 8); turn(r, n); CHECK(write(from[1], &n, 8) == 8); }
    for (n = 1;; tick()) { turn(r, n++); CHECK(write(to[1], &n, 8) == 8); CHECK(read(from[0], &n, 8) == 8); n++; CHECK(!waitpid(child, 0, WNOHANG)); nap(5); }
}
/* Parent and child with rings of their own; what the child shares of the parent's memory it began with. */
static void family(void) {
    static uint64_t common[8192] __attribute__((aligned(4096)));
    fill(common, sizeof common, 5);
    struct ring own; make(&own, 8, 16, 0); leave(&own);
    CHECK(!madvise(own.queues, own.length, MADV_DONTFORK)); CHECK(!madvise(own.sqes, own.p.sq_entries * own.size, MADV_DONTFORK));
    int up[2]; CHECK(!pipe2(up, O_NONBLOCK));
    pid_t child = fork();
    if (!child) {
        struct ring two; make(&two, 4, 0, IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN); leave(&two);
        struct iovec area = {common + 512, 8192}; CHECK(!ring_register(two.fd, IORING_REGISTER_BUFFERS, &area, 1));
        int zero = open("/dev/zero", O_RDONLY);
        for (uint64_t n = 0;; n++) {
            nothing(&two, n % 2); submit(&two, 1, 3); SAME(take(&two), 0); SAME(take(&two), 0); SAME(take(&two), 0);
            common[700] = 1;
            struct io_uring_sqe *s = request(&two, IORING_OP_READ_FIXED); s->fd = zero; s->addr = (uintptr_t)(common + 600); s->len = 1600; s->buf_index = 0;
            SAME(submit(&two, 1, 1), 1); SAME(take(&two), 1600); SAME(common[700], 0); SAME(common[599], mix(5 + 599)); SAME(common[800], mix(5 + 800));
            leave(&two); CHECK(write(up[1], "x", 1) == 1 || errno == EAGAIN); nap(3);
        }
    }
    char byte;
    for (uint64_t n = 0;; n++, tick()) {
        nothing(&own, n % 5); CHECK(same(common, sizeof common, 5)); SAME(vm_flag(own.queues, "dc"), 1);
        for (int i = 0; read(up[0], &byte, 1) != 1; i++) { CHECK(i < 3000); nap(1); }
        CHECK(!waitpid(child, 0, WNOHANG));
    }
}
/* Requests that are soon over, but seldom none. */
static void passing(void) {
    struct ring r;
    make(&r, 8, 16, 0);
    for (uint64_t n = 0;; n++, tick()) {
        struct __kernel_timespec t = {0, 8000000};
        struct io_uring_sqe *s = request(&r, IORING_OP_TIMEOUT); s->addr = (uintptr_t)&t; s->len = 1;
        SAME(submit(&r, 1, 1), 1); SAME(take(&r), -ETIME); positions(&r);
        nap(8 + n % 8);
    }
}
int main(int argc, char **argv) {
    begin(argc, argv);
    const char *mode = argc > 3 ? argv[3] : "plain";
    if (!strcmp(mode, "plain")) plain(argc > 4 ? atol(argv[4]) : 0);
    if (!strcmp(mode, "registered")) registered();
    if (!strcmp(mode, "threads")) threads();
    if (!strcmp(mode, "shared")) shared();
    if (!strcmp(mode, "family")) family();
    if (!strcmp(mode, "passing")) passing();
    bad("unknown mode %s", mode);
}
