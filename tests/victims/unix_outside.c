/* unix(7) with peers outside: a stream connection to argv[3], a datagram socket that sends to argv[4], and one with a name
 * that anyone may send to. Says what becomes of them. */
#include "check.h"
static int reach(int type, const char *path) { int s = socket(AF_UNIX, type | SOCK_NONBLOCK | SOCK_CLOEXEC, 0); struct sockaddr_un un = {.sun_family = AF_UNIX}; strncpy(un.sun_path, path, sizeof un.sun_path - 1); errno = 0; if (connect(s, (void *)&un, sizeof un)) bad("connect to %s", path); return s; }
int main(int argc, char **argv) {
    begin(argc, argv); signal(SIGPIPE, SIG_IGN); if (argc < 5) bad("no addresses");
    int stream = reach(SOCK_STREAM, argv[3]), log = reach(SOCK_DGRAM, argv[4]), box = socket(AF_UNIX, SOCK_DGRAM | SOCK_NONBLOCK, 0); struct sockaddr_un un = {.sun_family = AF_UNIX}; snprintf(un.sun_path, sizeof un.sun_path, "%s/inbox", dir); CHECK(!bind(box, (void *)&un, sizeof un));
    int closed = 0, refused = 0;
    for (int n = 0;; n++, tick()) {
        char b[64]; struct sockaddr_un from; socklen_t l = sizeof from; int got;
        errno = 0; if (send(stream, "s", 1, 0) < 0 && errno == EPIPE && !closed++) { SAME(read(stream, b, 64), 0); dprintf(out, "stream closed\n"); }
        errno = 0; if (send(log, "d", 1, 0) < 0 && errno != EAGAIN && !refused++) dprintf(out, "datagrams refused %d\n", errno);
        if (n % 8 == 7) while ((got = recvfrom(box, b, 64, 0, (void *)&from, &l)) >= 0) { dprintf(out, "got %.*s from %.*s\n", got, b, l > 2 ? (int)l - 2 : 0, from.sun_path); l = sizeof from; }
        nap(20);
    }
}
