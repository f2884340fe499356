"""Questions to a guest over the network; implements ports.Probes.

They go out through the host's own network, as those of the guest's users do, so they also see what a switch between the
hosts has not yet learned. Each question is new: a packet that was lost in the blackout is not what is measured, so
nothing waits for TCP's own repeats.
"""

import asyncio
import contextlib
import os
import socket
import struct
from collections.abc import Iterator

from kvmhv.kernel_sockets import STAMP_SPACE, arrived_ms, stamp_arrivals
from kvmhv.model import Probe, ProbeKind
from kvmhv.ports import Clock

PING_EVERY_S = 0.005
CONNECT_EVERY_S = 0.02
"""A connection costs both ends more than a packet."""
QUESTION_S = 0.5
"""So long an answer to one question may take."""
ECHO = struct.Struct("!BBHHH16s")
ECHO_KINDS = {socket.AF_INET: (8, 0), socket.AF_INET6: (128, 129)}
"""Request and reply: RFC 792 and RFC 4443."""
PACKET_BYTES = 2048


class NetworkProbes:
    """Implements ports.Probes (ping needs CAP_NET_RAW)."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    async def first_answer_ms(self, probe: Probe, timeout_s: float) -> float | None:
        """Ask again and again; return when the first answer came, on the host's monotonic clock, None if none came."""
        asking = self._ping(probe) if probe.kind is ProbeKind.PING else self._connect(probe)
        with contextlib.suppress(TimeoutError, OSError):
            async with asyncio.timeout(timeout_s):
                return await asking
        return None

    # --- ping

    async def _ping(self, probe: Probe) -> float:
        family = socket.AF_INET6 if ":" in probe.address else socket.AF_INET
        protocol = socket.IPPROTO_ICMPV6 if family is socket.AF_INET6 else socket.IPPROTO_ICMP
        with socket.socket(family, socket.SOCK_RAW | socket.SOCK_NONBLOCK, protocol) as pinging:
            stamp_arrivals(pinging)
            pinging.connect((probe.address, 0))
            nonce, loop = os.urandom(16), asyncio.get_running_loop()
            answered: asyncio.Future[float] = loop.create_future()
            loop.add_reader(pinging, self._take, pinging, family, nonce, answered)
            try:
                number = 0
                while not answered.done():
                    number += 1
                    with contextlib.suppress(OSError):  # no neighbour yet, a full queue: a lost question
                        pinging.send(_echo(family, number, nonce))
                    await asyncio.wait([answered], timeout=PING_EVERY_S)
                return answered.result()
            finally:
                loop.remove_reader(pinging)

    def _take(self, pinging: socket.socket, family: int, nonce: bytes, answered: asyncio.Future[float]) -> None:
        with contextlib.suppress(OSError):
            packet, extras, _, _ = pinging.recvmsg(PACKET_BYTES, STAMP_SPACE)
            at_ms = arrived_ms(extras, self._clock.monotonic_ms())
            if family == socket.AF_INET:  # a raw socket gives the IP header too
                packet = packet[(packet[0] & 15) * 4 :] if packet else b""
            if len(packet) >= ECHO.size and not answered.done():
                kind, _, _, _, _, its_nonce = ECHO.unpack_from(packet)
                if kind == ECHO_KINDS[socket.AddressFamily(family)][1] and its_nonce == nonce:
                    answered.set_result(at_ms)

    # --- tcp and http

    async def _connect(self, probe: Probe) -> float:
        questions: set[asyncio.Task[float | None]] = set()
        try:
            while True:
                questions.add(asyncio.create_task(self._question(probe)))
                done, waiting = await asyncio.wait(
                    questions, timeout=CONNECT_EVERY_S, return_when=asyncio.FIRST_COMPLETED
                )
                found = [at_ms for at_ms in (one.result() for one in done) if at_ms is not None]
                if found:
                    return min(found)
                questions = set(waiting)
                if done:  # refused at once: not as fast as it goes
                    await asyncio.sleep(CONNECT_EVERY_S)
        finally:
            for one in questions:
                one.cancel()
            await asyncio.gather(*questions, return_exceptions=True)

    async def _question(self, probe: Probe) -> float | None:
        """Ask once; return when it was answered, None if it was not."""
        writer: asyncio.StreamWriter | None = None
        try:
            async with asyncio.timeout(QUESTION_S):
                reader, writer = await asyncio.open_connection(probe.address, probe.port)
                if probe.kind is ProbeKind.HTTP:
                    host = f"[{probe.address}]" if ":" in probe.address else probe.address
                    request = f"GET {probe.path} HTTP/1.1\r\nHost: {host}:{probe.port}\r\nConnection: close\r\n\r\n"
                    writer.write(request.encode())
                    if not (await reader.readline()).startswith(b"HTTP/"):
                        return None
                return self._clock.monotonic_ms()
        except (OSError, TimeoutError, ValueError):
            return None
        finally:
            if writer is not None:
                writer.transport.abort()


def _echo(family: int, number: int, nonce: bytes) -> bytes:
    kind = ECHO_KINDS[socket.AddressFamily(family)][0]
    empty = ECHO.pack(kind, 0, 0, os.getpid() & 0xFFFF, number & 0xFFFF, nonce)
    checksum = 0 if family == socket.AF_INET6 else _checksum(empty)  # ICMPv6's covers the addresses: the kernel's work
    return ECHO.pack(kind, 0, checksum, os.getpid() & 0xFFFF, number & 0xFFFF, nonce)


def _checksum(packet: bytes) -> int:
    """Return the Internet checksum (RFC 1071) of an even number of bytes."""
    total = sum(_words(packet))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def _words(packet: bytes) -> Iterator[int]:
    return (word for (word,) in struct.iter_unpack("!H", packet))
