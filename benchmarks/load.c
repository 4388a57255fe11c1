/* Many clients of an event stream in one thread, and what they saw. Linux only; many.py compiles and drives it.
 *
 *   load streams PORT PATH          lines on stdin are commands, lines on stdout are answers, as JSON; where PATH ends
 *                                   with =, each client adds its number
 *       connect COUNT IN_FLIGHT TIMEOUT_MS    open as many more, each until it has the head and a block; give up
 *                                             when none has come to that for so long; "retry" is what their first blocks
 *                                             ask for
 *       round FIRST COUNT TIMEOUT_MS          "ready"; then, once all have FIRST to FIRST + COUNT - 1, what was seen
 *       ending FIRST COUNT TIMEOUT_MS         the same, but once the server has closed all of them
 *       note                                  clients note what they need to come back; before the first connect
 *       return FIRST END SPREAD TIMEOUT_MS    all have been closed: each comes back with the id that it has, every other
 *                                             one with the one before; at once, or with SPREAD after the retry that it
 *                                             was told; until each is open and has all events up to END - 1. FIRST is
 *                                             the first event that came while they were away. "ready"; then what was seen
 *   load pages PORT PATH COUNT IN_FLIGHT      so many pages, each on a connection of its own
 *   load ping PORT PATH SECONDS PAUSE_US      one keep-alive connection that asks, waits for the answer, and pauses
 *   load ping ... fresh                       the same, with a connection for each; both end early when stdin is closed
 *
 * An event is what has `"n":NUMBER,"t":NANOSECONDS` in it, wherever that is: alone, in a batch, or cut by a read. Its t
 * is CLOCK_MONOTONIC when it was published. A round begins with the t of its first event, so neither clock nor pipe of
 * whoever drives us is in the times. A mark that is cut by the border of two HTTP chunks would be counted as missing. */

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <inttypes.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#ifndef IP_BIND_ADDRESS_NO_PORT
#define IP_BIND_ADDRESS_NO_PORT 24
#endif

enum { MOST = 1 << 17, READ = 1 << 18, CARRY = 48, READY = 1024, ADDRESSES = 16 };
static const uint64_t MS = 1000000;
static const char MARK[] = "\"n\":", STAMP[] = ",\"t\":", RETRY[] = "retry: ";
enum { MARKED = sizeof MARK - 1, STAMPED = sizeof STAMP - 1 };

struct client {
    int fd; /* -1 once it is closed */
    enum { CONNECTING, STATUS, HEAD, BLOCK, OPEN } state;
    unsigned matched, carried; /* bytes of what ends the head or the block; bytes in carry */
    unsigned named, retry;     /* bytes of RETRY in the first block; the number behind it, in ms */
    uint64_t next, done;       /* the number it must get next; when it had the round's last */
    char carry[CARRY];         /* the end of what was read, if it may be the beginning of a mark */
    char id[2][64];            /* the newest id and the one before */
    uint64_t after[2];         /* the number of the event that comes after each */
    uint64_t due, back;        /* when it has to come back; when it had its first block then */
};

static struct client clients[MOST];
static unsigned count, opened, closed;
static int epoll;
static char buffer[CARRY + READ];
static const char *stream_path;
static int noting; /* whether clients note what they need to come back: it costs a little for each read */

static struct {
    int active, ending;
    unsigned complete, closed; /* clients */
    uint64_t first, end, began, deadline, events, bytes, missing, disordered, cpu, ended;
} now_round;

static struct {
    int active;
    unsigned back, gaps, busy, refused; /* clients; refusals and lost connections */
    uint64_t began;
} storm;

static void fail(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    fprintf(stderr, "load: ");
    vfprintf(stderr, format, arguments);
    fprintf(stderr, "\n");
    va_end(arguments);
    exit(1);
}

static uint64_t clock_ns(clockid_t clock) {
    struct timespec t;
    clock_gettime(clock, &t);
    return (uint64_t)t.tv_sec * 1000 * MS + (uint64_t)t.tv_nsec;
}

