"""What the TCP connections of one move carried, as the kernel counts it; implements ports.Flows.

QEMU's own figure is what it gave to its channel; TLS, NBD's headers and what TCP had to send twice are not in it. The
kernel has the truth in each socket's TCP_INFO (bytes_sent, bytes_received), tells the last figures of a socket when it
is destroyed (sock_diag(7), group SKNLGRP_INET_TCP_DESTROY), and lists those that are still there. So nothing is asked
while the move runs, no packet is looked at, and other traffic on the same interface does not count. Headers of TCP, IP
and Ethernet are left out: how many there are is the network card's business (segmentation offload).
"""

import asyncio
import contextlib
import socket
import struct
import sys
from collections.abc import Iterator

from kvmhv.errors import HostError
from kvmhv.kernel_sockets import BYTES_RECEIVED_AT, BYTES_SENT_AT, JUMP_EQUAL, LOAD_HALF, RETURN, attach_filter

NETLINK_SOCK_DIAG = 4
SOL_NETLINK, NETLINK_ADD_MEMBERSHIP = 270, 1
TCP_DESTROY_V4, TCP_DESTROY_V6 = 1, 3
SOCK_DIAG_BY_FAMILY = 20
REQUEST_DUMP = 0x301
MESSAGE_ERROR, MESSAGE_DONE = 2, 3
ALL_STATES = 0xFFF
INET_DIAG_INFO = 2

HEADER = struct.Struct("=IHHII")
"""struct nlmsghdr."""
REQUEST = struct.Struct("=BBBBI48x")
"""struct inet_diag_req_v2: family, protocol, what to tell, padding, states; any socket."""
SOCKET = struct.Struct("=BBBB2s2s16s16sI8s20s")
"""struct inet_diag_msg: family, state, timer, retransmits, ports in network order, addresses, interface, cookie."""
REMOTE_PORT_AT = HEADER.size + 6
ATTRIBUTE = struct.Struct("=HH")
CHUNK_BYTES = 1 << 16
DUMP_TIMEOUT_S = 5.0


class TcpFlows:
    """Implements ports.Flows in the network namespace that the agent runs in."""

    async def watch(self, ip: str, ports: tuple[int, ...]) -> "TcpFlowWatch":
        """Begin to count connections to these ports of a host. Raises HostError `network`."""
        try:
            return TcpFlowWatch(ip, ports)
        except OSError as error:
            todo = "is the kernel built with INET_DIAG? see `ss -t`"
            raise HostError("network", f"cannot count what goes to {ip}: {error}", todo) from error


class TcpFlowWatch:
    """The connections to one place, from the moment of its making."""

    def __init__(self, ip: str, ports: tuple[int, ...]) -> None:
        self._family = socket.AF_INET6 if ":" in ip else socket.AF_INET
        self._address = socket.inet_pton(self._family, ip).ljust(16, b"\0")
        self._ports = ports
        self._ended = _listen(ports)
        self._known: dict[bytes, int] = {}
        """The last figures of each connection, by the kernel's cookie for it."""

    async def carried_bytes(self) -> int | None:
        """Return the bytes of all connections so far, both ways; None if the kernel could not tell all of them."""
        try:
            # First those that are there: one that ends meanwhile is told afterwards, with its last figures.
            self._known |= await asyncio.to_thread(self._still_there)
            self._known |= self._destroyed()
        except OSError:
            return None
        return sum(self._known.values())

    def close(self) -> None:
        """End the watch; may be repeated."""
        self._ended.close()

    def _destroyed(self) -> dict[bytes, int]:
        found: dict[bytes, int] = {}
        with contextlib.suppress(BlockingIOError):
            while True:
                self._note(self._ended.recv(CHUNK_BYTES), found)
        return found

    def _still_there(self) -> dict[bytes, int]:
        found: dict[bytes, int] = {}
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_SOCK_DIAG) as asking:
            asking.settimeout(DUMP_TIMEOUT_S)
            wanted = REQUEST.pack(self._family, socket.IPPROTO_TCP, 1 << (INET_DIAG_INFO - 1), 0, ALL_STATES)
            asking.send(HEADER.pack(HEADER.size + len(wanted), SOCK_DIAG_BY_FAMILY, REQUEST_DUMP, 0, 0) + wanted)
            while self._note(asking.recv(CHUNK_BYTES), found):
                pass
        return found

    def _note(self, chunk: bytes, found: dict[bytes, int]) -> bool:
        """Note what each message says of a connection of the move; False when they have ended."""
        for kind, content in _messages(chunk):
            if kind == MESSAGE_DONE:
                return False
            if kind == MESSAGE_ERROR:
                raise OSError("the kernel does not list connections")
            family, _, _, _, _, port, _, address, _, cookie, _ = SOCKET.unpack_from(content)
            info = _info(content)
            if (family, address) != (self._family, self._address) or int.from_bytes(port, "big") not in self._ports:
                continue
            if len(info) >= BYTES_SENT_AT + 8:
                both_ways = (info[at : at + 8] for at in (BYTES_RECEIVED_AT, BYTES_SENT_AT))
                found[cookie] = sum(int.from_bytes(count, sys.byteorder) for count in both_ways)
        return True


def _messages(chunk: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at + HEADER.size <= len(chunk):
        length, kind, _, _, _ = HEADER.unpack_from(chunk, at)
        if length < HEADER.size:
            return
        yield kind, chunk[at + HEADER.size : at + length]
        at += (length + 3) & ~3


def _info(content: bytes) -> bytes:
    """Return the socket's struct tcp_info; empty for one that has none any more (TIME-WAIT)."""
    at = SOCKET.size
    while at + ATTRIBUTE.size <= len(content):
        length, kind = ATTRIBUTE.unpack_from(content, at)
        if kind == INET_DIAG_INFO:
            return content[at + ATTRIBUTE.size : at + length]
        at += max(ATTRIBUTE.size, (length + 3) & ~3)
    return b""


def _listen(ports: tuple[int, ...]) -> socket.socket:
    """Open a socket that hears of the end of connections to these ports; the kernel keeps what is not read yet."""
    hearing = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, NETLINK_SOCK_DIAG)
    try:
        _filter(hearing, ports)
        hearing.bind((0, 0))
        for group in (TCP_DESTROY_V4, TCP_DESTROY_V6):
            hearing.setsockopt(SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, group)
    except OSError:
        hearing.close()
        raise
    return hearing


def _filter(hearing: socket.socket, ports: tuple[int, ...]) -> None:
    """Let the kernel drop what is about other ports: on a busy host connections end all the time."""
    # A test that is met jumps over the remaining tests and the first return.
    tests = [(JUMP_EQUAL, len(ports) - place, 0, port) for place, port in enumerate(ports)]
    program = [(LOAD_HALF, 0, 0, REMOTE_PORT_AT), *tests, (RETURN, 0, 0, 0), (RETURN, 0, 0, CHUNK_BYTES)]
    attach_filter(hearing, program)
