/* The boot-sector guest: dirties a working set at a known rate, verifies every page it comes back to, and prints
 * heartbeats on COM1. 32-bit protected mode, flat, no paging, no library. README.md has the lines it prints.
 *
 * Sweeps: page i is written with generation g in sweep g. A sweep goes through the pages in order, so the generation that
 * a page must hold when it is visited is known without looking at it; a page that a move left stale is found by that.
 */
#include "guest.h"

enum {
    PAGE_BYTES = 4096,
    PAGE_WORDS = PAGE_BYTES / 4,
    WORKING_SET_AT = 16 << 20,  /* the program, the BIOS and its tables are below, or in the last MiB */
    TOP_MARGIN = 1 << 20,
    PM_HZ = 3579545,            /* ACPI 4.8.3.3: the power management timer's frequency */
    PM_MASK = 0xffffff,         /* it is only sure to have 24 bits: it wraps after 4.69 s */
    TICK_HZ = 250,              /* interrupts that end a hlt */
    BATCH_PAGES = 16,           /* between two looks at the clock */
    BAD_LINES = 32,             /* damaged pages that are printed; all are counted */
    COM1 = 0x3f8,
};

#define AS_FAST_AS_IT_CAN 0xffffffffu

extern void timer_interrupt(void);

/* ---- printing ---- */

static void put_char(char c)
{
    for (u32 spins = 0; !(inb(COM1 + 5) & 0x20); spins++)
        if (spins > 100000)
            return; /* nobody takes the output: the guest's work must not stop for that */
    outb(COM1, (u8)c);
}

void put(const char *text)
{
    while (*text)
        put_char(*text++);
}

void put_number(u64 value)
{
    char digits[21];
    int at = 20;

    digits[at] = 0;
    do { /* long division by 10 in two halves: there is no 64-bit division without a library */
        u32 high = (u32)(value >> 32), low = (u32)value, rest;
        u32 high_quotient = high / 10, low_quotient;
        __asm__("divl %4" : "=a"(low_quotient), "=d"(rest) : "a"(low), "d"(high % 10), "r"(10u));
        digits[--at] = (char)('0' + rest);
        value = (u64)high_quotient << 32 | low_quotient;
    } while (value);
    put(digits + at);
}

void put_hex(u32 value)
{
    for (int shift = 28; shift >= 0; shift -= 4)
        put_char("0123456789abcdef"[value >> shift & 15]);
}

static void stand_still(const char *why)
{
    put(why);
    for (;;)
        __asm__ volatile("cli; hlt");
}

/* ---- ACPI: the timer and the power button ---- */

static u16 pm_timer_port, pm1_event_port, pm1_control_port;

static int same(const char *at, const char *text, int length)
{
    while (length--)
        if (at[length] != text[length])
            return 0;
    return 1;
}

static void find_acpi(void)
{
    for (const char *root = (char *)0xe0000; root < (char *)0x100000; root += 16) {
        if (!same(root, "RSD PTR ", 8))
            continue;
        const char *rsdt = *(char **)(root + 16);
        u32 tables = (*(u32 *)(rsdt + 4) - 36) / 4;
        for (u32 i = 0; i < tables; i++) {
            const char *fadt = ((char **)(rsdt + 36))[i];
            if (!same(fadt, "FACP", 4))
                continue;
            pm1_event_port = (u16)*(u32 *)(fadt + 56);
            pm1_control_port = (u16)*(u32 *)(fadt + 64);
            pm_timer_port = (u16)*(u32 *)(fadt + 76);
            outw(pm1_event_port + 2, 1 << 8); /* let the power button set its status bit */
            return;
        }
    }
    stand_still("boot: no ACPI timer\r\n");
}

static void power_off_if_asked(void)
{
    if (!(inw(pm1_event_port) & 1 << 8))
        return;
    put("OFF\r\n");
    outw(pm1_event_port, 1 << 8);
    outw(pm1_control_port, 1 << 13); /* SLP_EN with sleep type 0: S5 on QEMU's machines */
}

/* ---- time: ticks of the PM timer, which goes on at the target where it stopped at the source ---- */

u64 now_ms;
static u32 last_tick;
static u64 ms_ticks;

/* Ticks since the last call; also carries now_ms on. Must be called every 4 s or more often. */
static u32 elapsed_ticks(void)
{
    u32 tick = inl(pm_timer_port) & PM_MASK;
    u32 elapsed = (tick - last_tick) & PM_MASK;

    last_tick = tick;
    for (ms_ticks += (u64)elapsed * 1000; ms_ticks >= PM_HZ; ms_ticks -= PM_HZ)
        now_ms++;
    return elapsed;
}

static void start_interrupts(void)
{
    static u64 idt[33];
    static struct { u16 limit; u32 base; } __attribute__((packed)) pointer;
    u32 handler = (u32)timer_interrupt, divisor = 1193182 / TICK_HZ;

    idt[32] = (u64)(handler & 0xffff0000u | 0x8e00) << 32 | 0x08 << 16 | (handler & 0xffff);
    pointer.limit = sizeof idt - 1;
    pointer.base = (u32)idt;
    __asm__ volatile("lidt %0" : : "m"(pointer));
    outb(0x20, 0x11), outb(0xa0, 0x11); /* both interrupt controllers: vectors 32.. and 40.., all masked but the timer */
    outb(0x21, 32), outb(0xa1, 40);
    outb(0x21, 4), outb(0xa1, 2);
    outb(0x21, 1), outb(0xa1, 1);
    outb(0x21, 0xfe), outb(0xa1, 0xff);
    outb(0x43, 0x34), outb(0x40, (u8)divisor), outb(0x40, (u8)(divisor >> 8));
    __asm__ volatile("sti");
}