static uint64_t now(void) { return clock_ns(CLOCK_MONOTONIC); }

static void nap(long us) { nanosleep(&(struct timespec){us / 1000000, us % 1000000 * 1000}, NULL); }

static int ascending(const void *a, const void *b) {
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return (x > y) - (x < y);
}

/* -- connections --------------------------------------------------------------------------------------------------- */

static struct sockaddr_in loopback(unsigned last, unsigned port) {
    return (struct sockaddr_in){
        .sin_family = AF_INET, .sin_addr.s_addr = htonl(0x7f000000 + last), .sin_port = htons((uint16_t)port)};
}

/* A socket of the n-th client. They come from several addresses, because one has no more than some 28,000 ports. */
static int new_socket(unsigned n, int flags) {
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | flags, 0), one = 1;
    if (fd < 0) fail("socket %u: %s", n, strerror(errno));
    struct sockaddr_in from = loopback(1 + n % ADDRESSES, 0);
    setsockopt(fd, IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, &one, sizeof one);
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    if (bind(fd, (struct sockaddr *)&from, sizeof from)) fail("bind: %s", strerror(errno));
    return fd;
}

static void open_client(unsigned port, const char *path) {
    struct client *c = &clients[count];
    struct sockaddr_in to = loopback(1, port);
    char request[512], number[16] = "";
    if (path[strlen(path) - 1] == '=') snprintf(number, sizeof number, "%u", count);
    int size = snprintf(request, sizeof request,
                        "GET %s%s HTTP/1.1\r\nHost: 127.0.0.1:%u\r\nAccept: text/event-stream\r\n\r\n", path, number,
                        port);
    memset(c, 0, sizeof *c);
    c->state = STATUS;
    c->fd = new_socket(count, 0);
    /* On the loopback interface connect() returns at once, and a request fits into any socket. */
    if (connect(c->fd, (struct sockaddr *)&to, sizeof to)) fail("client %u: connect: %s", count, strerror(errno));
    if (send(c->fd, request, (size_t)size, MSG_NOSIGNAL) != size) fail("client %u: %s", count, strerror(errno));
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = c};
    if (epoll_ctl(epoll, EPOLL_CTL_ADD, c->fd, &event)) fail("epoll_ctl: %s", strerror(errno));
    count++;
}

static void close_client(struct client *c) {
    close(c->fd);
    c->fd = -1;
    closed++;
    now_round.ended = now();
    if (now_round.active && !c->done) now_round.closed++;
    if (!storm.active) return;
    if (c->state != OPEN) storm.refused++;
    c->due = now() + (c->retry ? c->retry : 1000) * MS;
}

/* -- what they read ------------------------------------------------------------------------------------------------ */

/* The number at `at`, and what comes after it. NULL if it may go on behind `end`, or there is none. */
static const char *number(const char *at, const char *end, uint64_t *value) {
    const char *start = at;
    for (*value = 0; at < end && *at >= '0' && *at <= '9'; at++) *value = *value * 10 + (uint64_t)(*at - '0');
    return at < end && at > start ? at : NULL;
}

/* Pass over the head and the first block. Returns where the rest begins. */
static const char *prelude(struct client *c, const char *at, const char *end) {
    static const char *const ends[] = {[HEAD] = "\r\n\r\n", [BLOCK] = "\n\n"};
    if (c->state == STATUS) {
        if (end - at < 12 || memcmp(at, "HTTP/1.", 7) || memcmp(at + 9, "200", 3))
            fail("no stream: %.*s", (int)(end - at > 200 ? 200 : end - at), at);
        c->state = HEAD;
    }
    for (; at < end && c->state != OPEN; at++) {
        const char *wanted = ends[c->state];
        if (c->state == BLOCK && c->named < sizeof RETRY - 1)
            c->named = *at == RETRY[c->named] ? c->named + 1 : *at == RETRY[0];
        else if (c->state == BLOCK && c->named == sizeof RETRY - 1 && *at >= '0' && *at <= '9')
            c->retry = c->retry * 10 + (unsigned)(*at - '0');
        else if (c->state == BLOCK)
            c->named = sizeof RETRY;
        c->matched = *at == wanted[c->matched] ? c->matched + 1 : *at == wanted[0];
        if (wanted[c->matched]) continue;
        c->matched = 0;
        c->state++;
        if (c->state == OPEN) opened++;
    }
    return at;
}

