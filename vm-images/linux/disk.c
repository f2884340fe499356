/* Writes numbered, checksummed records to a disk: each is on the disk (fdatasync) before it is acknowledged.
 *
 * A small part of the records are zeros or discards, for these are what moves of disks lose. The slots are spread over the
 * whole device; the first and the last are always among them and are written often. Before a slot is written again it is
 * read and compared with what was last put there.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "work.h"

enum { VERIFY_SLOTS_MAX = 65536, BAD_LINES = 32 };

/* On the disk, little endian; README.md lists the fields. */
struct record {
    char magic[8], disk[8];
    uint64_t number, slot;
    uint8_t boot_id[16];
    uint32_t length, crc; /* the CRC is of the whole record with this field 0 */
    uint64_t payload[(SLOT_BYTES - 56) / 8];
};
_Static_assert(sizeof(struct record) == SLOT_BYTES, "a record fills a slot");

/* What was last put into a slot that is in use. */
struct content {
    uint64_t record;
    enum kind kind;
};

struct writer {
    int index, file;
    struct disk_state *state;
    uint64_t device_bytes, slots, used;
    struct content *contents; /* by number of the used slot; NULL: too many to remember */
    struct record *record, *found;
};

static uint32_t crc32_of(const void *data, size_t length)
{
    static _Atomic(uint32_t *) shared;
    const uint8_t *at = data;
    uint32_t crc = 0xffffffff, *table = shared;

    if (!table) {
        table = malloc(256 * sizeof *table);
        for (uint32_t i = 0; i < 256; i++) {
            table[i] = i;
            for (int bit = 0; bit < 8; bit++)
                table[i] = table[i] >> 1 ^ (table[i] & 1 ? 0xedb88320 : 0);
        }
        shared = table;
    }
    while (length--)
        crc = table[(crc ^ *at++) & 255] ^ crc >> 8;
    return ~crc;
}

/* The last slot is short if the device is not a multiple of 4096 bytes. */
static uint32_t slot_length(const struct writer *writer, uint64_t slot)
{
    uint64_t rest = writer->device_bytes - slot * SLOT_BYTES;

    return rest < SLOT_BYTES ? (uint32_t)rest : SLOT_BYTES;
}

/* The place of a used slot: 0 is the first on the device, 1 the last, each other has a stretch of its own to be in. */
static uint64_t place(const struct writer *writer, uint64_t used)
{
    uint64_t stretch = writer->slots / writer->used;

    if (stretch < 2 || used == 0)
        return used;
    if (used == 1)
        return writer->slots - 1;
    return used * stretch + seed_of(used, 0) % (stretch - 1); /* never the last of the device */
}

static uint32_t make_record(const struct writer *writer, struct record *record, uint64_t number, uint64_t slot)
{
    uint64_t value = seed_of(number, slot);

    memset(record, 0, sizeof *record);
    memcpy(record->magic, "KVMHVREC", 8);
    memcpy(record->disk, writer->state->name, 8);
    record->number = number;
    record->slot = slot;
    memcpy(record->boot_id, boot_id_bytes, 16);
    record->length = slot_length(writer, slot);
    for (size_t i = 0; i < sizeof record->payload / 8; i++, value = next_random(value))
        record->payload[i] = value;
    record->crc = crc32_of(record, record->length);
    return record->crc;
}

/* Announce something about a slot and wait until the other side knows it. */
static void announce(const struct writer *writer, enum kind kind, uint64_t number, uint64_t slot)
{
    struct ack ack = {.record = number, .slot = slot, .kind = kind};

    acks_put(writer->index, &ack);
    acks_wait(writer->index);
}

/* Compare a slot with what this boot last put there. Discarded slots may hold anything. */
static void verify(struct writer *writer, uint64_t used, uint64_t slot)
{
    struct content content = writer->contents[used];
    uint32_t length = slot_length(writer, slot);

    if (!content.record || content.kind == DISCARD)
        return;
    if (pread(writer->file, writer->found, length, (off_t)(slot * SLOT_BYTES)) != (ssize_t)length) {
        writer->state->errors++;
        return;
    }
    if (content.kind == ZEROS)
        memset(writer->record, 0, sizeof *writer->record);
    else
        make_record(writer, writer->record, content.record, slot);
    if (memcmp(writer->record, writer->found, length) && writer->state->mismatches++ < BAD_LINES)
        fprintf(stderr, "work: BAD slot %llu of %s: not record %llu\n", (unsigned long long)slot, writer->state->name,
                (unsigned long long)content.record);
}

