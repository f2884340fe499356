/* Delivers acknowledgements over TCP, in order and none lost: an entry leaves the queue when the other side has confirmed it.
 * After a broken connection all that is not confirmed is sent again; the other side knows them by boot and record number. A
 * full queue makes the writer wait.
 *
 * One connection a disk. We send "<disk> <record> <slot> <crc> <kind> <boot id>\n", the other side answers "<count>\n": so many
 * lines have arrived on this connection.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include "work.h"

enum { QUEUE = 1024, LINE_BYTES = 160, CONNECT_MS = 2000, DEAD_MS = 10000 };

static struct queue {
    pthread_mutex_t lock;
    pthread_cond_t room;
    struct ack entries[QUEUE];
    /* Counts since boot: first not confirmed, next to send, end of the queue; and `first` when this connection began. */
    uint64_t first, next, end, base;
    int wake;
} queues[DISKS_MAX];

void acks_put(int disk, const struct ack *ack)
{
    struct queue *queue = &queues[disk];
    uint64_t one = 1;

    if (!parameters.ack.sin_port)
        return;
    pthread_mutex_lock(&queue->lock);
    while (queue->end - queue->first == QUEUE)
        pthread_cond_wait(&queue->room, &queue->lock);
    queue->entries[queue->end++ % QUEUE] = *ack;
    pthread_mutex_unlock(&queue->lock);
    if (write(queue->wake, &one, sizeof one) < 0)
        perror("work: eventfd");
}

void acks_wait(int disk)
{
    struct queue *queue = &queues[disk];

    if (!parameters.ack.sin_port)
        return;
    pthread_mutex_lock(&queue->lock);
    while (queue->first != queue->end)
        pthread_cond_wait(&queue->room, &queue->lock);
    pthread_mutex_unlock(&queue->lock);
}

static int connect_to_ack(void)
{
    int file = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0), error = 0, one = 1, dead_ms = DEAD_MS;
    socklen_t size = sizeof error;
    struct pollfd wait = {.fd = file, .events = POLLOUT};

    setsockopt(file, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    setsockopt(file, IPPROTO_TCP, TCP_USER_TIMEOUT, &dead_ms, sizeof dead_ms);
    if (connect(file, (struct sockaddr *)&parameters.ack, sizeof parameters.ack) && errno != EINPROGRESS)
        error = errno;
    else if (poll(&wait, 1, CONNECT_MS) != 1 || getsockopt(file, SOL_SOCKET, SO_ERROR, &error, &size))
        error = ETIMEDOUT;
    if (!error)
        return file;
    close(file);
    return -1;
}

/* Take "<count>\n" lines; what they count is done with. Returns -1 on a line that makes no sense. */
static int confirm(struct queue *queue, int disk, char *text, size_t *length)
{
    char *line = text, *newline;

    while ((newline = memchr(line, '\n', *length - (size_t)(line - text)))) {
        char *end;
        uint64_t count = strtoull(line, &end, 10);
        if (end != newline || queue->base + count > queue->next)
            return -1;
        pthread_mutex_lock(&queue->lock);
        for (; queue->first < queue->base + count; queue->first++) {
            const struct ack *ack = &queue->entries[queue->first % QUEUE];
            if (ack->kind <= DISCARD)
                disk_states[disk].acknowledged = ack->record;
        }
        pthread_cond_signal(&queue->room);
        pthread_mutex_unlock(&queue->lock);
        line = newline + 1;
    }
    *length -= (size_t)(line - text);
    memmove(text, line, *length);
    return 0;
}

/* Send on one connection until it breaks. */
static void deliver(struct queue *queue, int disk, int file)
{
    static const char *const kinds[] = {"data", "zeros", "discard", "will-zeros", "will-discard", "start"};
    char out[LINE_BYTES], in[256];
    size_t out_length = 0, out_sent = 0, in_length = 0;

    for (;;) {
        if (out_sent == out_length) { /* the next line */
            out_length = out_sent = 0;
            pthread_mutex_lock(&queue->lock);
            if (queue->next < queue->end) {
                const struct ack *ack = &queue->entries[queue->next++ % QUEUE];
                out_length = (size_t)snprintf(out, sizeof out, "%s %llu %llu %08x %s %s\n", disk_states[disk].name,
                                              (unsigned long long)ack->record, (unsigned long long)ack->slot, ack->crc,
                                              kinds[ack->kind], boot_id);
            }
            pthread_mutex_unlock(&queue->lock);
        }
        struct pollfd wait[2] = {
            {.fd = file, .events = (short)(POLLIN | (out_length ? POLLOUT : 0))},
            {.fd = queue->wake, .events = POLLIN},
        };
        if (poll(wait, 2, -1) < 0)
            continue;
        if (wait[1].revents) {
            uint64_t count;
            if (read(queue->wake, &count, sizeof count) < 0)
                continue;
        }
        if (wait[0].revents & POLLOUT) {
            ssize_t sent = send(file, out + out_sent, out_length - out_sent, MSG_NOSIGNAL);
            if (sent < 0 && errno != EAGAIN)
                return;
            out_sent += sent > 0 ? (size_t)sent : 0;
        }
        if (wait[0].revents & (POLLIN | POLLERR | POLLHUP)) {
            ssize_t got = recv(file, in + in_length, sizeof in - in_length, 0);
            if (got == 0 || (got < 0 && errno != EAGAIN))
                return;
            in_length += got > 0 ? (size_t)got : 0;
            if (confirm(queue, disk, in, &in_length) || in_length == sizeof in)
                return;
        }
    }
}

static void *ack_thread(void *index)
{
    int disk = (int)(intptr_t)index;
    struct queue *queue = &queues[disk];

    for (;;) {
        int file = connect_to_ack();
        if (file < 0) {
            sleep_us(200000);
            continue;
        }
        pthread_mutex_lock(&queue->lock);
        queue->base = queue->next = queue->first;
        pthread_mutex_unlock(&queue->lock);
        deliver(queue, disk, file);
        close(file);
        fprintf(stderr, "work: the connection for acknowledgements of %s broke\n", disk_states[disk].name);
        sleep_us(200000);
    }
    return NULL;
}

void acks_start(int disk)
{
    struct queue *queue = &queues[disk];

    if (!parameters.ack.sin_port)
        return;
    pthread_mutex_init(&queue->lock, NULL);
    pthread_cond_init(&queue->room, NULL);
    queue->wake = eventfd(0, EFD_CLOEXEC);
    start_thread(ack_thread, (void *)(intptr_t)disk);
}
