"""What a guest reads of an image, as one digest: two images of any format with the same contents have the same.

qemu-nbd reads the image, whatever its format, and this reads from it. It is given a socket on which this end is
connected already and ends with that connection, so an agent that is killed leaves no process and no file.

The digest: SHA-256 over the size, and number and SHA-256 of each block that is not all zeros. What `qemu-img map` says
to be zero is not read.
"""

import asyncio
import contextlib
import hashlib
import socket
import struct
import threading
import time
from typing import NamedTuple

from kvmhv.config import Waits
from kvmhv.drivers.storage.qemu_img import DIES_S, ImageFile, QemuImg, end_by_force, find
from kvmhv.errors import HostError

BLOCK_BYTES = 1 << 20
ZEROS = bytes(BLOCK_BYTES)
"""For one block."""
START = 'export LISTEN_PID=$$ LISTEN_FDS=1; exec "$@" 3<&0 </dev/null'
"""Hands the socket over as systemd does (sd_listen_fds(3)): the process names itself, so only a shell can say it."""

MAGIC, OPTIONS = b"NBDMAGIC", b"IHAVEOPT"
NO_ZEROES = 3
"""Fixed newstyle, and no padding behind the handshake."""
EXPORT_NAME, READ, DISCONNECT = 1, 0, 2
REQUEST = struct.Struct(">IHHQQI")
REPLY = struct.Struct(">IIQ")
REQUEST_MAGIC, REPLY_MAGIC = 0x25609513, 0x67446698
"""The NBD protocol (github.com/NetworkBlockDevice/nbd, doc/proto.md)."""


class Contents(NamedTuple):
    """What is in an image."""

    sha256: str
    data_bytes: int
    """In blocks that are not all zeros."""


async def read(qemu_binary: str, image: ImageFile, *, waits: Waits, pace_bytes_per_s: int = 0) -> Contents:
    """Read an image without backing file; `pace`: no faster than that, 0: as fast as it goes.

    That nobody has written to it meanwhile is the caller's to see. Raises HostError `qemu-img`, `qemu-img-missing`,
    `storage`.
    """
    try:
        async with asyncio.timeout(waits.image_copy_s):
            extents = await QemuImg(qemu_binary, waits).data_extents(image)
            return await _served(qemu_binary, image, extents, pace_bytes_per_s, waits.image_look_s)
    except TimeoutError:
        raise HostError(
            "storage", f"{image.file} was not read in {waits.image_copy_s:g} s", "check the storage"
        ) from None
    except (OSError, EOFError) as error:
        raise HostError("storage", f"{image.file} cannot be read: {error}", "check the storage") from error


async def _served(
    qemu_binary: str, image: ImageFile, extents: list[tuple[int, int]], pace: int, answer_s: float
) -> Contents:
    program = find(qemu_binary, "qemu-nbd")
    if program is None:
        raise HostError("qemu-img-missing", "there is no qemu-nbd on this host", "install qemu-utils")
    command = [str(program), "--read-only", "--format", image.format.value, "--", str(image.file)]
    with socket.socket(socket.AF_UNIX) as listening, socket.socket(socket.AF_UNIX) as own:
        listening.bind("")  # the kernel finds a name, and no file has it
        listening.listen(1)
        own.connect(listening.getsockname())
        own.settimeout(answer_s)
        process = await asyncio.create_subprocess_exec(
            "/bin/sh", "-c", START, "sh", *command, stdin=listening.fileno(), stderr=asyncio.subprocess.PIPE
        )
        ended = threading.Event()
        reading = asyncio.create_task(asyncio.to_thread(_digest, own, image.size_bytes, extents, pace, ended))
        try:
            listening.close()  # else nobody would notice that qemu-nbd is gone
            return await asyncio.shield(reading)
        except (OSError, EOFError) as error:
            raise OSError(await _last_words(process) or str(error)) from error
        finally:
            ended.set()
            own.shutdown(socket.SHUT_RDWR)
            await asyncio.gather(reading, return_exceptions=True)
            if process.returncode is None:
                await end_by_force(process)


async def _last_words(process: asyncio.subprocess.Process) -> str:
    process.kill()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(DIES_S):
            return (await process.communicate())[1].decode(errors="replace").strip()[-500:]
    return ""


def _digest(
    server: socket.socket, size_bytes: int, extents: list[tuple[int, int]], pace: int, ended: threading.Event
) -> Contents:
    """Read and digest, in a thread of its own. Raises OSError, EOFError; ends when `server` is shut down."""
    served = _greet(server)
    if served < size_bytes:
        raise OSError(f"it has {served} bytes and should have {size_bytes}")
    whole = hashlib.sha256(size_bytes.to_bytes(8))
    data_bytes, begun = 0, time.monotonic()
    for number, block in enumerate(_blocks(extents)):
        offset = block * BLOCK_BYTES
        content = _read(server, offset, min(BLOCK_BYTES, size_bytes - offset))
        if content != ZEROS[: len(content)]:
            whole.update(block.to_bytes(8) + hashlib.sha256(content).digest())
            data_bytes += len(content)
        if pace:
            ended.wait(max(0.0, begun + (number + 1) * BLOCK_BYTES / pace - time.monotonic()))
    server.sendall(REQUEST.pack(REQUEST_MAGIC, 0, DISCONNECT, 0, 0, 0))
    return Contents(whole.hexdigest(), data_bytes)


def _blocks(extents: list[tuple[int, int]]) -> list[int]:
    """Return the numbers of the blocks in which there may be data, in their order."""
    found = {
        number
        for start, length in extents
        for number in range(start // BLOCK_BYTES, (start + length + BLOCK_BYTES - 1) // BLOCK_BYTES)
    }
    return sorted(found)


def _greet(server: socket.socket) -> int:
    """Open the one export; returns its size."""
    greeting = _exactly(server, 18)
    if greeting[:16] != MAGIC + OPTIONS:
        raise OSError("it is no NBD server")
    server.sendall(struct.pack(">I8sII", NO_ZEROES, OPTIONS, EXPORT_NAME, 0))
    return int.from_bytes(_exactly(server, 10)[:8])


def _read(server: socket.socket, offset: int, length: int) -> bytes:
    server.sendall(REQUEST.pack(REQUEST_MAGIC, 0, READ, offset, offset, length))
    magic, error, cookie = REPLY.unpack(_exactly(server, REPLY.size))
    if (magic, error, cookie) != (REPLY_MAGIC, 0, offset):
        raise OSError(error, f"reading at {offset}")
    return _exactly(server, length)


def _exactly(server: socket.socket, length: int) -> bytes:
    whole = bytearray()
    while len(whole) < length:
        chunk = server.recv(length - len(whole))
        if not chunk:
            raise EOFError("the connection to qemu-nbd ended")
        whole += chunk
    return bytes(whole)