/* ---- the working set ---- */

static u32 pages, next_page, generation = 1;
static u64 dirtied_pages, errors, passes;

static u32 first_word(u32 page, u32 of_generation)
{
    return (page + 1) * 2654435761u ^ of_generation * 2246822519u;
}

static void write_page(u32 page, u32 of_generation)
{
    volatile u32 *at = (u32 *)(WORKING_SET_AT + page * PAGE_BYTES);
    u32 value = first_word(page, of_generation);

    for (u32 i = 0; i < PAGE_WORDS; i++, value += 2654435769u)
        at[i] = value;
}

static void verify_page(u32 page, u32 of_generation)
{
    const volatile u32 *at = (u32 *)(WORKING_SET_AT + page * PAGE_BYTES);
    u32 value = first_word(page, of_generation);

    for (u32 i = 0; i < PAGE_WORDS; i++, value += 2654435769u) {
        u32 found = at[i];
        if (found == value)
            continue;
        if (errors++ < BAD_LINES) {
            put("BAD page "), put_number(page), put(" word "), put_number(i);
            put(" generation "), put_number(of_generation);
            put(" want "), put_hex(value), put(" got "), put_hex(found), put("\r\n");
        }
        write_page(page, of_generation); /* so that one damage is counted once */
        return;
    }
}

/* Visit the next page: verify what the last sweep left and, unless idle, write it anew. */
static void visit(int dirty)
{
    verify_page(next_page, generation);
    if (dirty) {
        write_page(next_page, generation + 1);
        dirtied_pages++;
    }
    if (++next_page < pages)
        return;
    next_page = 0;
    passes++;
    if (dirty)
        generation++;
}

/* ---- the loop ---- */

static u64 beats, next_beat_ms;

static void beat_if_due(void)
{
    if (now_ms < next_beat_ms)
        return;
    power_off_if_asked();
    next_beat_ms += parameters.beat_ms;
    if (next_beat_ms <= now_ms) /* late by more than one: go on from here instead of printing a burst */
        next_beat_ms = now_ms + parameters.beat_ms;
    put("beat "), put_number(++beats), put(" passes "), put_number(passes), put(" errors "), put_number(errors);
    put(" ms "), put_number(now_ms), put(" dirtied "), put_number(dirtied_pages * PAGE_BYTES), put("\r\n");
}

static void fill(void)
{
    for (u32 page = 0; page < pages; page++) {
        write_page(page, 1);
        if (page % BATCH_PAGES == 0) {
            elapsed_ticks();
            beat_if_due();
        }
    }
    put("READY\r\n");
}

void guest(u32 blocks_above_16m)
{
    u64 room = (u64)blocks_above_16m << 16;
    u32 rate = parameters.rate_bytes_per_s, tsc;

    outb(COM1 + 3, 0x80), outb(COM1, 1), outb(COM1 + 1, 0); /* 115200 baud, 8N1, FIFO, no interrupts */
    outb(COM1 + 3, 3), outb(COM1 + 2, 7), outb(COM1 + 1, 0), outb(COM1 + 4, 3);
    find_acpi();
    last_tick = inl(pm_timer_port) & PM_MASK;
    room = room > TOP_MARGIN ? room - TOP_MARGIN : 0;
    pages = (u32)((room < parameters.working_set_bytes ? room : parameters.working_set_bytes) / PAGE_BYTES);
    if (!pages)
        stand_still("boot: no room for a working set: the machine needs more than 17 MiB\r\n");

    /* The boot id: the guest's id and something that differs at each boot. */
    __asm__ volatile("rdtsc" : "=a"(tsc) : : "edx");
    u32 clock = 0;
    for (u8 reg = 0; reg < 10; reg++) {
        outb(0x70, 0x80 | reg);
        clock = clock * 31 + inb(0x71);
    }
    u32 boot = clock * 2654435761u ^ tsc;
    put("\r\nBOOT "), put_hex(parameters.guest_id), put_hex(boot);
    put(" pages "), put_number(pages), put(" rate "), put_number(rate), put("\r\n");
    start_interrupts();
    fill();
    if (parameters.write_ms)
        find_disks(boot);

    /* Credit is counted in bytes per second times ticks, so that no division is needed. */
    const u64 page_cost = (u64)PAGE_BYTES * PM_HZ;
    u32 pace = rate ? rate : 4 << 20; /* idle: only looks, 4 MB/s, so that damage is found there too */
    const u64 most_credit = (u64)pace * (PM_HZ / 4) + page_cost; /* what was missed longer ago is not made up for */
    u64 credit = 0;
    elapsed_ticks();
    for (;;) {
        credit += (u64)elapsed_ticks() * pace;
        if (credit > most_credit)
            credit = most_credit;
        beat_if_due();
        write_records();
        if (rate == AS_FAST_AS_IT_CAN)
            credit = page_cost * (BATCH_PAGES + 1);
        for (u32 i = 0; i < BATCH_PAGES && credit >= page_cost; i++, credit -= page_cost)
            visit(rate != 0);
        if (credit < page_cost)
            __asm__ volatile("hlt");
    }
}