static void saw(struct client *c, uint64_t n) {
    now_round.events++;
    if (n < c->next || n >= now_round.end) {
        now_round.disordered++;
        return;
    }
    now_round.missing += n - c->next;
    c->next = n + 1;
    if (c->next == now_round.end) {
        c->done = now();
        now_round.complete++;
    }
}

/* Take the events in [at, end). Returns where that begins which may be a mark, but is not whole yet. */
static const char *events(struct client *c, const char *at, const char *end) {
    static ptrdiff_t stride; /* from one mark to the next, the last time: mostly there is the next one, too */
    const char *last = NULL, *mark, *after;
    uint64_t n, t;
    for (;;) {
        if (last && now_round.active && end - last > stride + MARKED && !memcmp(last + stride, MARK, MARKED) &&
            (after = number(last + stride + MARKED, end, &n)) && n == c->next && n != now_round.first) {
            last += stride; /* nothing can be between, or the number would be another */
            at = after;
            saw(c, n);
            continue;
        }
        mark = memmem(at, (size_t)(end - at), MARK, MARKED);
        if (!mark) return end - at < MARKED ? at : end - MARKED + 1;
        after = number(mark + MARKED, end, &n);
        if (after && n == now_round.first) {
            after = end - after > STAMPED && !memcmp(after, STAMP, STAMPED) ? number(after + STAMPED, end, &t) : NULL;
            if (after && (!now_round.began || t < now_round.began)) now_round.began = t;
        }
        if (!after && end - mark < CARRY) return mark;
        if (last) stride = mark - last;
        last = mark;
        at = after ? after : mark + MARKED;
        if (after && now_round.active) saw(c, n);
    }
}

/* Note what the blocks in [at, end) say of coming back. They are whole: the end of the data is that of a block. */
static void note(struct client *c, const char *at, const char *end) {
    static const char ID[] = "\nid: ";
    const char *id, *last = NULL, *retry;
    uint64_t value;
    while (end > at && (end[-1] == '\n' || end[-1] == '\r')) end--;
    for (const char *from = at; (id = memmem(from, (size_t)(end - from), ID, sizeof ID - 1)); from = id + 1) last = id;
    if (last) {
        const char *start = last + sizeof ID - 1, *stop = memchr(start, '\n', (size_t)(end - start));
        size_t size = (size_t)((stop ? stop : end) - start);
        if (size < sizeof c->id[0] && (memcmp(c->id[0], start, size) || c->id[0][size])) {
            if (c->after[0] != c->next) { /* not that of an sse_bye, or both would stand for the same place */
                memcpy(c->id[1], c->id[0], sizeof c->id[0]);
                c->after[1] = c->after[0];
            }
            snprintf(c->id[0], sizeof c->id[0], "%.*s", (int)size, start);
            c->after[0] = c->next;
        }
    }
    retry = memmem(at, (size_t)(end - at), RETRY, sizeof RETRY - 1);
    if (retry && number(retry + sizeof RETRY - 1, end, &value)) c->retry = (unsigned)value;
}

/* What a client that has come back was told first. */
static void returned(struct client *c, const char *at, const char *end) {
    if (memmem(at, (size_t)(end - at), "sse_busy", 8)) {
        storm.busy++;
        opened--;
        return; /* the server closes it, and it comes back once more */
    }
    if (memmem(at, (size_t)(end - at), "sse_gap", 7)) storm.gaps++;
    if (!c->back) storm.back++;
    c->back = now();
}

