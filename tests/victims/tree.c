/* Who is whose child, in which session and group; leaders that are gone; orphans at a subreaper; zombies with their status. */
#include "family.h"
static int me, root;
/* A member: says that it is there, waits until all are, then checks its relations for ever. */
static void live(int ppid, int sid, int pgid) {
    family->pid[me] = getpid(); family->ready[me] = 1;
    for (;;) { relations(ppid, sid, pgid); beat(me); nap(5); }
}
static int next(void) { return me = members++; }
static void await(int member) { while (!family->ready[member]) nap(1); }
int main(int argc, char **argv) {
    begin_family(argc, argv); prctl(PR_SET_CHILD_SUBREAPER, 1); root = getpid(); int sid = getsid(0), pgid = getpgid(0); pid_t p;
    sigset_t chld; sigemptyset(&chld); sigaddset(&chld, SIGCHLD); sigprocmask(SIG_BLOCK, &chld, 0);
    next(); if (!fork()) live(root, sid, pgid);
    next(); if (!(p = fork())) { setsid(); live(root, getpid(), getpid()); }
    next(); if (!(p = fork())) { setpgid(0, 0); live(root, sid, getpid()); }
    await(me); int group = family->pid[me];
    next(); if (!fork()) { CHECK(!setpgid(0, group)); live(root, sid, group); }
    /* Below each other, the deepest in a session of its own. */
    int a = next(), b = next(), c = next();
    if (!fork()) { me = a; if (!fork()) { me = b; int above = getpid(); if (!fork()) { me = c; setsid(); live(above, getpid(), getpid()); } live(family->pid[a] ? family->pid[a] : getppid(), sid, pgid); } live(root, sid, pgid); }
    /* An orphan, in the session of its grandparent that is gone: leader and group are numbers only. */
    int o1 = next(), o2 = next();
    if (!(p = fork())) { setsid(); int s = getpid(); if (!fork()) { me = o1; while (getppid() == s) nap(1); live(root, s, s); } if (!fork()) { me = o2; setpgid(0, 0); while (getppid() == s) nap(1); live(root, s, getpid()); } await(o1 >= 0 ? o1 : 0); _exit(0); }
    (void)o2;
    /* That leader waits for members that wait for its end: give it a push. */
    family->ready[o1] = 1; CHECK(waitpid(p, 0, 0) == p); await(o2);
    /* A group whose leader is gone. */
    int g = next(); int sync[2]; CHECK(!pipe(sync));
    if (!(p = fork())) { setpgid(0, 0); CHECK(write(sync[1], "x", 1) == 1); pause(); }
    char x; CHECK(read(sync[0], &x, 1) == 1); int gone = p; if (!fork()) { me = g; CHECK(!setpgid(0, gone)); live(root, sid, gone); } await(g); kill(gone, SIGKILL); CHECK(waitpid(gone, 0, 0) == gone);
    /* An orphan in a session that a living relative leads, elsewhere in the tree. */
    int l = next(), f = next();
    if (!fork()) { me = l; setsid(); int s = getpid(); if (!(p = fork())) { if (!fork()) { me = f; while (getppid() != root) nap(1); live(root, s, s); } _exit(0); } CHECK(waitpid(p, 0, 0) == p); live(root, s, s); }
    await(l); await(f);
    /* One made before its parent had a session of its own. */
    int e = next(), ee = next();
    if (!fork()) { me = e; int up = getpid(); if (!fork()) { me = ee; while (getsid(up) != up) nap(1); live(up, sid, pgid); } setsid(); live(root, getpid(), getpid()); }
    int z1, z2, z3; if (!(z1 = fork())) _exit(7); if (!(z2 = fork())) { signal(SIGTERM, SIG_DFL); kill(getpid(), SIGTERM); } if (!(z3 = fork())) { setsid(); prctl(PR_SET_NAME, "a zombie"); _exit(0); }
    siginfo_t info; int z[] = {z1, z2, z3}; for (int i = 0; i < 3; i++) CHECK(!waitid(P_PID, z[i], &info, WEXITED | WNOWAIT));
    struct timespec zero = {0}; while (sigtimedwait(&chld, &info, &zero) > 0) {}
    for (int i = 0; i < members; i++) await(i);
    for (;;) {
        relations(0, sid, pgid); sigset_t pending; sigpending(&pending); SAME(sigismember(&pending, SIGCHLD), 0);
        CHECK(!waitid(P_PID, z1, &info, WEXITED | WNOWAIT | WNOHANG)); SAME(info.si_pid, z1); SAME(info.si_code, CLD_EXITED); SAME(info.si_status, 7);
        CHECK(!waitid(P_PID, z2, &info, WEXITED | WNOWAIT | WNOHANG)); SAME(info.si_pid, z2); SAME(info.si_code, CLD_KILLED); SAME(info.si_status, SIGTERM);
        CHECK(!waitid(P_PID, z3, &info, WEXITED | WNOWAIT | WNOHANG)); SAME(info.si_pid, z3); SAME(getsid(z3), z3);
        tick_all(); nap(5);
    }
}
