/* Rings by bare system calls, with positions of the program's own beside the shared ones, as liburing has them. */
#include "check.h"
#include <linux/io_uring.h>
#ifndef IORING_SETUP_NO_SQARRAY
#define IORING_SETUP_NO_SQARRAY (1U << 16)
#endif
struct ring {
    int fd, plain;
    struct io_uring_params p;
    char *queues, *sqes;
    size_t length, size, cqe;
    unsigned *sq_head, *sq_tail, *array, *sq_flags, *dropped, *cq_head, *cq_tail, *overflow;
    char *cqes;
    unsigned tail, sent, head; /* our own: written, submitted, taken */
    uint64_t next, wanted;     /* user_data of the next request and completion */
};
/* Says why and ends quietly where the kernel gives no rings. */
__attribute__((unused)) static void skip(const char *why) { dprintf(out, "SKIP %s: %s\n", why, strerror(errno)); for (;; tick()) nap(10); }
__attribute__((unused)) static void make(struct ring *r, unsigned entries, unsigned completions, unsigned flags) {
    memset(r, 0, sizeof *r);
    r->p.flags = flags | (completions ? IORING_SETUP_CQSIZE : 0);
    r->p.cq_entries = completions;
    r->fd = syscall(SYS_io_uring_setup, entries, &r->p);
    if (r->fd < 0) skip("io_uring_setup");
    r->plain = !(flags & IORING_SETUP_NO_SQARRAY);
    r->size = flags & IORING_SETUP_SQE128 ? 128 : 64;
    r->cqe = flags & IORING_SETUP_CQE32 ? 32 : 16;
    r->length = r->p.cq_off.cqes + r->p.cq_entries * r->cqe;
    if (r->plain && r->p.sq_off.array + r->p.sq_entries * 4 > r->length) r->length = r->p.sq_off.array + r->p.sq_entries * 4;
    r->queues = map(r->length, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, r->fd, IORING_OFF_SQ_RING);
    r->sqes = map(r->p.sq_entries * r->size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, r->fd, IORING_OFF_SQES);
#define AT(o) (void *)(r->queues + (o))
    r->sq_head = AT(r->p.sq_off.head); r->sq_tail = AT(r->p.sq_off.tail); r->array = AT(r->p.sq_off.array);
    r->sq_flags = AT(r->p.sq_off.flags); r->dropped = AT(r->p.sq_off.dropped);
    r->cq_head = AT(r->p.cq_off.head); r->cq_tail = AT(r->p.cq_off.tail); r->overflow = AT(r->p.cq_off.overflow); r->cqes = AT(r->p.cq_off.cqes);
}
/* The next request, not told to the kernel yet; where it lies is not where it is in the queue. */
__attribute__((unused)) static struct io_uring_sqe *request(struct ring *r, int opcode) {
    unsigned mask = r->p.sq_entries - 1, at = r->tail & mask, slot = r->plain ? r->tail * 3 & mask : at;
    struct io_uring_sqe *s = (void *)(r->sqes + slot * r->size);
    memset(s, 0, r->size);
    s->opcode = opcode; s->user_data = r->next++;
    if (r->plain) r->array[at] = slot;
    r->tail++;
    return s;
}
/* Tells the kernel of all requests, and makes it take some. */
__attribute__((unused)) static void tell(struct ring *r) { __atomic_store_n(r->sq_tail, r->tail, __ATOMIC_RELEASE); }
__attribute__((unused)) static int enter_as(struct ring *r, int fd, unsigned submit, unsigned wait, unsigned flags) {
    int n;
    do n = syscall(SYS_io_uring_enter, fd, submit, wait, flags, 0, 0); while (n < 0 && errno == EINTR);
    if (n > 0) r->sent += n;
    return n;
}
__attribute__((unused)) static int submit(struct ring *r, unsigned n, unsigned wait) {
    tell(r);
    int sent = enter_as(r, r->fd, n, wait, wait ? IORING_ENTER_GETEVENTS : 0);
    /* One that was interrupted has submitted and not waited. */
    while (sent >= 0 && __atomic_load_n(r->cq_tail, __ATOMIC_ACQUIRE) - r->head < wait) if (enter_as(r, r->fd, 0, wait, IORING_ENTER_GETEVENTS) < 0) return -1;
    return sent;
}
/* The positions that both sides know must agree. */
__attribute__((unused)) static void positions(struct ring *r) {
    SAME(*r->sq_tail, r->tail); SAME(*r->sq_head, r->sent); SAME(*r->cq_head, r->head); SAME(*r->cq_tail, r->sent);
    SAME(*r->dropped, 0); SAME(*r->overflow, 0); SAME(*r->sq_flags, 0);
}
/* The oldest completion, which must be that of the next request in order. */
__attribute__((unused)) static int take(struct ring *r) {
    CHECK(__atomic_load_n(r->cq_tail, __ATOMIC_ACQUIRE) != r->head);
    struct io_uring_cqe *c = (void *)(r->cqes + (r->head & (r->p.cq_entries - 1)) * r->cqe);
    SAME(c->user_data, r->wanted); r->wanted++;
    int res = c->res;
    __atomic_store_n(r->cq_head, ++r->head, __ATOMIC_RELEASE);
    return res;
}
__attribute__((unused)) static int ring_register(int fd, unsigned op, const void *arg, unsigned n) { return syscall(SYS_io_uring_register, fd, op, arg, n); }
