/* What the two files of the boot-sector guest share. */
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

struct parameters {
    char magic[8];
    u32 working_set_bytes;
    u32 rate_bytes_per_s;
    u32 guest_id;
    u32 beat_ms;
    u32 write_ms;
};
extern const volatile struct parameters parameters;

static inline void outb(u16 port, u8 value) { __asm__ volatile("outb %0, %1" : : "a"(value), "Nd"(port)); }
static inline void outw(u16 port, u16 value) { __asm__ volatile("outw %0, %1" : : "a"(value), "Nd"(port)); }
static inline void outl(u16 port, u32 value) { __asm__ volatile("outl %0, %1" : : "a"(value), "Nd"(port)); }
static inline u8 inb(u16 port) { u8 v; __asm__ volatile("inb %1, %0" : "=a"(v) : "Nd"(port)); return v; }
static inline u16 inw(u16 port) { u16 v; __asm__ volatile("inw %1, %0" : "=a"(v) : "Nd"(port)); return v; }
static inline u32 inl(u16 port) { u32 v; __asm__ volatile("inl %1, %0" : "=a"(v) : "Nd"(port)); return v; }

/* guest.c */
extern u64 now_ms; /* since the boot, as far as the guest has run */
void put(const char *text);
void put_number(u64 value);
void put_hex(u32 value);

/* disk.c */
void find_disks(u32 boot);
void write_records(void);
