/* unix(7): listening by path, relative path and abstract name; pairs of every type with data in them; halves. */
#include "check.h"
static int listening(const char *path, int len, int type) { int s = socket(AF_UNIX, type, 0); struct sockaddr_un un = {.sun_family = AF_UNIX}; memcpy(un.sun_path, path, len); CHECK(!bind(s, (void *)&un, (socklen_t)(offsetof(struct sockaddr_un, sun_path) + len))); if (type != SOCK_DGRAM) CHECK(!listen(s, 6)); return s; }
static int reach(const char *path, int len, int type) { int s = socket(AF_UNIX, type, 0); struct sockaddr_un un = {.sun_family = AF_UNIX}; memcpy(un.sun_path, path, len); errno = 0; if (connect(s, (void *)&un, (socklen_t)(offsetof(struct sockaddr_un, sun_path) + len))) bad("connect to %s", *path ? path : path + 1); return s; }
static void pair(int type, int s[2]) { CHECK(!socketpair(AF_UNIX, type | SOCK_NONBLOCK, 0, s)); }
int main(int argc, char **argv) {
    begin(argc, argv);
    signal(SIGPIPE, SIG_IGN); CHECK(!chdir(dir));
    char buf[70000], abstract[64], path[108]; int an = snprintf(abstract, sizeof abstract, "%ctorpor test %d", 0, getpid()); snprintf(path, sizeof path, "%s/by-path", dir);
    int lp = listening(path, strlen(path) + 1, SOCK_STREAM), lr = listening("relative", 9, SOCK_STREAM), la = listening(abstract, an, SOCK_STREAM), lq = listening("seq", 4, SOCK_SEQPACKET), ld = listening("dgram", 6, SOCK_DGRAM);
    int st[2], dg[2], sq[2], half[2], gone[2], empty[2]; pair(SOCK_STREAM, st); pair(SOCK_DGRAM, dg); pair(SOCK_SEQPACKET, sq); pair(SOCK_STREAM, half); pair(SOCK_STREAM, gone); pair(SOCK_STREAM, empty);
    CHECK(write(st[0], "left to right", 13) == 13); CHECK(write(st[1], "right to left", 13) == 13); CHECK(write(dg[0], "one", 3) == 3 && write(dg[0], "", 0) == 0 && write(dg[0], "three", 5) == 5); CHECK(write(sq[1], "first", 5) == 5 && write(sq[1], "second", 6) == 6);
    CHECK(write(half[0], "end", 3) == 3); CHECK(!shutdown(half[0], SHUT_WR)); CHECK(write(gone[1], "testament", 9) == 9); close(gone[1]);
    int on = 1, size = 100000; CHECK(!setsockopt(st[0], SOL_SOCKET, SO_SNDBUF, &size, sizeof size)); CHECK(!setsockopt(empty[0], SOL_SOCKET, SO_PASSCRED, &on, sizeof on)); struct timeval tv = {3, 500000}; CHECK(!setsockopt(st[1], SOL_SOCKET, SO_RCVTIMEO, &tv, sizeof tv));
    int sndbuf; socklen_t l = sizeof sndbuf; CHECK(!getsockopt(st[0], SOL_SOCKET, SO_SNDBUF, &sndbuf, &l));
    int big[2]; pair(SOCK_STREAM, big); fill(buf, 65536, 1); CHECK(write(big[0], buf, 65536) == 65536);
    int client = reach(path, strlen(path) + 1, SOCK_STREAM), server = accept(lp, 0, 0); CHECK(write(client, "through accept", 14) == 14); /* a connection inside */
    int waiting = reach("relative", 9, SOCK_STREAM); /* not accepted yet */
    int lone = socket(AF_UNIX, SOCK_DGRAM, 0); 
    int plain = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0);
    for (int n = 0;; n++, tick()) {
        int s = reach(path, strlen(path) + 1, SOCK_STREAM), c = accept(lp, 0, 0); CHECK(c >= 0); close(c); close(s);
        s = reach(abstract, an, SOCK_STREAM); c = accept(la, 0, 0); CHECK(c >= 0); close(c); close(s); s = reach("seq", 4, SOCK_SEQPACKET); c = accept(lq, 0, 0); CHECK(c >= 0); close(c); close(s);
        s = reach("dgram", 6, SOCK_DGRAM); CHECK(write(s, "hi", 2) == 2); SAME(read(ld, buf, 9), 2); close(s);
        SAME(read(st[1], buf, 100), 13); CHECK(!memcmp(buf, "left to right", 13)); SAME(read(st[0], buf, 100), 13); CHECK(!memcmp(buf, "right to left", 13)); CHECK(write(st[0], "left to right", 13) == 13 && write(st[1], "right to left", 13) == 13);
        SAME(read(dg[1], buf, 100), 3); SAME(read(dg[1], buf, 100), 0); SAME(read(dg[1], buf, 2), 2); CHECK(!memcmp(buf, "th", 2)); CHECK(read(dg[1], buf, 1) < 0 && errno == EAGAIN); CHECK(write(dg[0], "one", 3) == 3 && write(dg[0], "", 0) == 0 && write(dg[0], "three", 5) == 5);
        SAME(read(sq[0], buf, 100), 5); SAME(read(sq[0], buf, 100), 6); CHECK(!memcmp(buf, "second", 6)); CHECK(write(sq[1], "first", 5) == 5 && write(sq[1], "second", 6) == 6);
        SAME(read(big[1], buf, sizeof buf), 65536); CHECK(same(buf, 65536, 1 + n)); fill(buf, 65536, 2 + n); CHECK(write(big[0], buf, 65536) == 65536);
        CHECK(write(half[0], "x", 1) < 0 && errno == EPIPE); CHECK(write(half[1], "back", 4) == 4); SAME(read(half[0], buf, 9), 4);
        if (n % 25 == 24) { SAME(read(half[1], buf, 9), 3); SAME(read(half[1], buf, 9), 0); close(half[0]); close(half[1]); pair(SOCK_STREAM, half); CHECK(write(half[0], "end", 3) == 3); CHECK(!shutdown(half[0], SHUT_WR));
            SAME(read(gone[0], buf, 100), 9); CHECK(!memcmp(buf, "testament", 9)); SAME(read(gone[0], buf, 100), 0); close(gone[0]); pair(SOCK_STREAM, gone); CHECK(write(gone[1], "testament", 9) == 9); close(gone[1]); }
        CHECK(write(gone[0], "x", 1) < 0 && errno == EPIPE);
        SAME(read(server, buf, 100), 14); CHECK(!memcmp(buf, "through accept", 14)); CHECK(write(client, "through accept", 14) == 14); CHECK(write(server, "b", 1) == 1); SAME(read(client, buf, 9), 1);
        struct sockaddr_un un; socklen_t ul = sizeof un; CHECK(!getpeername(client, (void *)&un, &ul) && !strcmp(un.sun_path, path)); ul = sizeof un; CHECK(!getsockname(lr, (void *)&un, &ul) && !strcmp(un.sun_path, "relative"));
        if (n % 25 == 12) { s = accept(lr, 0, 0); CHECK(s >= 0); CHECK(write(s, "ok", 2) == 2); SAME(read(waiting, buf, 9), 2); close(s); close(waiting); waiting = reach("relative", 9, SOCK_STREAM); }
        int got; l = sizeof got; CHECK(!getsockopt(st[0], SOL_SOCKET, SO_SNDBUF, &got, &l)); SAME(got, sndbuf); CHECK(!getsockopt(empty[0], SOL_SOCKET, SO_PASSCRED, &got, &l)); SAME(got, 1); l = sizeof tv; CHECK(!getsockopt(st[1], SOL_SOCKET, SO_RCVTIMEO, &tv, &l)); SAME(tv.tv_sec, 3); SAME(tv.tv_usec, 500000);
        CHECK(read(plain, buf, 1) < 0); l = sizeof got; CHECK(!getsockopt(lone, SOL_SOCKET, SO_TYPE, &got, &l)); SAME(got, SOCK_DGRAM);
        nap(20);
    }
}
