/* Credentials. Started as root it drops to uid 1000 but keeps one capability; with "plain" it changes nothing. */
#include "check.h"
#include <grp.h>
#include <linux/capability.h>
#include <linux/securebits.h>
static void status_of(char *to, size_t size) {
    FILE *f = fopen("/proc/self/status", "re"); char line[512]; *to = 0;
    const char *keep[] = {"Uid", "Gid", "Groups", "CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs"};
    while (fgets(line, sizeof line, f)) for (size_t i = 0; i < 9; i++) if (!strncmp(line, keep[i], strlen(keep[i])) && strlen(to) + strlen(line) < size) strcat(to, line);
    fclose(f);
}
int main(int argc, char **argv) {
    begin(argc, argv);
    if (geteuid() == 0 && argc < 4) {
        gid_t groups[] = {3000, 3001, 44};
        CHECK(!setgroups(3, groups)); CHECK(!setresgid(1001, 1002, 1003));
        CHECK(!prctl(PR_SET_SECUREBITS, SECBIT_KEEP_CAPS | SECBIT_NO_SETUID_FIXUP | SECBIT_NOROOT));
        CHECK(!prctl(PR_CAPBSET_DROP, CAP_SYS_BOOT));
        CHECK(!setresuid(1000, 1000, 1000));
        struct __user_cap_header_struct h = {_LINUX_CAPABILITY_VERSION_3, 0};
        struct __user_cap_data_struct d[2] = {{1u << CAP_NET_BIND_SERVICE, 1u << CAP_NET_BIND_SERVICE, 1u << CAP_NET_BIND_SERVICE}, {0, 0, 0}};
        CHECK(!syscall(SYS_capset, &h, d));
        CHECK(!prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, CAP_NET_BIND_SERVICE, 0, 0));
        CHECK(!prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0));
    }
    char want[4096], got[4096];
    status_of(want, sizeof want);
    uid_t r, e, s; gid_t gr, ge, gs; CHECK(!getresuid(&r, &e, &s)); CHECK(!getresgid(&gr, &ge, &gs));
    int bits = prctl(PR_GET_SECUREBITS), dumpable = prctl(PR_GET_DUMPABLE);
    for (;; tick()) {
        uid_t r2, e2, s2; gid_t gr2, ge2, gs2; CHECK(!getresuid(&r2, &e2, &s2)); CHECK(!getresgid(&gr2, &ge2, &gs2));
        SAME(r2, r); SAME(e2, e); SAME(s2, s); SAME(gr2, gr); SAME(ge2, ge); SAME(gs2, gs);
        status_of(got, sizeof got); if (strcmp(want, got)) bad("status was\n%sis\n%s", want, got);
        SAME(prctl(PR_GET_SECUREBITS), bits); SAME(prctl(PR_GET_DUMPABLE), dumpable);
        nap(20);
    }
}
