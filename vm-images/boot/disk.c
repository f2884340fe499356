/* Writes numbered, checksummed records to every virtio disk but the one that the guest was booted from: the records, the
 * choice of slots and the acknowledgements are those of the Linux guest (README.md), so that kvmhv.lab.oracle reads both.
 * A line is printed when a record is on the disk. Before a slot is written again it is read and compared.
 *
 * The driver is virtio's legacy interface (Virtio 1.1, 4.1.4.8 and 2.6): one queue, one request at a time, polled. A disk
 * that does not answer holds nothing up but its own records.
 */
#include "guest.h"

enum {
    SLOT_BYTES = 4096,
    SECTOR_BYTES = 512,
    DISKS_MAX = 2,
    SLOTS_USED = 64,
    SCRATCH_AT = 8 << 20, /* not used by the working set, nor by the BIOS once it has booted us */
    SCRATCH_BYTES = 1 << 20,
    RING_BYTES_MAX = 64 << 10,

    VIRTIO_VENDOR = 0x1af4, VIRTIO_BLOCK = 0x1001,
    /* registers in the I/O ports of BAR 0 */
    HOST_FEATURES = 0, GUEST_FEATURES = 4, QUEUE_PAGE = 8, QUEUE_SIZE = 12, QUEUE_SELECT = 14, QUEUE_NOTIFY = 16,
    STATUS = 18, CAPACITY = 20,
    ACKNOWLEDGE = 1, DRIVER = 2, DRIVER_OK = 4,
    CAN_FLUSH = 1 << 9, CAN_DISCARD = 1 << 13, CAN_ZERO = 1 << 14,
    READ = 0, WRITE = 1, FLUSH = 4, TO_DISCARD = 11, TO_ZERO = 13,
    NEXT = 1, BY_DEVICE = 2,
};

enum kind { DATA, ZEROS, DISCARD, WILL_ZEROS, WILL_DISCARD, START };
static const char *const KINDS[] = {"data", "zeros", "discard", "will-zeros", "will-discard", "start"};

struct descriptor { u64 address; u32 length; u16 flags, next; };
struct available { u16 flags, index, ring[]; };
struct used { u16 flags, index; struct { u32 id, length; } ring[]; };

struct record {
    char magic[8], disk[8];
    u64 number, slot;
    u8 boot_id[16];
    u32 length, crc; /* the CRC is of the whole record with this field 0 */
    u32 payload[(SLOT_BYTES - 56) / 4];
};
_Static_assert(sizeof(struct record) == SLOT_BYTES, "a record fills a slot");

struct content { u32 record; enum kind kind; };

/* Where a disk's record in work is; a request is under way in each but IDLE. */
enum step { IDLE, VERIFYING, WRITING, FLUSHING };

struct disk {
    char name[8];
    u16 port, queue_size, asked;
    volatile struct descriptor *descriptors;
    volatile struct available *available;
    volatile struct used *used;
    volatile struct { u32 type, reserved; u64 sector; } *header;
    volatile struct { u64 sector; u32 sectors, flags; } *range;
    volatile u8 *status;
    struct record *record, *found;
    u32 features, slots, last_slot_bytes;
    struct content contents[SLOTS_USED];
    enum step step;
    u64 due_ms;
    u32 number, random, chosen, slot, crc;
    enum kind kind;
};

static struct disk disks[DISKS_MAX];
static int disk_count;
static u8 boot_id[16];
static u32 *const crc_table = (u32 *)SCRATCH_AT;

static u32 next_random(u32 value)
{
    value ^= value << 13, value ^= value >> 17, value ^= value << 5; /* xorshift */
    return value;
}

static void fill_with(void *at, u8 value, u32 bytes)
{
    for (u8 *byte = at; bytes--; byte++)
        *byte = value;
}

static u32 crc32_of(const void *data, u32 length)
{
    const u8 *at = data;
    u32 crc = 0xffffffff;

    while (length--)
        crc = crc_table[(crc ^ *at++) & 255] ^ crc >> 8;
    return ~crc;
}

static void acknowledge(const struct disk *disk, enum kind kind, u32 crc)
{
    put("ack "), put(disk->name), put(" "), put_number(disk->number), put(" "), put_number(disk->slot), put(" ");
    put_hex(crc), put(" "), put(KINDS[kind]), put(" ");
    for (int i = 0; i < 16; i += 4)
        put_hex((u32)boot_id[i] << 24 | boot_id[i + 1] << 16 | boot_id[i + 2] << 8 | boot_id[i + 3]);
    put("\r\n");
}

/* ---- requests ---- */

