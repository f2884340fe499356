"""The client's half of WebSocket (RFC 6455), without I/O: what the console of a VM needs and no more."""

import base64
import hashlib
import os
import struct

from kvmhv.errors import HostError

FRAME_LIMIT_BYTES = 1024 * 1024
CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0x0, 0x1, 0x2, 0x8, 0x9, 0xA
_MAGIC = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"


def new_key() -> str:
    """Return a fresh Sec-WebSocket-Key."""
    return base64.b64encode(os.urandom(16)).decode()


def accept_of(key: str) -> str:
    """Return the Sec-WebSocket-Accept with which a server proves that it understood (RFC 6455, 4.2.2)."""
    return base64.b64encode(hashlib.sha1(f"{key}{_MAGIC}".encode(), usedforsecurity=False).digest()).decode()


def frame(opcode: int, payload: bytes) -> bytes:
    """Return one whole frame, masked as a client's must be."""
    mask = os.urandom(4)
    size = len(payload)
    if size < 126:
        head = struct.pack("!BB", 0x80 | opcode, 0x80 | size)
    elif size < 65536:
        head = struct.pack("!BBH", 0x80 | opcode, 0x80 | 126, size)
    else:
        head = struct.pack("!BBQ", 0x80 | opcode, 0x80 | 127, size)
    return head + mask + bytes(byte ^ mask[index % 4] for index, byte in enumerate(payload))


class FrameReader:
    """Cuts a server's bytes into frames."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[tuple[int, bytes]]:
        """Return (opcode, payload) of each frame that is complete now.

        Raises HostError `console-broken` for a masked frame or one over FRAME_LIMIT_BYTES.
        """
        self._buffer += data
        frames = []
        while (found := self._next()) is not None:
            frames.append(found)
        return frames

    def _next(self) -> tuple[int, bytes] | None:
        if len(self._buffer) < 2:
            return None
        size, start = self._buffer[1] & 0x7F, 2
        if size >= 126:
            start = 4 if size == 126 else 10
            if len(self._buffer) < start:
                return None
            size = int.from_bytes(self._buffer[2:start], "big")
        if self._buffer[1] & 0x80 or size > FRAME_LIMIT_BYTES:
            raise HostError("console-broken", "the agent sent something that is no WebSocket frame of a server")
        if len(self._buffer) < start + size:
            return None
        opcode, payload = self._buffer[0] & 0x0F, bytes(self._buffer[start : start + size])
        del self._buffer[: start + size]
        return opcode, payload