/* One read. Whatever is left makes the socket readable again. */
static void readable(struct client *c) {
    ssize_t size = recv(c->fd, buffer + CARRY, READ, MSG_DONTWAIT);
    if (size < 0 && (errno == EAGAIN || errno == EINTR)) return;
    if (size <= 0) {
        close_client(c);
        return;
    }
    now_round.bytes += (uint64_t)size;
    const char *at = buffer + CARRY, *end = at + size;
    if (c->state != OPEN) {
        at = prelude(c, at, end);
        if (c->state != OPEN) return;
        if (storm.active) returned(c, buffer + CARRY, at);
    } else {
        at -= c->carried;
        memcpy(buffer + CARRY - c->carried, c->carry, c->carried);
    }
    at = events(c, at, end);
    c->carried = (unsigned)(end - at);
    memcpy(c->carry, at, c->carried);
    if (noting && end[-1] == '\n') note(c, buffer + CARRY, end);
}

/* Begin to come back. Does not wait: if the server's queue is full, the kernel tries again and again. */
static void reopen(struct client *c, unsigned port) {
    struct sockaddr_in to = loopback(1, port);
    c->fd = new_socket((unsigned)(c - clients), SOCK_NONBLOCK);
    c->state = CONNECTING;
    c->matched = c->carried = c->named = c->retry = 0;
    closed--;
    if (connect(c->fd, (struct sockaddr *)&to, sizeof to) && errno != EINPROGRESS) {
        close_client(c);
        return;
    }
    struct epoll_event event = {.events = EPOLLOUT, .data.ptr = c};
    if (epoll_ctl(epoll, EPOLL_CTL_ADD, c->fd, &event)) fail("epoll_ctl: %s", strerror(errno));
}

static void connected(struct client *c) {
    unsigned which = (unsigned)(c - clients) % 2;
    char request[512];
    int size = snprintf(request, sizeof request,
                        "GET %s HTTP/1.1\r\nHost: 127.0.0.1\r\nAccept: text/event-stream\r\nLast-Event-ID: %s\r\n\r\n",
                        stream_path, c->id[which]);
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = c};
    if (send(c->fd, request, (size_t)size, MSG_NOSIGNAL) != size || epoll_ctl(epoll, EPOLL_CTL_MOD, c->fd, &event)) {
        close_client(c);
        return;
    }
    c->state = STATUS;
}

/* Read what there is, for at most this long, and return how many sockets had something. */
static int turn(int timeout_ms, int *commanded) {
    static struct epoll_event ready[READY];
    int many = epoll_wait(epoll, ready, READY, timeout_ms);
    for (int i = 0; i < many; i++) {
        struct client *c = ready[i].data.ptr;
        if (!c)
            *commanded = 1;
        else if (c->fd >= 0 && c->state == CONNECTING)
            connected(c);
        else if (c->fd >= 0)
            readable(c);
    }
    return many;
}

/* -- commands ------------------------------------------------------------------------------------------------------ */

/* What the first blocks ask for: the least, the middle and the most, and how many come back in the busiest second. */
static void print_retries(void) {
    static uint64_t retries[MOST];
    unsigned busiest = 0, from = 0;
    for (unsigned i = 0; i < count; i++) retries[i] = clients[i].retry;
    qsort(retries, count, sizeof *retries, ascending);
    for (unsigned i = 0; i < count; i++) {
        while (retries[from] + 1000 <= retries[i]) from++;
        if (i - from + 1 > busiest) busiest = i - from + 1;
    }
    printf("{\"least_ms\": %" PRIu64 ", \"p50_ms\": %" PRIu64 ", \"most_ms\": %" PRIu64 ", \"busiest\": %u}", retries[0],
           retries[count / 2], retries[count ? count - 1 : 0], busiest);
}

