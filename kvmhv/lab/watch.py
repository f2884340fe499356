"""Watches a guest from outside: heartbeats, pings, one TCP connection, acknowledgements. Runs on the lab's client.

    python -m kvmhv.lab.watch --ack PORT --beat PORT --echo IP:7 --ping IP --out FILE.json [--acks FILE]
                              [--ping-every-ms MS]

Each option asks for one kind of watching. It prints `listening` when its sockets are open (the guest may be started
then) and `ready` when each kind has been seen once; the window `ready` of the report begins there. Lines on standard
input: `mark NAME` begins a new window (answer `marked NAME`), `snapshot` prints the report so far on one line, `pings
off` and `pings on` let the pings rest and go on, `quit` ends it with FILE.json written, and so do the end of the input,
SIGTERM and SIGINT. SIGUSR1 is `mark` with a number. Exit status 1: not ready within READY_TIMEOUT_S; the report is
written all the same.

Acknowledgements that are new are appended to `--acks` (FILE.json.acks) as they came, before they are confirmed to the
guest. The TCP connection is never made anew: once it is broken the report says so. All waits for the guest are as long
as the watcher lives: that a guest is away is what it measures.
"""

import argparse
import asyncio
import contextlib
import json
import os
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from kvmhv.lab.observations import Observations
from kvmhv.lab.oracle import ANNOUNCED, parse_ack

READY_TIMEOUT_S = 180.0
PING_EVERY_S = 0.05
ECHO_EVERY_S = 0.05
CONNECT_AGAIN_S = 0.2
CONNECT_TIMEOUT_S = 5.0
ACK_CONNECTIONS_MAX = 16
ACK_LINE_MAX = 256
DATAGRAM_MAX = 2048
DATAGRAMS_AT_ONCE = 1000
LATEST_S = 10.0

_SO_TIMESTAMPNS = 35  # linux/asm-generic/socket.h; Python has no name for it
_TIMESPEC = struct.Struct("@qq")
_ICMP = struct.Struct("!BBHHH")
_ECHO_REQUEST, _ECHO_REPLY = 8, 0
_PAYLOAD = struct.Struct("!8sQ")


@dataclass(frozen=True)
class Options:
    """What to watch; None: not."""

    ack_port: int | None
    beat_port: int | None
    echo: tuple[str, int] | None
    ping: str | None
    ping_every_s: float
    out: Path
    acks: Path


def parse_beat(datagram: bytes) -> tuple[str, int, int]:
    """Return boot id, sequence number and the guest's nanoseconds. Raises ValueError: not a heartbeat."""
    words = datagram.decode("ascii").split()
    if len(words) != 4 or words[0] != "beat":
        raise ValueError(f"not a heartbeat: {datagram[:80]!r}")
    return words[1], int(words[2]), int(words[3])


def icmp_checksum(packet: bytes) -> int:
    """Return the Internet checksum (RFC 1071)."""
    padded = packet + bytes(len(packet) % 2)
    total: int = sum(struct.unpack(f"!{len(padded) // 2}H", padded))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def ping_packet(identifier: int, nonce: bytes, number: int) -> bytes:
    """Return an ICMP echo request; the whole number is in its payload, for the field in the header is short."""
    payload = _PAYLOAD.pack(nonce, number)
    empty = _ICMP.pack(_ECHO_REQUEST, 0, 0, identifier, number & 0xFFFF)
    return _ICMP.pack(_ECHO_REQUEST, 0, icmp_checksum(empty + payload), identifier, number & 0xFFFF) + payload


def parse_reply(packet: bytes, identifier: int, nonce: bytes) -> int | None:
    """Return the number of the ping that this IPv4 packet answers, or None if it is not an answer to one of ours."""
    icmp = packet[(packet[0] & 15) * 4 :] if packet else b""
    if len(icmp) != _ICMP.size + _PAYLOAD.size:
        return None
    kind, _code, _checksum, its_identifier, _sequence = _ICMP.unpack_from(icmp)
    its_nonce, number = _PAYLOAD.unpack_from(icmp, _ICMP.size)
    if kind != _ECHO_REPLY or its_identifier != identifier or its_nonce != nonce:
        return None
    return int(number)


