"""What several drivers need of Linux' sockets: a filter in the kernel, and the kernel's own time of arrival."""

import ctypes
import socket
import struct
import time
from collections.abc import Sequence

SO_ATTACH_FILTER = 26
SO_TIMESTAMPNS = 35
TIMESPEC = struct.Struct("qq")
STAMP_SPACE = socket.CMSG_SPACE(TIMESPEC.size)
LOAD_WORD, LOAD_HALF, LOAD_BYTE, JUMP_EQUAL, RETURN = 0x20, 0x28, 0x30, 0x15, 0x06
"""Classic BPF (linux/filter.h)."""

BYTES_RECEIVED_AT, BYTES_SENT_AT = 128, 200
"""In struct tcp_info of linux/tcp.h; bytes_sent is there since Linux 4.19."""

Instruction = tuple[int, int, int, int]
"""Code, jump if true, jump if false, operand."""


def attach_filter(one: socket.socket, program: Sequence[Instruction]) -> None:
    """Let the kernel keep only the packets for which the program returns more than 0. Raises OSError."""
    code = b"".join(struct.pack("HBBI", *instruction) for instruction in program)
    buffer = ctypes.create_string_buffer(code, len(code))
    # struct sock_fprog: the number of instructions, and where they are.
    one.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, struct.pack("HP", len(program), ctypes.addressof(buffer)))


def stamp_arrivals(one: socket.socket) -> None:
    """Let the kernel note when each packet came."""
    one.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)


def arrived_ms(extras: Sequence[tuple[int, int, bytes]], now_ms: float) -> float:
    """Return when a packet came, on the clock that says `now_ms`, by the kernel's stamp in what recvmsg() returned."""
    for level, kind, data in extras:
        if (level, kind) == (socket.SOL_SOCKET, SO_TIMESTAMPNS):
            seconds, nanoseconds = TIMESPEC.unpack(data[: TIMESPEC.size])
            age_ns: int = time.time_ns() - seconds * 10**9 - nanoseconds
            return now_ms - max(0, age_ns) / 1e6
    return now_ms
