/* Dirties a working set at a known rate and verifies each page whenever it comes back to it.
 *
 * Page i is written with generation g in sweep g. A sweep goes through the pages in order, so what a page must hold is known
 * without looking at it: a page that a move left stale, torn or in another's place is found.
 */
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sysinfo.h>

#include "work.h"

enum { PAGE_WORDS = PAGE_BYTES / 8, BAD_LINES = 32, BATCH_PAGES = 16 };

static uint64_t *pages;

static void write_page(uint64_t page, uint64_t generation)
{
    uint64_t *at = pages + page * PAGE_WORDS, value = seed_of(page, generation);

    for (int i = 0; i < PAGE_WORDS; i++) {
        at[i] = value;
        if (!parameters.compressible)
            value = next_random(value);
    }
}

static void verify_page(uint64_t page, uint64_t generation)
{
    const volatile uint64_t *at = pages + page * PAGE_WORDS;
    uint64_t value = seed_of(page, generation);

    for (int i = 0; i < PAGE_WORDS; i++) {
        uint64_t found = at[i];
        if (found != value) {
            if (memory_errors++ < BAD_LINES)
                fprintf(stderr, "work: BAD page %llu word %d generation %llu want %016llx got %016llx\n",
                        (unsigned long long)page, i, (unsigned long long)generation, (unsigned long long)value,
                        (unsigned long long)found);
            write_page(page, generation); /* so that one damage is counted once */
            return;
        }
        if (!parameters.compressible)
            value = next_random(value);
    }
}

/* What was asked for, or three quarters of what is free: the guest must not die of its own test. */
static uint64_t fitting_set_bytes(void)
{
    struct sysinfo memory;
    uint64_t wanted = parameters.dirty_set_bytes, room;

    sysinfo(&memory);
    room = (uint64_t)memory.freeram * memory.mem_unit / 4 * 3;
    if (wanted > room) {
        fprintf(stderr, "work: kvmhv.dirty_set does not fit, %llu MiB are used\n", (unsigned long long)room >> 20);
        wanted = room;
    }
    return wanted / PAGE_BYTES * PAGE_BYTES;
}

void *memory_thread(void *unused)
{
    uint64_t bytes = fitting_set_bytes(), count = bytes / PAGE_BYTES, rate = parameters.dirty_bytes_per_s;
    struct pace pace = {.per_s = rate ? rate : 4 << 20}; /* idle: only looks, 4 MiB/s */

    (void)unused;
    pages = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (pages == MAP_FAILED || !count) {
        fprintf(stderr, "work: no memory for kvmhv.dirty_set\n");
        return NULL;
    }
    for (uint64_t page = 0; page < count; page++)
        write_page(page, 1);
    working_set_bytes = bytes;
    for (uint64_t generation = 1;; dirty_passes++) {
        for (uint64_t page = 0; page < count; page++) {
            if (page % BATCH_PAGES == 0 && rate != UINT64_MAX)
                pace_take(&pace, BATCH_PAGES * PAGE_BYTES);
            verify_page(page, generation);
            if (rate) {
                write_page(page, generation + 1);
                dirtied_bytes += PAGE_BYTES;
            }
        }
        if (rate)
            generation++;
    }
}