class Watcher:
    """The sockets and the one Observations that they feed."""

    def __init__(self, options: Options, acks_file: TextIO) -> None:
        self.options = options
        self.acks_file = acks_file
        self.observations = Observations(time.monotonic(), time.time() - time.monotonic())
        self.nonce = os.urandom(8)
        self.identifier = os.getpid() & 0xFFFF
        self.stop = asyncio.Event()
        self.pings_wanted = asyncio.Event()
        self.pings_wanted.set()
        self.marks = 0
        self.ack_connections = 0

    # ---- datagrams, with the kernel's own time of arrival: a busy machine must not look like a guest that pauses ----

    def _receive(self, sock: socket.socket, take: Callable[[bytes, float], None]) -> None:
        for _ in range(DATAGRAMS_AT_ONCE):
            try:
                data, ancillary, _flags, _address = sock.recvmsg(DATAGRAM_MAX, 64)
            except BlockingIOError:
                return
            at_s = time.monotonic()
            for level, kind, content in ancillary:
                if level == socket.SOL_SOCKET and kind == _SO_TIMESTAMPNS:
                    seconds, nanoseconds = _TIMESPEC.unpack_from(content)
                    waited_s = time.time() - seconds - nanoseconds / 1e9
                    if 0 < waited_s < LATEST_S:  # else the wall clock was set meanwhile
                        at_s -= waited_s
            take(data, at_s)

    def _take_beat(self, data: bytes, at_s: float) -> None:
        with contextlib.suppress(ValueError):  # a stray datagram is not the guest's
            boot_id, sequence, guest_ns = parse_beat(data)
            self.observations.beat(boot_id, sequence, guest_ns, at_s)

    def _take_reply(self, data: bytes, at_s: float) -> None:
        number = parse_reply(data, self.identifier, self.nonce)
        if number is not None:
            self.observations.ping_received(number, at_s)

    def open_beats(self, port: int) -> socket.socket:
        """Listen for heartbeats."""
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        sock.setblocking(False)
        sock.bind(("", port))
        asyncio.get_running_loop().add_reader(sock, self._receive, sock, self._take_beat)
        return sock

    def open_pings(self) -> socket.socket:
        """Open the raw socket that sends pings and takes their answers."""
        sock = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
        sock.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
        sock.setblocking(False)
        asyncio.get_running_loop().add_reader(sock, self._receive, sock, self._take_reply)
        return sock

    async def send_pings(self, sock: socket.socket, address: str) -> None:
        """Send a ping now and then; one that cannot be sent (no route, no neighbour) is a lost one."""
        number = 0
        due_s = time.monotonic()
        while True:
            await self.pings_wanted.wait()
            number += 1
            self.observations.ping_sent(number, time.monotonic())
            with contextlib.suppress(OSError):
                sock.sendto(ping_packet(self.identifier, self.nonce, number), (address, 0))
            due_s = max(due_s + self.options.ping_every_s, time.monotonic())
            await asyncio.sleep(due_s - time.monotonic())

    # ---- the one connection ----

    async def keep_echo(self, address: tuple[str, int]) -> None:
        """Connect once the guest is there, then send a line every ECHO_EVERY_S until it breaks."""
        while True:
            try:
                async with asyncio.timeout(CONNECT_TIMEOUT_S):
                    reader, writer = await asyncio.open_connection(*address)
                break
            except (OSError, TimeoutError):
                await asyncio.sleep(CONNECT_AGAIN_S)
        number = 0
        try:
            while True:
                number += 1
                line = b"echo %d\n" % number
                self.observations.echo_sent(time.monotonic())
                writer.write(line)
                answer = await reader.readexactly(len(line))
                if answer != line:
                    raise ConnectionError(f"sent {line!r}, got {answer!r}")
                self.observations.echo_received(time.monotonic())
                await asyncio.sleep(ECHO_EVERY_S)
        except (OSError, EOFError) as error:
            self.observations.echo_broke(f"{type(error).__name__}: {error}", time.monotonic())
        finally:
            writer.close()

    # ---- acknowledgements ----

    async def take_acks(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Take one connection of the guest: each new line is in the file before it is confirmed by its number."""
        if self.ack_connections >= ACK_CONNECTIONS_MAX:
            writer.close()
            return
        self.ack_connections += 1
        lines = 0
        try:
            while line := await reader.readline():
                if not line.endswith(b"\n"):
                    break  # the connection broke inside a line; it comes again
                lines += 1
                self._take_ack(line)
                writer.write(b"%d\n" % lines)
                await writer.drain()
        except (OSError, ValueError):
            pass  # broken, or a line longer than any of the guest's: it connects again
        finally:
            self.ack_connections -= 1
            writer.close()

    def _take_ack(self, line: bytes) -> None:
        text = line.decode("ascii", "replace")
        try:
            ack = parse_ack(text)
        except ValueError:
            self.observations.acks_malformed += 1
            return
        if self.observations.ack(ack.boot_id, ack.disk, ack.record, ack.kind in ANNOUNCED):
            self.acks_file.write(text)
            self.acks_file.flush()

    # ---- control ----

    def mark(self, name: str | None = None) -> None:
        """Begin a new window."""
        self.marks += 1
        name = name or f"mark-{self.marks}"
        self.observations.mark(name, time.monotonic())
        say(f"marked {name}")

    def obey(self, line: str) -> None:
        """Do what a line on standard input says; an unknown one is answered with `unknown`."""
        verb, _, rest = line.strip().partition(" ")
        if verb == "mark":
            self.mark(rest.strip())
        elif verb == "snapshot":
            say(json.dumps(self.observations.report(time.monotonic())))
        elif verb == "pings" and rest.strip() == "off":
            self.pings_wanted.clear()
        elif verb == "pings" and rest.strip() == "on":
            self.pings_wanted.set()
        elif verb == "quit":
            self.stop.set()
        elif verb:
            say(f"unknown {verb}")

    async def take_orders(self) -> None:
        """Read standard input until it ends."""
        reader = asyncio.StreamReader()
        loop = asyncio.get_running_loop()
        try:
            await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
            while line := await reader.readline():
                self.obey(line.decode("utf-8", "replace"))
        except (OSError, ValueError) as error:  # /dev/null and files cannot be waited for; they count as ended
            sys.stderr.write(f"watch: no orders from standard input: {error}\n")
        self.stop.set()

    def missing(self) -> list[str]:
        """Return the kinds of watching that have not seen anything yet."""
        total, options = self.observations.total, self.options
        seen = {
            "acknowledgements": (options.ack_port, total.acks),
            "heartbeats": (options.beat_port, total.beats),
            "echo": (options.echo, total.echo_round_trips),
            "pings": (options.ping, total.pings_received),
        }
        return [name for name, (wanted, count) in seen.items() if wanted is not None and not count]

    async def tell_ready(self) -> None:
        """Say `ready` when everything has been seen. Raises TimeoutError: not within READY_TIMEOUT_S."""
        async with asyncio.timeout(READY_TIMEOUT_S):
            while self.missing():  # noqa: ASYNC110 (nothing waits for this; it is asked now and then)
                await asyncio.sleep(0.02)
        self.observations.mark("ready", time.monotonic())
        say("ready")


def say(text: str) -> None:
    """Print a line; whoever reads it may be gone."""
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.write(text + "\n")
        sys.stdout.flush()


async def watch(options: Options) -> int:
    """Watch until told to end; write the report; return the exit status."""
    loop = asyncio.get_running_loop()
    with options.acks.open("a") as acks_file, contextlib.ExitStack() as sockets:
        watcher = Watcher(options, acks_file)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, watcher.stop.set)
        loop.add_signal_handler(signal.SIGUSR1, watcher.mark)
        tasks = [asyncio.create_task(watcher.take_orders())]
        server = None
        if options.beat_port is not None:
            sockets.enter_context(watcher.open_beats(options.beat_port))
        if options.ack_port is not None:
            server = await asyncio.start_server(watcher.take_acks, port=options.ack_port, limit=ACK_LINE_MAX)
        if options.ping is not None:
            pings = sockets.enter_context(watcher.open_pings())
            tasks.append(asyncio.create_task(watcher.send_pings(pings, options.ping)))
        if options.echo is not None:
            tasks.append(asyncio.create_task(watcher.keep_echo(options.echo)))
        say("listening")
        ready = asyncio.create_task(watcher.tell_ready())
        stopped = asyncio.create_task(watcher.stop.wait())
        try:
            await asyncio.wait([ready, stopped], return_when=asyncio.FIRST_COMPLETED)
            failed = ready.done() and ready.exception() is not None
            if failed:
                sys.stderr.write(f"watch: not seen within {READY_TIMEOUT_S:.0f} s: {', '.join(watcher.missing())}\n")
            else:
                await stopped
        finally:
            report = watcher.observations.report(time.monotonic())
            for task in (*tasks, ready, stopped):
                task.cancel()
            await asyncio.gather(*tasks, ready, stopped, return_exceptions=True)
            if server is not None:
                server.close()
            write_report(options.out, report)
    return 1 if failed else 0


def write_report(path: Path, report: dict[str, object]) -> None:
    """Write the report in one go: nobody sees half of it."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps(report, indent=1) + "\n")
    part.replace(path)


def parse_arguments(arguments: list[str]) -> Options:
    """Return the options of the command line; a wrong one ends the program with status 2."""
    parser = argparse.ArgumentParser(prog="python -m kvmhv.lab.watch")
    parser.add_argument("--ack", type=int, metavar="PORT", help="take acknowledgements on this TCP port")
    parser.add_argument("--beat", type=int, metavar="PORT", help="take heartbeats on this UDP port")
    parser.add_argument("--echo", metavar="IP:PORT", help="keep one connection to this echo service")
    parser.add_argument("--ping", metavar="IP", help="ping this address")
    parser.add_argument("--ping-every-ms", type=float, metavar="MS", default=PING_EVERY_S * 1000, help="so often")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="where the report goes")
    parser.add_argument("--acks", type=Path, metavar="FILE", help="where acknowledgements are appended (OUT.acks)")
    given = parser.parse_args(arguments)
    echo = None
    if given.echo is not None:
        host, _, port = given.echo.rpartition(":")
        if not host or not port.isdecimal():
            parser.error(f"--echo wants IP:PORT, not {given.echo}")
        echo = (host, int(port))
    acks = given.acks or given.out.with_name(given.out.name + ".acks")
    return Options(given.ack, given.beat, echo, given.ping, given.ping_every_ms / 1000, given.out, acks)


if __name__ == "__main__":
    sys.exit(asyncio.run(watch(parse_arguments(sys.argv[1:]))))
