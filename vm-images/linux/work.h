/* The work of the Linux guest: what its threads share. main.c has the parameters, README.md the protocols. */
#ifndef WORK_H
#define WORK_H

#include <netinet/in.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>

enum { DISKS_MAX = 8, PAGE_BYTES = 4096, SLOT_BYTES = 4096 };

typedef _Atomic uint64_t counter;

/* From the kernel command line; zero means: not asked for. */
struct parameters {
    struct sockaddr_in ack, beat; /* sin_port 0: none */
    uint64_t beat_us;
    int dirty;                    /* kvmhv.dirty was given */
    uint64_t dirty_bytes_per_s;   /* 0: only verify; UINT64_MAX: as fast as it can */
    uint64_t dirty_set_bytes;
    int compressible;
    uint64_t disk_records_per_s;  /* 0: as fast as it can */
    uint64_t disk_slots;          /* distinct slots in use; 0: all */
    int disks;
    char disk[DISKS_MAX][64];
};

struct disk_state {
    char name[8];
    counter slots, written, acknowledged, errors, mismatches;
};

extern struct parameters parameters;
extern char boot_id[37];           /* as the kernel prints it */
extern uint8_t boot_id_bytes[16];
extern counter beats_sent, dirtied_bytes, dirty_passes, memory_errors, working_set_bytes;
extern struct disk_state disk_states[DISKS_MAX];

uint64_t now_ns(void); /* CLOCK_MONOTONIC */
void sleep_us(uint64_t us);
void start_thread(void *(*body)(void *), void *argument);

/* A pace: `take` waits until `cost` units at `per_s` are due. What was missed longer than 250 ms ago is not made up for. */
struct pace {
    uint64_t per_s, due_ns;
};
void pace_take(struct pace *pace, uint64_t cost);

/* The sequence that all patterns are made of (xorshift64, Marsaglia 2003); never 0 from a seed that is not 0. */
static inline uint64_t next_random(uint64_t x)
{
    x ^= x << 13;
    x ^= x >> 7;
    return x ^ x << 17;
}

/* Mixes two numbers into a seed (the finaliser of splitmix64); neighbours give unrelated results. */
static inline uint64_t seed_of(uint64_t a, uint64_t b)
{
    uint64_t x = (a + 1) * 0x9e3779b97f4a7c15u ^ (b + 1) * 0xd1b54a32d192ed03u;

    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    x ^= x >> 31;
    return x ? x : 1;
}

/* Thread bodies. */
void *memory_thread(void *unused);
void *disk_thread(void *index);
void *beat_thread(void *unused);
void *echo_thread(void *unused);
void *status_thread(void *unused);
void *button_thread(void *unused);

/* Acknowledgements of one disk: a bounded queue and a thread that delivers it. */
enum kind { DATA, ZEROS, DISCARD, WILL_ZEROS, WILL_DISCARD, START };
struct ack {
    uint64_t record, slot;
    uint32_t crc;
    enum kind kind;
};
void acks_start(int disk);
void acks_put(int disk, const struct ack *ack); /* waits while the queue is full */
void acks_wait(int disk);                       /* until all is confirmed */

#endif
