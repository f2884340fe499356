"""How far a guest's memory shrinks, and what that costs: some of its pages, compressed here as QEMU would do it.

The pages are read beside the running guest (/proc/PID/mem), which does not notice. libzstd is the library that QEMU
itself compresses with; a host without it gives no sample of it. Empty pages do not count: QEMU does not send them.
"""

import ctypes
import random
import time
import zlib
from collections.abc import Callable, Collection
from pathlib import Path

from kvmhv.model import PageSample

PAGE_BYTES = 4096
PAGES_MAX = 128
"""QEMU compresses packets of so many pages."""
PAGES_MIN = 16
READS_MAX = 4096
ZSTD_LEVELS = (1, 3)
ZLIB_LEVEL = 1
EMPTY = bytes(PAGE_BYTES)


def samples(pid: int, memory_bytes: int, methods: Collection[str]) -> tuple[PageSample, ...]:
    """Return what each method comes to on one core; nothing when the memory cannot be read or is all but empty."""
    pages = _pages(pid, memory_bytes)
    if len(pages) < PAGES_MIN:
        return ()
    packet = b"".join(pages)
    found = []
    zstd = _zstd() if "zstd" in methods else None
    if zstd is not None:
        found += [_measure("zstd", level, packet, zstd) for level in ZSTD_LEVELS]
    if "zlib" in methods and not found:  # many times slower: only where there is nothing else
        found.append(_measure("zlib", ZLIB_LEVEL, packet, lambda data, level: len(zlib.compress(data, level))))
    return tuple(found)


def _measure(method: str, level: int, packet: bytes, compress: Callable[[bytes, int], int]) -> PageSample:
    """Compress once to warm up and once for the figure; CPU time, so that a busy host does not count."""
    compress(packet, level)
    begun_s = time.thread_time()
    size_bytes = compress(packet, level)
    seconds = max(1e-6, time.thread_time() - begun_s)
    return PageSample(
        method=method, level=level, ratio=len(packet) / max(1, size_bytes), bytes_per_s=len(packet) / seconds
    )


def _pages(pid: int, memory_bytes: int) -> list[bytes]:
    """Return some of the guest's pages that are not empty, from all over its memory."""
    start = _guest_start(pid, memory_bytes)
    if start is None:
        return []
    found: list[bytes] = []
    numbers = random.sample(range(memory_bytes // PAGE_BYTES), min(READS_MAX, memory_bytes // PAGE_BYTES))
    try:
        with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
            for number in numbers:
                memory.seek(start + number * PAGE_BYTES)
                page = memory.read(PAGE_BYTES)
                if page != EMPTY:
                    found.append(page)
                if len(found) == PAGES_MAX:
                    break
    except OSError:
        return []
    return found


def _guest_start(pid: int, memory_bytes: int) -> int | None:
    """Return where the guest's memory begins: the one mapping of exactly its size."""
    try:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            low, _, high = line.partition(" ")[0].partition("-")
            if int(high, 16) - int(low, 16) == memory_bytes:
                return int(low, 16)
    except (OSError, ValueError):
        pass
    return None


def _zstd() -> Callable[[bytes, int], int] | None:
    """Return a function that says how long data is when it is compressed, None without the library."""
    try:
        library = ctypes.CDLL("libzstd.so.1")
    except OSError:
        return None
    library.ZSTD_compressBound.restype = library.ZSTD_compress.restype = ctypes.c_size_t
    library.ZSTD_compressBound.argtypes = [ctypes.c_size_t]
    library.ZSTD_compress.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_int]
    room = ctypes.create_string_buffer(library.ZSTD_compressBound(PAGES_MAX * PAGE_BYTES))

    def compress(data: bytes, level: int) -> int:
        return int(library.ZSTD_compress(room, len(room), data, len(data), level))

    return compress