static void connect_clients(unsigned port, const char *path, unsigned more, unsigned in_flight, uint64_t timeout) {
    uint64_t began = now(), progress = began;
    unsigned before = opened, seen = opened, target = count + more;
    int commanded = 0;
    if (target > MOST) fail("at most %d clients", MOST);
    while (opened - before < more && !closed && now() < progress + timeout * MS) {
        while (count < target && count - opened < in_flight) open_client(port, path);
        turn(100, &commanded);
        if (opened > seen) {
            seen = opened;
            progress = now();
        }
    }
    printf("{\"open\": %u, \"closed\": %u, \"seconds\": %.4f, \"retry\": ", opened, closed, (double)(now() - began) / 1e9);
    print_retries();
    printf("}\n");
}

static void begin_round(uint64_t first, uint64_t events, uint64_t timeout, int ending) {
    memset(&now_round, 0, sizeof now_round);
    now_round.active = 1;
    now_round.ending = ending;
    now_round.first = first;
    now_round.end = first + events;
    now_round.deadline = now() + timeout * MS;
    now_round.cpu = clock_ns(CLOCK_PROCESS_CPUTIME_ID);
    for (unsigned i = 0; i < count; i++) {
        clients[i].next = first;
        clients[i].done = 0;
        if (clients[i].fd < 0) now_round.closed++;
    }
    printf("{\"ready\": %u}\n", count);
}

static void end_round(void) {
    static uint64_t took[MOST];
    unsigned complete = 0;
    for (unsigned i = 0; i < count; i++) {
        if (clients[i].done)
            took[complete++] = clients[i].done - now_round.began;
        else
            now_round.missing += now_round.end - clients[i].next;
    }
    qsort(took, complete, sizeof *took, ascending);
    int timed = complete && now_round.began; /* not if nobody had the first event */
#define AT(share) (timed ? (double)took[(size_t)((complete - 1) * (share))] / 1e6 : -1.0)
    printf("{\"clients\": %u, \"complete\": %u, \"open\": %u, \"closed\": %u, \"events\": %" PRIu64 ", \"bytes\": %" PRIu64
           ", \"missing\": %" PRIu64 ", \"disordered\": %" PRIu64
           ", \"first_ms\": %.3f, \"p50_ms\": %.3f, \"p99_ms\": %.3f, \"last_ms\": %.3f, \"ended_ms\": %.3f, "
           "\"load_cpu_ms\": %.3f}\n",
           count, complete, count - closed, now_round.closed, now_round.events, now_round.bytes, now_round.missing,
           now_round.disordered, AT(0), AT(0.5), AT(0.99), AT(1),
           timed && now_round.ended ? (double)(now_round.ended - now_round.began) / 1e6 : -1.0,
           (double)(clock_ns(CLOCK_PROCESS_CPUTIME_ID) - now_round.cpu) / 1e6);
    now_round.active = 0;
}

static void print_times(const char *name, uint64_t *took, size_t many) {
    qsort(took, many, sizeof *took, ascending);
#define OF(share) (many ? (double)took[(size_t)((double)(many - 1) * (share))] / 1e6 : -1.0)
    printf("\"%s_p50_ms\": %.3f, \"%s_p99_ms\": %.3f, \"%s_last_ms\": %.3f, ", name, OF(0.5), name, OF(0.99), name, OF(1));
}

