"""The guest's first frame on a real tap: what counts as one, and when it came.

Each case runs in a process of its own in a network namespace of its own (`unshare -n`), so this machine's network is
left alone.
"""

import asyncio
import contextlib
import fcntl
import os
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from kvmhv.drivers.frames import PacketFrames
from kvmhv.drivers.host import HostClock
from kvmhv.errors import HostError

TUNSETIFF = 0x400454CA
IFF_TAP, IFF_NO_PI = 0x0002, 0x1000
SIOCSIFFLAGS, IFF_UP = 0x8914, 1
TAP = "kvtest0"
MAC = "52:54:00:12:34:56"
OTHER = "52:54:00:12:34:57"
IPV4, RARP = 0x0800, 0x8035

CASES = ("first_frame", "sent_to_it", "while_nobody_waits", "the_tap_goes", "no_such_tap")


@pytest.mark.parametrize("case", CASES)
def test_frames(case: str) -> None:
    done = subprocess.run(
        ["unshare", "-n", sys.executable, __file__, case], check=False, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


@contextlib.contextmanager
def tap() -> Iterator[int]:
    """What is written to the tap the host sees as sent by a guest."""
    file = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    try:
        fcntl.ioctl(file, TUNSETIFF, struct.pack("16sH14x", TAP.encode(), IFF_TAP | IFF_NO_PI))
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
            fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sH14x", TAP.encode(), IFF_UP))
        yield file
    finally:
        os.close(file)


def frame(source: str, kind: int = IPV4) -> bytes:
    return b"\xff" * 6 + bytes.fromhex(source.replace(":", "")) + struct.pack("!H", kind) + bytes(46)


def busy() -> None:
    time.sleep(0.05)


async def first_frame() -> None:
    """Frames of others and RARP (which QEMU sends in the guest's name) do not count; the kernel's time stamp does."""
    clock = HostClock()
    with tap() as file:
        watch = await PacketFrames(clock).watch({TAP: MAC})
        os.write(file, frame(OTHER))
        os.write(file, frame(MAC, RARP))
        assert await watch.first_ms(0.05) is None
        before_ms = clock.monotonic_ms()
        os.write(file, frame(MAC))
        after_ms = clock.monotonic_ms()
        busy()
        os.write(file, frame(MAC))
        seen_ms = await watch.first_ms(1.0)
        assert seen_ms is not None
        assert before_ms - 2 <= seen_ms <= after_ms + 2
        await watch.close()


async def sent_to_it() -> None:
    """What the host sends out to the guest, with the guest's own address as its source, is not the guest's."""
    with tap():
        watch = await PacketFrames(HostClock()).watch({TAP: MAC})
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as host:
            host.bind((TAP, 0))
            host.send(frame(MAC))
        assert await watch.first_ms(0.1) is None
        await watch.close()


async def while_nobody_waits() -> None:
    with tap() as file:
        watch = await PacketFrames(HostClock()).watch({TAP: MAC})
        os.write(file, frame(MAC))
        await asyncio.sleep(0.01)
        assert await watch.first_ms(1.0) is not None
        await watch.close()
        await watch.close()


async def the_tap_goes() -> None:
    """A VM that moves on at once: nobody waits for its frame any longer, and nothing is logged."""
    broken: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: broken.append(context))
    with tap():
        watch = await PacketFrames(HostClock()).watch({TAP: MAC})
        looking = asyncio.create_task(watch.first_ms(60.0))
        await asyncio.sleep(0.01)
    assert await asyncio.wait_for(looking, 10.0) is None
    await watch.close()
    assert broken == []


async def no_such_tap() -> None:
    with pytest.raises(HostError) as caught:
        await PacketFrames(HostClock()).watch({TAP: MAC})
    assert caught.value.code == "network"


if __name__ == "__main__":
    asyncio.run(
        {case.__name__: case for case in (first_frame, sent_to_it, while_nobody_waits, the_tap_goes, no_such_tap)}[
            sys.argv[1]
        ]()
    )
