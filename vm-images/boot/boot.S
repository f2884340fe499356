/* The first sector of the boot-sector guest.
 *
 * The BIOS loads this sector to 0x7c00 and jumps to it in real mode. It loads the sectors behind it to 0x7e00,
 * asks the BIOS how much memory there is, switches to 32-bit protected mode and calls guest() in guest.c.
 * The whole program is one flat binary linked at 0x7c00 (boot.ld), so labels of both files simply work.
 *
 * Parameters stand at fixed offsets of this sector (kvmhv/lab/guest_images.py writes them, README.md lists them).
 */
        .code16
        .section .boot, "ax"
        .globl _start
_start:
        cli
        ljmp    $0, $1f                 /* some BIOSes start at 07c0:0000 */
1:      xorw    %ax, %ax
        movw    %ax, %ds
        movw    %ax, %es
        movw    %ax, %ss
        movw    $0x7c00, %sp            /* the stack grows down from the program */
        sti
        cld

        /* Load the rest: extended read (int 13h, function 42h) from the drive the BIOS gave us in DL. */
        movw    $packet, %si
        movb    $0x42, %ah
        int     $0x13
        movw    $no_disk, %si
        jc      die

        /* Memory above 1 MiB, function e801h: AX = KiB below 16 MiB, BX = 64 KiB blocks above 16 MiB (or CX, DX). */
        xorl    %ebx, %ebx
        xorl    %ecx, %ecx
        xorl    %edx, %edx
        movw    $0xe801, %ax
        int     $0x15
        movw    $no_size, %si
        jc      die
        testw   %cx, %cx
        jz      2f
        movw    %dx, %bx
2:      movzwl  %bx, %ebx
        movl    %ebx, blocks_above_16m

        /* A20 by the fast gate, then protected mode with flat segments. */
        cli
        inb     $0x92, %al
        orb     $2, %al
        andb    $0xfe, %al              /* bit 0 would reset the machine */
        outb    %al, $0x92
        lgdt    gdt_pointer
        movl    %cr0, %eax
        orl     $1, %eax
        movl    %eax, %cr0
        ljmp    $0x08, $protected

die:    /* Print the string at SI on COM1 (as the BIOS left it) and stop. */
        movw    $0x3f8, %dx
3:      lodsb
        testb   %al, %al
        jz      4f
        outb    %al, %dx
        jmp     3b
4:      cli
        hlt
        jmp     4b

        .code32
protected:
        movw    $0x10, %ax
        movw    %ax, %ds
        movw    %ax, %es
        movw    %ax, %fs
        movw    %ax, %gs
        movw    %ax, %ss
        movl    $0x7000, %esp           /* not in a page with code: see boot.ld */
        pushl   blocks_above_16m
        call    guest
5:      cli                             /* guest() does not return; if it does, stand still */
        hlt
        jmp     5b

        /* The timer's interrupt only has to end a hlt: acknowledge it at the interrupt controller. */
        .globl timer_interrupt
timer_interrupt:
        pushl   %eax
        movb    $0x20, %al
        outb    %al, $0x20
        popl    %eax
        iret

no_disk: .asciz "boot: cannot read the rest of the guest\r\n"
no_size: .asciz "boot: the BIOS does not say how much memory there is\r\n"

        .balign 4
packet: .byte   16, 0                   /* disk address packet: its size, reserved */
        .word   rest_sectors            /* how many sectors (boot.ld) */
        .word   0x7e00, 0               /* to offset, segment */
        .quad   1                       /* from this sector */

        .balign 8
gdt:    .quad   0
        .quad   0x00cf9a000000ffff      /* 0x08: code, base 0, 4 GiB */
        .quad   0x00cf92000000ffff      /* 0x10: data, base 0, 4 GiB */
gdt_pointer:
        .word   . - gdt - 1
        .long   gdt

blocks_above_16m: .long 0

        /* The parameters, at offset 0x180 of the sector. */
        .org    0x180
        .globl  parameters
parameters:
        .ascii  "KVMHVBG1"              /* 0x180 what this is, and the version of the layout */
        .long   16 << 20                /* 0x188 working set, bytes */
        .long   4 << 20                 /* 0x18c rate, bytes per second; 0 = idle; 0xffffffff = as fast as it can */
        .long   0                       /* 0x190 id of the guest, the first half of the boot id */
        .long   100                     /* 0x194 milliseconds between two heartbeats */
        .long   0                       /* 0x198 milliseconds between two records on each disk; 0 = none */

        .org    0x1fe
        .word   0xaa55