static void return_clients(unsigned port, uint64_t first, uint64_t end, int spread, uint64_t timeout) {
    static uint64_t took[MOST];
    int commanded = 0;
    uint64_t swept = 0, deadline, missing = 0;
    for (deadline = now() + timeout * MS; closed < count && now() < deadline;) turn(20, &commanded);
    if (closed < count) fail("%u of %u clients were not closed", count - closed, count);
    memset(&now_round, 0, sizeof now_round);
    memset(&storm, 0, sizeof storm);
    storm.active = now_round.active = 1;
    storm.began = now();
    now_round.first = first;
    now_round.end = end;
    for (unsigned i = 0; i < count; i++) {
        struct client *c = &clients[i];
        c->due = storm.began + (spread ? c->retry * MS : 0);
        c->next = c->after[i % 2];
        c->back = c->done = 0;
    }
    printf("{\"ready\": %u}\n", count);
    fflush(stdout);
    deadline = storm.began + timeout * MS;
    while (now() < deadline && (storm.back < count || (!storm.gaps && now_round.complete < count))) {
        if (now() - swept > MS) {
            swept = now();
            for (unsigned i = 0; i < count; i++)
                if (clients[i].fd < 0 && clients[i].due <= swept) reopen(&clients[i], port);
        }
        turn(1, &commanded);
    }
    size_t many = 0;
    for (unsigned i = 0; i < count; i++) {
        if (clients[i].back) took[many++] = clients[i].back - storm.began;
        if (!clients[i].done) missing += end - clients[i].next;
    }
    printf("{\"clients\": %u, \"back\": %u, \"complete\": %u, \"gaps\": %u, \"busy\": %u, \"refused\": %u, ", count,
           storm.back, now_round.complete, storm.gaps, storm.busy, storm.refused);
    print_times("back", took, many);
    many = 0;
    for (unsigned i = 0; i < count; i++)
        if (clients[i].back) took[many++] = clients[i].back - (clients[i].due ? clients[i].due : storm.began);
    print_times("waited", took, many);
    printf("\"missing\": %" PRIu64 ", \"disordered\": %" PRIu64 "}\n", missing + now_round.missing, now_round.disordered);
    storm.active = now_round.active = 0;
}

static void command(unsigned port, const char *path) {
    char line[256];
    uint64_t a, b, c, d;
    if (!fgets(line, sizeof line, stdin)) exit(0);
    if (sscanf(line, "connect %" SCNu64 " %" SCNu64 " %" SCNu64, &a, &b, &c) == 3)
        connect_clients(port, path, (unsigned)a, (unsigned)b, c);
    else if (sscanf(line, "round %" SCNu64 " %" SCNu64 " %" SCNu64, &a, &b, &c) == 3)
        begin_round(a, b, c, 0);
    else if (sscanf(line, "ending %" SCNu64 " %" SCNu64 " %" SCNu64, &a, &b, &c) == 3)
        begin_round(a, b, c, 1);
    else if (!strncmp(line, "note", 4)) {
        noting = 1;
        printf("{}\n");
    } else if (sscanf(line, "return %" SCNu64 " %" SCNu64 " %" SCNu64 " %" SCNu64, &a, &b, &c, &d) == 4)
        return_clients(port, a, b, (int)c, d);
    else
        fail("no such command: %s", line);
    fflush(stdout);
}

static void streams(unsigned port, const char *path) {
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = NULL};
    stream_path = path;
    epoll = epoll_create1(EPOLL_CLOEXEC);
    setvbuf(stdin, NULL, _IONBF, 0); /* or a second line would be in the buffer, and not seen by epoll */
    if (epoll_ctl(epoll, EPOLL_CTL_ADD, 0, &event)) fail("stdin: %s", strerror(errno));
    for (;;) {
        int commanded = 0, many = turn(now_round.active ? 20 : 1000, &commanded);
        if (commanded) command(port, path);
        if (!now_round.active) continue;
        unsigned over = now_round.ending ? closed : now_round.complete + now_round.closed;
        if (over >= count || now() > now_round.deadline) {
            end_round();
            fflush(stdout);
        } else if (many < 64) {
            nap(300); /* let more come: to wake us for each send costs the server more than the send */
        }
    }
}

/* -- pages, each on a connection of its own ------------------------------------------------------------------------ */

