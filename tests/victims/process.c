/* What a process is apart from threads, memory and descriptors. */
#include "check.h"
#include <sys/personality.h>
int main(int argc, char **argv, char **envp) {
    begin(argc, argv);
    int rooted = geteuid() == 0 && argc > 3;
    char *where = in_dir("cwd"); CHECK(!mkdir(where, 0755)); CHECK(!chdir(where));
    char cwd[4096], root[4096], exe[4096]; 
    umask(0137);
    struct { int what; struct rlimit v; } limits[] = {{RLIMIT_NOFILE, {333, 4444}}, {RLIMIT_CORE, {1 << 20, 8 << 20}}, {RLIMIT_STACK, {16 << 20, 64 << 20}}, {RLIMIT_AS, {RLIM_INFINITY, RLIM_INFINITY}}, {RLIMIT_NPROC, {5000, 6000}}, {RLIMIT_MEMLOCK, {1 << 20, 1 << 20}}, {RLIMIT_FSIZE, {1ul << 32, 1ul << 33}}, {RLIMIT_NICE, {0, 0}}};
    for (size_t i = 0; i < sizeof limits / sizeof *limits; i++) if (setrlimit(limits[i].what, &limits[i].v)) CHECK(!getrlimit(limits[i].what, &limits[i].v));
    CHECK(personality(ADDR_NO_RANDOMIZE | UNAME26) != -1); int pers = personality(0xffffffff);
    CHECK(!prctl(PR_SET_CHILD_SUBREAPER, 1)); 
    int adj = open("/proc/self/oom_score_adj", O_WRONLY | O_CLOEXEC); CHECK(write(adj, "321", 3) == 3); close(adj);
    int filter = open("/proc/self/coredump_filter", O_WRONLY | O_CLOEXEC); if (filter >= 0) { CHECK(write(filter, "0x7", 3) == 3); close(filter); }
    pid_t pid = getpid(), sid = getsid(0), pgrp = getpgrp();
    char args[4096]; int f = open("/proc/self/cmdline", O_RDONLY); ssize_t args_len = read(f, args, sizeof args); close(f);
    uintptr_t envp0 = (uintptr_t)envp[0];
    ssize_t exe_len = readlink("/proc/self/exe", exe, sizeof exe);
    if (rooted) { CHECK(!mkdir("jail", 0755)); CHECK(!chroot("jail")); CHECK(!chdir("/")); CHECK(!mkdir("inside", 0755)); CHECK(!chdir("inside")); }
    CHECK(getcwd(cwd, sizeof cwd)); (void)root;
    for (;; tick()) {
        char now[4096]; CHECK(getcwd(now, sizeof now)); CHECK(!strcmp(now, cwd));
        if (rooted) { struct stat a, b; CHECK(!stat("/inside", &a) && !stat(".", &b) && a.st_ino == b.st_ino); CHECK(access("/proc", F_OK) < 0); }
        else {
            f = open("/proc/self/cmdline", O_RDONLY); CHECK(read(f, now, sizeof now) == args_len && !memcmp(now, args, args_len)); close(f);
            CHECK(readlink("/proc/self/exe", now, sizeof now) == exe_len && !memcmp(now, exe, exe_len));
            f = open("/proc/self/environ", O_RDONLY); CHECK(read(f, now, 16) >= 0 && !memcmp(now, (char *)envp0, strnlen((char *)envp0, 15))); close(f);
            f = open("/proc/self/oom_score_adj", O_RDONLY); CHECK(read(f, now, 16) >= 3 && !memcmp(now, "321", 3)); close(f);
            if (filter >= 0) { f = open("/proc/self/coredump_filter", O_RDONLY); memset(now, 0, 16); CHECK(read(f, now, 16) > 0); SAME(strtol(now, 0, 16), 7); close(f); }
        }
        SAME(umask(0137), 0137); SAME(personality(0xffffffff), pers);
        for (size_t i = 0; i < sizeof limits / sizeof *limits; i++) { struct rlimit l; CHECK(!getrlimit(limits[i].what, &l)); SAME(l.rlim_cur, limits[i].v.rlim_cur); SAME(l.rlim_max, limits[i].v.rlim_max); }
        int sub = 0; CHECK(!prctl(PR_GET_CHILD_SUBREAPER, &sub)); SAME(sub, 1);
        SAME(getpid(), pid); SAME(getsid(0), sid); SAME(getpgrp(), pgrp);
        nap(20);
    }
}
