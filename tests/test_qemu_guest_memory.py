"""How much of a guest's memory was ever touched, as the kernel sees it."""

import mmap
import os

from kvmhv.drivers.qemu import process

SIZE_BYTES = 37 * 1024 * 1024
TOUCHED_BYTES = 9 * 1024 * 1024


def test_what_was_touched_of_the_mapping_of_the_guests_size() -> None:
    with mmap.mmap(-1, SIZE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.madvise(mmap.MADV_NOHUGEPAGE)
        for offset in range(0, TOUCHED_BYTES, mmap.PAGESIZE):
            memory[offset] = 1
        assert process.guest_memory_bytes(os.getpid(), SIZE_BYTES) == TOUCHED_BYTES


def test_without_such_a_mapping_what_the_whole_process_has() -> None:
    size_bytes = 7919 * mmap.PAGESIZE
    seen = process.guest_memory_bytes(os.getpid(), size_bytes)
    assert 0 < seen <= min(size_bytes, process.resident_bytes(os.getpid()) * 2)


def test_a_process_that_is_gone() -> None:
    assert process.guest_memory_bytes(2**22 + 1, SIZE_BYTES) == 0
