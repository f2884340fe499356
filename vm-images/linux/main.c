/* Reads the parameters from the kernel command line and starts the threads. */
#include <arpa/inet.h>
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "work.h"

struct parameters parameters = {.dirty_set_bytes = 64 << 20, .disk_records_per_s = 200, .disk_slots = 1024};
char boot_id[37];
uint8_t boot_id_bytes[16];
counter beats_sent, dirtied_bytes, dirty_passes, memory_errors, working_set_bytes;
struct disk_state disk_states[DISKS_MAX];

uint64_t now_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

void sleep_us(uint64_t us)
{
    struct timespec pause = {.tv_sec = (time_t)(us / 1000000), .tv_nsec = (long)(us % 1000000 * 1000)};

    while (nanosleep(&pause, &pause) && errno == EINTR)
        ;
}

void pace_take(struct pace *pace, uint64_t cost)
{
    uint64_t now = now_ns();

    if (pace->due_ns + 250000000u < now)
        pace->due_ns = now - 250000000u;
    if (pace->due_ns > now)
        sleep_us((pace->due_ns - now) / 1000 + 1);
    pace->due_ns += cost * 1000000000u / pace->per_s;
}

void start_thread(void *(*body)(void *), void *argument)
{
    pthread_t thread;
    int error = pthread_create(&thread, NULL, body, argument);

    if (error) {
        fprintf(stderr, "work: no thread: %s\n", strerror(error));
        exit(1);
    }
    pthread_detach(thread);
}

static void bad(const char *name, const char *value)
{
    fprintf(stderr, "work: %s=%s is not understood and not used\n", name, value);
}

/* "20M" -> 20 << 20; "max" -> UINT64_MAX. */
static int parse_size(const char *text, uint64_t *size)
{
    char *end;

    if (!strcmp(text, "max")) {
        *size = UINT64_MAX;
        return 1;
    }
    *size = strtoull(text, &end, 10);
    if (end == text)
        return 0;
    switch (*end) {
    case 'k': case 'K': *size <<= 10, end++; break;
    case 'm': case 'M': *size <<= 20, end++; break;
    case 'g': case 'G': *size <<= 30, end++; break;
    }
    return *end == 0;
}

/* "10.77.2.1:9000", and for beats "@5ms" behind it. */
static int parse_address(char *text, struct sockaddr_in *address, uint64_t *every_us)
{
    char *at = strchr(text, '@'), *colon, *end;

    if (at) {
        *at++ = 0;
        uint64_t every = strtoull(at, &end, 10);
        if (!every_us || !every || strcmp(end, "ms"))
            return 0;
        *every_us = every * 1000;
    }
    colon = strchr(text, ':');
    if (!colon)
        return 0;
    *colon++ = 0;
    address->sin_family = AF_INET;
    address->sin_port = htons((uint16_t)strtoul(colon, &end, 10));
    return end != colon && !*end && inet_pton(AF_INET, text, &address->sin_addr) == 1;
}

static void add_disks(char *list)
{
    char *rest;

    for (char *path = strtok_r(list, ",", &rest); path; path = strtok_r(NULL, ",", &rest)) {
        const char *name = strrchr(path, '/');
        int index = parameters.disks;

        name = name ? name + 1 : path;
        if (index == DISKS_MAX || strlen(path) >= sizeof parameters.disk[0] ||
            strlen(name) >= sizeof disk_states[0].name) {
            bad("kvmhv.disk", path);
            continue;
        }
        strcpy(parameters.disk[index], path);
        strcpy(disk_states[index].name, name);
        parameters.disks++;
    }
}

static void parse_word(char *word)
{
    char *value = strchr(word, '=');
    int good = 1;

    if (strncmp(word, "kvmhv.", 6) || !value)
        return;
    *value++ = 0;
    char *copy = strdup(value);
    const char *name = word + 6;
    if (!strcmp(name, "dirty"))
        parameters.dirty = good = parse_size(value, &parameters.dirty_bytes_per_s);
    else if (!strcmp(name, "dirty_set"))
        good = parse_size(value, &parameters.dirty_set_bytes);
    else if (!strcmp(name, "dirty_kind")) {
        parameters.compressible = !strcmp(value, "compressible");
        good = parameters.compressible || !strcmp(value, "random");
    } else if (!strcmp(name, "disk"))
        add_disks(value);
    else if (!strcmp(name, "disk_rate"))
        good = parse_size(value, &parameters.disk_records_per_s);
    else if (!strcmp(name, "disk_slots"))
        good = parse_size(value, &parameters.disk_slots);
    else if (!strcmp(name, "ack"))
        good = parse_address(value, &parameters.ack, NULL);
    else if (!strcmp(name, "beat")) {
        parameters.beat_us = 5000;
        good = parse_address(value, &parameters.beat, &parameters.beat_us);
    } else if (strcmp(name, "ip"))
        good = 0;
    if (!good)
        bad(word, copy);
    free(copy);
}

static void read_file(const char *path, char *text, size_t size)
{
    FILE *file = fopen(path, "r");

    if (!file || !fgets(text, (int)size, file)) {
        fprintf(stderr, "work: cannot read %s: %s\n", path, strerror(errno));
        exit(1);
    }
    fclose(file);
}

int main(void)
{
    static char line[4096];
    char *rest;

    signal(SIGPIPE, SIG_IGN);
    read_file("/proc/sys/kernel/random/boot_id", boot_id, sizeof boot_id);
    for (int i = 0, at = 0; i < 16; i++, at += 2) {
        at += boot_id[at] == '-';
        sscanf(boot_id + at, "%2hhx", &boot_id_bytes[i]);
    }
    read_file("/proc/cmdline", line, sizeof line);
    for (char *word = strtok_r(line, " \n", &rest); word; word = strtok_r(NULL, " \n", &rest))
        parse_word(word);

    start_thread(echo_thread, NULL);
    start_thread(status_thread, NULL);
    start_thread(button_thread, NULL);
    if (parameters.beat.sin_port)
        start_thread(beat_thread, NULL);
    if (parameters.dirty)
        start_thread(memory_thread, NULL);
    for (intptr_t i = 0; i < parameters.disks; i++)
        start_thread(disk_thread, (void *)i);
    for (;;)
        pause();
}
