/* System V shared memory: whole, read-only, twice, in parts, removed while attached, and attached by nobody. */
#include "check.h"
#include <sys/ipc.h>
#include <sys/shm.h>

#define PAGE 4096
static int ids[8], count;

static int make(key_t key, size_t size, int flags) {
    int id = shmget(key, size, IPC_CREAT | IPC_EXCL | flags);
    if (id < 0 && errno == ENOSYS) { dprintf(out, "SKIP no System V IPC\n"); for (;;) { tick(); nap(20); } }
    CHECK(id >= 0);
    ids[count++] = id;
    return id;
}
static char *attach(int id, void *at, int flags) {
    char *p = shmat(id, at, flags);
    if (p == (void *)-1) bad("shmat");
    return p;
}
/* Protection and offset of the area at `p`, and what it is said to be. */
static void area(void *p, char *perms, unsigned long *offset, unsigned long *inode, char *name) {
    FILE *f = fopen("/proc/self/maps", "re");
    char line[4096];
    *perms = *name = 0;
    while (f && fgets(line, sizeof line, f)) {
        unsigned long from, to;
        if (sscanf(line, "%lx-%lx", &from, &to) == 2 && from <= (unsigned long)p && (unsigned long)p < to)
            sscanf(line, "%*s %7s %lx %*s %lu %255[^\n]", perms, offset, inode, name);
    }
    if (f) fclose(f);
}

int main(int argc, char **argv) {
    begin(argc, argv);
    key_t key = 0x70000000 + getpid();
    char wanted[64];
    int keyed = make(key, 3 * PAGE + 100, 0640);
    char *whole = attach(keyed, 0, 0);
    char *reading = attach(keyed, 0, SHM_RDONLY);
    fill(whole, 3 * PAGE, 1);
    memcpy(whole + 3 * PAGE, "the end", 8);

    int removed = make(key + 4096, 64 * PAGE, 0600);
    char *gone = attach(removed, 0, 0);
    fill(gone + 60 * PAGE, PAGE, 2);
    CHECK(!shmctl(removed, IPC_RMID, 0));
    CHECK(!mprotect(gone, PAGE, PROT_READ));
    CHECK(!mprotect(gone + 2 * PAGE, PAGE, PROT_READ | PROT_WRITE | PROT_EXEC));

    /* Of one of eight pages a hole in the middle is unmapped, with something else in it, and the end. */
    int torn = make(IPC_PRIVATE, 8 * PAGE, 0600);
    char *part = attach(torn, 0, 0);
    fill(part, 8 * PAGE, 3);
    CHECK(!munmap(part + 2 * PAGE, 2 * PAGE) && !munmap(part + 7 * PAGE, PAGE));
    char *between = mmap(part + 2 * PAGE, PAGE, PROT_READ | PROT_WRITE,
        MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
    CHECK(between == part + 2 * PAGE);
    fill(between, PAGE, 4);

    int locked = make(IPC_PRIVATE, PAGE, 0600);
    char *fast = attach(locked, 0, 0);
    shmctl(locked, SHM_LOCK, 0);
    struct shmid_ds was, is;
    CHECK(!shmctl(locked, IPC_STAT, &was));

    /* By nobody. */
    int left = make(key + 8192, 2 * PAGE, 0604);
    char *there = attach(left, 0, 0);
    fill(there, 2 * PAGE, 5);
    CHECK(!shmdt(there));

    for (uint64_t n = 1;; n++) {
        CHECK(same(whole + 8, 3 * PAGE - 8, 2));
        CHECK(!memcmp(reading, whole, 3 * PAGE + 100));
        CHECK(!strcmp(whole + 3 * PAGE, "the end"));
        memcpy(whole, &n, 8);
        CHECK(!memcmp(reading, &n, 8));
        CHECK(same(gone + 60 * PAGE, PAGE, 2) && zero(gone, 60 * PAGE));
        CHECK(same(part, 2 * PAGE, 3) && same(part + 4 * PAGE, 3 * PAGE, 3 + 4 * PAGE / 8));
        CHECK(same(between, PAGE, 4));
        there = attach(left, 0, SHM_RDONLY);
        CHECK(same(there, 2 * PAGE, 5) && !shmdt(there));

        CHECK(shmget(key, 0, 0) == keyed && shmget(key + 8192, 0, 0) == left);
        CHECK(!shmctl(keyed, IPC_STAT, &is));
        SAME(is.shm_perm.mode & 0777, 0640);
        SAME(is.shm_segsz, 3 * PAGE + 100);
        SAME(is.shm_nattch, 2);
        SAME(is.shm_cpid, getpid());
        SAME(is.shm_lpid, getpid());
        CHECK(!shmctl(left, IPC_STAT, &is));
        SAME(is.shm_perm.mode & 0777, 0604);
        SAME(is.shm_cpid, getpid());
        CHECK(!shmctl(removed, IPC_STAT, &is));
        SAME(is.shm_perm.mode & SHM_DEST, SHM_DEST);
        SAME(is.shm_nattch, 4);
        CHECK(!shmctl(torn, IPC_STAT, &is));
        SAME(is.shm_nattch, 2);
        CHECK(!shmctl(locked, IPC_STAT, &is));
        SAME(is.shm_perm.mode, was.shm_perm.mode);

        /* A file of /proc is refused while it is open: not where every dump must work. */
        if (getenv("VICTIM_TOLERATES_EINTR")) { tick(); nap(5); continue; }
        char perms[8], name[256];
        unsigned long offset, inode;
        area(reading, perms, &offset, &inode, name);
        snprintf(wanted, sizeof wanted, "/SYSV%08x (deleted)", key);
        CHECK(!strcmp(perms, "r--s") && inode == (unsigned long)keyed && !strcmp(name, wanted));
        CHECK(mprotect(reading, PAGE, PROT_READ | PROT_WRITE) && errno == EACCES);
        area(gone + 2 * PAGE, perms, &offset, &inode, name);
        snprintf(wanted, sizeof wanted, "/SYSV%08x (deleted)", key + 4096);
        CHECK(!strcmp(perms, "rwxs") && offset == 2 * PAGE && inode == (unsigned long)removed);
        CHECK(!strcmp(name, wanted));
        area(part + 4 * PAGE, perms, &offset, &inode, name);
        CHECK(!strcmp(perms, "rw-s") && offset == 4 * PAGE && inode == (unsigned long)torn);
        tick();
        nap(5);
    }
}
