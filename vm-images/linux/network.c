/* What can be seen from outside: heartbeats (UDP), an echo (TCP port 7), the status (TCP port 8). */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "work.h"

enum { ECHO_PORT = 7, STATUS_PORT = 8, ECHO_CONNECTIONS_MAX = 16, SEND_TIMEOUT_S = 5 };

/* "beat <boot id> <sequence> <monotonic ns>\n" in each datagram. A beat that is late is sent late, never doubled or skipped. */
void *beat_thread(void *unused)
{
    int file = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    uint64_t due_ns = now_ns(), every_ns = parameters.beat_us * 1000;
    char text[128];

    (void)unused;
    for (uint64_t sequence = 1;; sequence++) {
        uint64_t now = now_ns();
        if (due_ns > now)
            sleep_us((due_ns - now) / 1000);
        else if (now - due_ns > every_ns)
            due_ns = now; /* no bursts after a pause */
        due_ns += every_ns;
        int length = snprintf(text, sizeof text, "beat %s %llu %llu\n", boot_id, (unsigned long long)sequence,
                              (unsigned long long)now_ns());
        /* A datagram that cannot be sent is a lost beat, and the listener sees it by its number. */
        if (sendto(file, text, (size_t)length, 0, (struct sockaddr *)&parameters.beat, sizeof parameters.beat) >= 0)
            beats_sent = sequence;
    }
}

static int listen_on(uint16_t port)
{
    int file = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), one = 1;
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(port)};

    setsockopt(file, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (bind(file, (struct sockaddr *)&address, sizeof address) || listen(file, 16)) {
        fprintf(stderr, "work: port %d: %s\n", port, strerror(errno));
        exit(1);
    }
    return file;
}

static atomic_int echo_connections;

static void *echo_connection(void *argument)
{
    int file = (int)(intptr_t)argument;
    char text[4096];
    ssize_t got;

    while ((got = recv(file, text, sizeof text, 0)) > 0)
        for (ssize_t sent = 0, now; sent < got; sent += now)
            if ((now = send(file, text + sent, (size_t)(got - sent), 0)) < 0)
                goto end;
end:
    close(file);
    echo_connections--;
    return NULL;
}

void *echo_thread(void *unused)
{
    int file = listen_on(ECHO_PORT);

    (void)unused;
    for (;;) {
        int connection = accept(file, NULL, NULL);
        if (connection < 0)
            continue;
        if (++echo_connections > ECHO_CONNECTIONS_MAX) {
            echo_connections--;
            close(connection);
            continue;
        }
        start_thread(echo_connection, (void *)(intptr_t)connection);
    }
}

static void print_status(FILE *out)
{
    fprintf(out, "{\"boot_id\": \"%s\", \"uptime_s\": %.3f, \"beats\": %llu, \"working_set_bytes\": %llu,", boot_id,
            (double)now_ns() / 1e9, (unsigned long long)beats_sent, (unsigned long long)working_set_bytes);
    fprintf(out, " \"dirtied_bytes\": %llu, \"dirty_passes\": %llu, \"memory_errors\": %llu, \"disks\": [",
            (unsigned long long)dirtied_bytes, (unsigned long long)dirty_passes, (unsigned long long)memory_errors);
    for (int i = 0; i < parameters.disks; i++) {
        const struct disk_state *disk = &disk_states[i];
        fprintf(out,
                "%s{\"name\": \"%s\", \"slots\": %llu, \"written\": %llu, \"acknowledged\": %llu, \"errors\": %llu, "
                "\"mismatches\": %llu}",
                i ? ", " : "", disk->name, (unsigned long long)disk->slots, (unsigned long long)disk->written,
                (unsigned long long)disk->acknowledged, (unsigned long long)disk->errors,
                (unsigned long long)disk->mismatches);
    }
    fprintf(out, "]}\n");
}

void *status_thread(void *unused)
{
    int file = listen_on(STATUS_PORT);
    struct timeval timeout = {.tv_sec = SEND_TIMEOUT_S};

    (void)unused;
    for (;;) {
        int connection = accept(file, NULL, NULL);
        if (connection < 0)
            continue;
        setsockopt(connection, SOL_SOCKET, SO_SNDTIMEO, &timeout, sizeof timeout);
        FILE *out = fdopen(connection, "w");
        if (!out) {
            close(connection);
            continue;
        }
        print_status(out);
        fclose(out);
    }
}