static void pages(unsigned port, const char *path, unsigned many, unsigned in_flight) {
    static struct epoll_event ready[READY];
    unsigned done = 0;
    uint64_t began = now();
    epoll = epoll_create1(EPOLL_CLOEXEC);
    while (done < many) {
        while (count < many && count - done < in_flight) open_client(port, path);
        int some = epoll_wait(epoll, ready, READY, 10000);
        if (some <= 0) fail("only %u of %u pages were answered", done, many);
        for (int i = 0; i < some; i++) {
            struct client *c = ready[i].data.ptr;
            ssize_t size = recv(c->fd, buffer, READ, MSG_DONTWAIT);
            if (size < 0 && (errno == EAGAIN || errno == EINTR)) continue;
            /* A short page comes in one or two pieces, the head first: its end is not looked for. */
            if (size < 12 || memcmp(buffer + 9, "200", 3)) fail("no page: %.*s", (int)(size > 0 ? size : 0), buffer);
            close_client(c);
            done++;
        }
    }
    printf("{\"seconds\": %.4f}\n", (double)(now() - began) / 1e9);
}

/* -- another page -------------------------------------------------------------------------------------------------- */

static int stdin_closed(void) {
    struct pollfd in = {.fd = 0, .events = POLLIN};
    return poll(&in, 1, 0) > 0;
}

static void ping(unsigned port, const char *path, double seconds, long pause_us, int fresh) {
    static uint64_t took[1 << 20];
    size_t many = 0;
    char request[512], answer[65536];
    struct sockaddr_in to = loopback(1, port);
    int fd = -1, connects = 0;
    int size = snprintf(request, sizeof request, "GET %s HTTP/1.1\r\nHost: 127.0.0.1:%u\r\n\r\n", path, port);
    for (uint64_t end = now() + (uint64_t)(seconds * 1e9); now() < end && many < sizeof took / sizeof *took && !stdin_closed();) {
        uint64_t began = now();
        if (fd < 0) {
            fd = new_socket(0, 0);
            connects++;
            if (connect(fd, (struct sockaddr *)&to, sizeof to)) fail("ping: connect: %s", strerror(errno));
        }
        if (!fresh) began = now();
        if (send(fd, request, (size_t)size, MSG_NOSIGNAL) != size) fail("ping: send: %s", strerror(errno));
        ssize_t came = 0;
        for (;;) { /* an answer is whole when it ends in "pong" */
            ssize_t more = recv(fd, answer + came, sizeof answer - (size_t)came, 0);
            if (more <= 0) break;
            came += more;
            if (came >= 4 && !memcmp(answer + came - 4, "pong", 4)) break;
        }
        if (came < 16 || memcmp(answer + 9, "200", 3)) fail("ping: %.*s", (int)came, answer);
        took[many++] = now() - began;
        if (fresh || memmem(answer, (size_t)came, "onnection: close", 16)) {
            close(fd);
            fd = -1;
        }
        nap(pause_us);
    }
    qsort(took, many, sizeof *took, ascending);
    printf("{\"asked\": %zu, \"connects\": %d, \"p50_ms\": %.3f, \"p99_ms\": %.3f, \"max_ms\": %.3f}\n", many, connects,
           (double)took[many / 2] / 1e6, (double)took[many * 99 / 100] / 1e6, (double)took[many - 1] / 1e6);
}

int main(int argc, char **argv) {
    struct rlimit limit;
    getrlimit(RLIMIT_NOFILE, &limit);
    limit.rlim_cur = limit.rlim_max;
    setrlimit(RLIMIT_NOFILE, &limit);
    if (argc == 4 && !strcmp(argv[1], "streams"))
        streams((unsigned)atoi(argv[2]), argv[3]);
    else if (argc == 6 && !strcmp(argv[1], "pages"))
        pages((unsigned)atoi(argv[2]), argv[3], (unsigned)atoi(argv[4]), (unsigned)atoi(argv[5]));
    else if (argc >= 6 && !strcmp(argv[1], "ping"))
        ping((unsigned)atoi(argv[2]), argv[3], atof(argv[4]), atol(argv[5]), argc > 6);
    else
        fail("usage: load streams PORT PATH | load pages PORT PATH COUNT IN_FLIGHT | load ping PORT PATH SECONDS PAUSE_US");
    return 0;
}