/* Put a record into its slot and wait until it is on the disk. Returns 0 and the kind that was really done. */
static int put(struct writer *writer, uint64_t number, uint64_t slot, struct ack *ack)
{
    uint32_t length = slot_length(writer, slot);
    uint64_t range[2] = {slot * SLOT_BYTES, length};
    int done;

    if (ack->kind == DISCARD && ioctl(writer->file, BLKDISCARD, range)) {
        if (errno != EOPNOTSUPP)
            return -1;
        ack->kind = ZEROS; /* a device that cannot discard */
    }
    if (ack->kind == DATA)
        ack->crc = make_record(writer, writer->record, number, slot);
    else
        memset(writer->record, 0, sizeof *writer->record);
    /* Zeros go both ways: as a write of zeros and as a request to zero. */
    if (ack->kind == ZEROS && number % 2)
        done = !ioctl(writer->file, BLKZEROOUT, range);
    else
        done = ack->kind == DISCARD ||
               pwrite(writer->file, writer->record, length, (off_t)range[0]) == (ssize_t)length;
    return done && !fdatasync(writer->file) ? 0 : -1;
}

static int open_disk(struct writer *writer)
{
    const char *path = parameters.disk[writer->index];

    for (int tries = 0; (writer->file = open(path, O_RDWR | O_DIRECT | O_CLOEXEC)) < 0; tries++) {
        if (tries == 100) /* it may appear a moment after its driver */
            break;
        sleep_us(100000);
    }
    if (writer->file < 0 || ioctl(writer->file, BLKGETSIZE64, &writer->device_bytes) || writer->device_bytes < 512) {
        fprintf(stderr, "work: %s: %s\n", path, strerror(errno));
        return -1;
    }
    writer->slots = (writer->device_bytes + SLOT_BYTES - 1) / SLOT_BYTES;
    writer->used = parameters.disk_slots;
    if (!writer->used || writer->used > writer->slots / 2)
        writer->used = writer->slots;
    writer->contents = writer->used <= VERIFY_SLOTS_MAX ? calloc(writer->used, sizeof *writer->contents) : NULL;
    writer->state->slots = writer->slots;
    return posix_memalign((void **)&writer->record, 4096, SLOT_BYTES) ||
           posix_memalign((void **)&writer->found, 4096, SLOT_BYTES);
}

void *disk_thread(void *index)
{
    struct writer writer = {.index = (int)(intptr_t)index, .state = &disk_states[(intptr_t)index]};
    struct pace pace = {.per_s = parameters.disk_records_per_s};
    uint64_t random = seed_of(now_ns(), (uint64_t)writer.index);

    if (open_disk(&writer)) {
        writer.state->errors++;
        return NULL;
    }
    acks_start(writer.index);
    announce(&writer, START, 0, 0); /* records of a boot that nobody knows could not be told from old ones */
    for (uint64_t number = 1;; number++) {
        if (pace.per_s)
            pace_take(&pace, 1);
        random = next_random(random);
        /* One in 16 goes to the first slot and one in 16 to the last (used number 1, or the last number). */
        uint64_t choice = random >> 8 & 15, used = (random >> 16) % writer.used;
        if (choice == 0 || number == 1)
            used = 0;
        else if (choice == 1 || number == 2)
            used = writer.used == writer.slots ? writer.used - 1 : 1 % writer.used;
        struct ack ack = {.record = number, .slot = place(&writer, used)};
        uint64_t what = random & 15;
        ack.kind = what == 0 ? ZEROS : what == 1 ? DISCARD : DATA;
        if (writer.contents)
            verify(&writer, used, ack.slot);
        if (ack.kind != DATA) {
            /* Zeros bear no number: who checks the disk must know beforehand that they may be there. */
            announce(&writer, ack.kind == ZEROS ? WILL_ZEROS : WILL_DISCARD, number, ack.slot);
        }
        if (put(&writer, number, ack.slot, &ack)) {
            fprintf(stderr, "work: record %llu of %s: %s\n", (unsigned long long)number, writer.state->name,
                    strerror(errno));
            writer.state->errors++;
            if (writer.contents)
                writer.contents[used].record = 0; /* nobody knows what is there now */
            sleep_us(100000);
            continue;
        }
        if (writer.contents)
            writer.contents[used] = (struct content){.record = number, .kind = ack.kind};
        writer.state->written = number;
        acks_put(writer.index, &ack);
    }
}