static void request(struct disk *disk, u32 type, volatile void *data, u32 bytes, enum step step)
{
    volatile struct descriptor *chain = disk->descriptors;
    u16 status = data ? 2 : 1;

    disk->header->type = type;
    disk->header->reserved = 0;
    disk->header->sector = type == READ || type == WRITE ? (u64)disk->slot * (SLOT_BYTES / SECTOR_BYTES) : 0;
    chain[0].address = (u32)disk->header, chain[0].length = 16, chain[0].flags = NEXT, chain[0].next = 1;
    if (data) {
        chain[1].address = (u32)data, chain[1].length = bytes;
        chain[1].flags = NEXT | (type == READ ? BY_DEVICE : 0), chain[1].next = 2;
    }
    *disk->status = 255;
    chain[status].address = (u32)disk->status, chain[status].length = 1, chain[status].flags = BY_DEVICE;
    disk->available->ring[disk->asked % disk->queue_size] = 0;
    __asm__ volatile("" : : : "memory");
    disk->available->index = ++disk->asked;
    __asm__ volatile("lock; addl $0, (%%esp)" : : : "memory", "cc");
    outw(disk->port + QUEUE_NOTIFY, 0);
    disk->step = step;
}

static u32 slot_length(const struct disk *disk, u32 slot)
{
    return slot == disk->slots - 1 ? disk->last_slot_bytes : SLOT_BYTES;
}

static u32 make_record(const struct disk *disk, struct record *record, u32 number, u32 slot)
{
    u32 value = number * 2654435761u ^ slot * 2246822519u ^ 1;

    fill_with(record, 0, sizeof *record);
    for (int i = 0; i < 8; i++)
        record->magic[i] = "KVMHVREC"[i], record->disk[i] = disk->name[i];
    record->number = number, record->slot = slot, record->length = slot_length(disk, slot);
    for (int i = 0; i < 16; i++)
        record->boot_id[i] = boot_id[i];
    for (u32 i = 0; i < sizeof record->payload / 4; i++)
        record->payload[i] = value = next_random(value);
    return record->crc = crc32_of(record, record->length);
}

/* ---- one record after the other ---- */

/* The place of a used slot: 0 is the first on the device, 1 the last, the others are spread between them. */
static u32 place(const struct disk *disk, u32 chosen)
{
    return chosen == 0 ? 0 : chosen == 1 ? disk->slots - 1 : chosen * ((disk->slots - 1) / SLOTS_USED);
}

static void put_record(struct disk *disk)
{
    u32 length = slot_length(disk, disk->slot);

    if (disk->kind == DISCARD && !(disk->features & CAN_DISCARD))
        disk->kind = ZEROS;
    if (disk->kind != DATA) /* zeros bear no number: who checks the disk must know beforehand that they may be there */
        acknowledge(disk, disk->kind == ZEROS ? WILL_ZEROS : WILL_DISCARD, 0);
    disk->contents[disk->chosen].record = 0; /* unknown until it is on the disk */
    if (disk->kind == DISCARD || (disk->kind == ZEROS && disk->number % 2 && disk->features & CAN_ZERO)) {
        disk->range->sector = (u64)disk->slot * (SLOT_BYTES / SECTOR_BYTES);
        disk->range->sectors = length / SECTOR_BYTES, disk->range->flags = 0;
        disk->crc = 0;
        request(disk, disk->kind == DISCARD ? TO_DISCARD : TO_ZERO, disk->range, 16, WRITING);
        return;
    }
    fill_with(disk->record, 0, SLOT_BYTES);
    disk->crc = disk->kind == DATA ? make_record(disk, disk->record, disk->number, disk->slot) : 0;
    request(disk, WRITE, disk->record, length, WRITING);
}

static void begin_record(struct disk *disk)
{
    if (now_ms < disk->due_ms)
        return;
    disk->due_ms = now_ms + parameters.write_ms;
    disk->number++;
    u32 random = disk->random = next_random(disk->random), choice = random >> 8 & 15, what = random & 15;
    disk->chosen = choice == 0 || disk->number == 1 ? 0 : choice == 1 || disk->number == 2 ? 1 : (random >> 16) % SLOTS_USED;
    disk->slot = place(disk, disk->chosen);
    disk->kind = what == 0 ? ZEROS : what == 1 ? DISCARD : DATA;
    if (disk->contents[disk->chosen].record && disk->contents[disk->chosen].kind != DISCARD)
        request(disk, READ, disk->found, slot_length(disk, disk->slot), VERIFYING);
    else
        put_record(disk);
}

static void verify(struct disk *disk)
{
    struct content content = disk->contents[disk->chosen];
    const u8 *want = (const u8 *)disk->record, *got = (const u8 *)disk->found;
    u32 length = slot_length(disk, disk->slot);

    if (content.kind == ZEROS)
        fill_with(disk->record, 0, SLOT_BYTES);
    else
        make_record(disk, disk->record, content.record, disk->slot);
    for (u32 i = 0; i < length; i++)
        if (want[i] != got[i]) {
            put("BAD slot "), put_number(disk->slot), put(" of "), put(disk->name), put(": not record ");
            put_number(content.record), put("\r\n");
            return;
        }
}

