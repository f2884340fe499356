"""The first frame that a guest sends, as the host's switch gets it; implements ports.Frames.

A packet socket on the guest's tap with a filter in the kernel: it wakes the agent for frames that the guest sends
(not for those sent to it), and not for the RARP frames that QEMU sends in the guest's name. The kernel's own time stamp
is taken, so a busy event loop does not matter.
"""

import asyncio
import socket
from collections.abc import Mapping

from kvmhv.errors import HostError
from kvmhv.kernel_sockets import (
    JUMP_EQUAL,
    LOAD_BYTE,
    LOAD_HALF,
    LOAD_WORD,
    RETURN,
    STAMP_SPACE,
    Instruction,
    arrived_ms,
    attach_filter,
    stamp_arrivals,
)
from kvmhv.ports import Clock

ETH_P_ALL = 0x0003
ETH_P_RARP = 0x8035
PACKET_OUTGOING = 4
AD_PACKET_TYPE = 0xFFFFF000 + 4
"""Where the kernel's filter machine finds the packet's type (SKF_AD_OFF + SKF_AD_PKTTYPE)."""
FRAME_BYTES = 64


class PacketFrames:
    """Implements ports.Frames on the network namespace that the agent runs in (needs CAP_NET_RAW)."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    async def watch(self, taps: Mapping[str, str]) -> "PacketWatch":
        """Begin to look at taps (name -> the guest's MAC on it). Raises HostError `network`; then nothing is open."""
        # In a thread: binding and closing wait for the kernel's network code to come to rest.
        return PacketWatch(self._clock, await asyncio.to_thread(_open_all, taps))


class PacketWatch:
    """The open sockets of one VM."""

    def __init__(self, clock: Clock, sockets: list[socket.socket]) -> None:
        self._clock = clock
        self._sockets = sockets

    async def first_ms(self, timeout_s: float) -> float | None:
        """Return when the first frame came, on the host's monotonic clock; None if none came in time or can come."""
        loop = asyncio.get_running_loop()
        seen: asyncio.Future[float] = loop.create_future()

        def look(readable: socket.socket) -> None:
            try:
                at_ms = self._stamp_ms(readable)
            except BlockingIOError:
                return
            except OSError as error:  # the tap went down: the VM has ended, or moved on before it said anything
                if not seen.done():
                    seen.set_exception(error)
                return
            if not seen.done():
                seen.set_result(at_ms)

        for one in self._sockets:
            loop.add_reader(one, look, one)
        try:
            async with asyncio.timeout(timeout_s):
                return await seen
        except (TimeoutError, OSError):
            return None
        finally:
            for one in self._sockets:
                loop.remove_reader(one)

    async def close(self) -> None:
        """End the watch; may be repeated."""
        sockets, self._sockets = self._sockets, []
        if sockets:
            await asyncio.to_thread(_close_all, sockets)

    def _stamp_ms(self, readable: socket.socket) -> float:
        _, extras, _, _ = readable.recvmsg(FRAME_BYTES, STAMP_SPACE)
        return arrived_ms(extras, self._clock.monotonic_ms())


def _open_all(taps: Mapping[str, str]) -> list[socket.socket]:
    made: list[socket.socket] = []
    try:
        for tap, mac in taps.items():
            # Protocol 0 hears nothing: the filter is in place before bind() opens its ears.
            one = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, 0)
            made.append(one)
            stamp_arrivals(one)
            attach_filter(one, program(mac))
            one.bind((tap, ETH_P_ALL))
    except OSError as error:
        _close_all(made)
        raise HostError("network", f"cannot watch {', '.join(taps)}: {error}", "see `ip link` on that host") from error
    return made


def _close_all(sockets: list[socket.socket]) -> None:
    for one in sockets:
        one.close()


def program(mac: str) -> tuple[Instruction, ...]:
    """Return the kernel's filter: what this MAC sends, RARP left out."""
    octets = bytes.fromhex(mac.replace(":", ""))
    high, low = int.from_bytes(octets[:4], "big"), int.from_bytes(octets[4:], "big")
    return (
        (LOAD_BYTE, 0, 0, AD_PACKET_TYPE),
        (JUMP_EQUAL, 7, 0, PACKET_OUTGOING),
        (LOAD_HALF, 0, 0, 12),
        (JUMP_EQUAL, 5, 0, ETH_P_RARP),
        (LOAD_WORD, 0, 0, 6),
        (JUMP_EQUAL, 0, 3, high),
        (LOAD_HALF, 0, 0, 10),
        (JUMP_EQUAL, 0, 1, low),
        (RETURN, 0, 0, FRAME_BYTES),
        (RETURN, 0, 0, 0),
    )