static void go_on(struct disk *disk)
{
    if (*disk->status) { /* refused: this record is not acknowledged */
        put("disk "), put(disk->name), put(" error "), put_number(*disk->status), put("\r\n");
        disk->step = IDLE;
        return;
    }
    if (disk->step == VERIFYING) {
        verify(disk);
        put_record(disk);
    } else if (disk->step == WRITING) {
        request(disk, FLUSH, 0, 0, FLUSHING);
    } else {
        acknowledge(disk, disk->kind, disk->crc);
        disk->contents[disk->chosen].record = disk->number;
        disk->contents[disk->chosen].kind = disk->kind;
        disk->step = IDLE;
    }
}

void write_records(void)
{
    for (struct disk *disk = disks; disk < disks + disk_count; disk++) {
        if (disk->step == IDLE)
            begin_record(disk);
        else if (disk->used->index == disk->asked)
            go_on(disk);
    }
}

/* ---- finding them ---- */

static u32 pci_read(u32 slot, u32 at)
{
    outl(0xcf8, 1u << 31 | slot << 11 | at);
    return inl(0xcfc);
}

static void open_disk(u32 slot, int number)
{
    struct disk *disk = &disks[disk_count];
    u8 *memory = (u8 *)SCRATCH_AT + SCRATCH_BYTES * (disk_count + 1);

    outl(0xcf8, 1u << 31 | slot << 11 | 4), outl(0xcfc, pci_read(slot, 4) | 5); /* I/O ports, bus master */
    disk->port = pci_read(slot, 0x10) & 0xfffc;
    disk->name[0] = 'v', disk->name[1] = 'd', disk->name[2] = 'a' + number;
    outb(disk->port + STATUS, 0);
    outb(disk->port + STATUS, ACKNOWLEDGE | DRIVER);
    disk->features = inl(disk->port + HOST_FEATURES) & (CAN_FLUSH | CAN_DISCARD | CAN_ZERO);
    outl(disk->port + GUEST_FEATURES, disk->features);
    outw(disk->port + QUEUE_SELECT, 0);
    disk->queue_size = inw(disk->port + QUEUE_SIZE);
    fill_with(memory, 0, SCRATCH_BYTES);
    disk->descriptors = (void *)memory;
    disk->available = (void *)(memory + 16 * disk->queue_size);
    disk->used = (void *)(((u32)memory + 16 * disk->queue_size + 6 + 2 * disk->queue_size + 4095) & ~4095u);
    outl(disk->port + QUEUE_PAGE, (u32)memory / 4096);
    disk->record = (void *)(memory + RING_BYTES_MAX), disk->found = disk->record + 1;
    disk->header = (void *)(disk->found + 1), disk->range = (void *)(disk->header + 1);
    disk->status = (void *)(disk->range + 1);
    u64 sectors = (u64)inl(disk->port + CAPACITY + 4) << 32 | inl(disk->port + CAPACITY);
    disk->slots = (u32)((sectors + SLOT_BYTES / SECTOR_BYTES - 1) / (SLOT_BYTES / SECTOR_BYTES));
    disk->last_slot_bytes = ((u32)(sectors - 1) % (SLOT_BYTES / SECTOR_BYTES) + 1) * SECTOR_BYTES;
    if (!(disk->features & CAN_FLUSH) || disk->slots < SLOTS_USED + 2)
        return; /* what it writes could not be acknowledged, or it is too small */
    outb(disk->port + STATUS, ACKNOWLEDGE | DRIVER | DRIVER_OK);
    disk->random = (u32)boot_id[4] << 24 | boot_id[5] << 16 | boot_id[6] << 8 | (boot_id[7] ^ number) | 1;
    acknowledge(disk, START, 0);
    disk_count++;
}

void find_disks(u32 boot)
{
    for (int i = 0; i < 4; i++)
        boot_id[i] = parameters.guest_id >> (24 - 8 * i), boot_id[4 + i] = boot >> (24 - 8 * i);
    for (u32 i = 0; i < 256; i++) {
        crc_table[i] = i;
        for (int bit = 0; bit < 8; bit++)
            crc_table[i] = crc_table[i] >> 1 ^ (crc_table[i] & 1 ? 0xedb88320 : 0);
    }
    int number = 0;
    for (u32 slot = 0; slot < 32 && disk_count < DISKS_MAX; slot++)
        if (pci_read(slot, 0) == (VIRTIO_VENDOR | VIRTIO_BLOCK << 16) && number++)
            open_disk(slot, number - 1);
}
