"""The serial console of a VM on this terminal, over a WebSocket."""

import os
import select
import socket
import sys
import termios
import tty
from collections.abc import Iterator
from contextlib import contextmanager

from kvmhv.cli import websocket
from kvmhv.errors import HostError

LEAVE = b"\x1d"
"""Ctrl-], as in telnet and virsh."""
CHUNK_BYTES = 4096
SEND_TIMEOUT_S = 30.0


@contextmanager
def raw_terminal(descriptor: int) -> Iterator[None]:
    """Pass every key on as it is typed; the terminal is as it was afterwards. Does nothing where there is none."""
    if not os.isatty(descriptor):
        yield
        return
    before = termios.tcgetattr(descriptor)
    tty.setraw(descriptor)
    try:
        yield
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


def attach(connection: socket.socket, source: int, sink: int) -> None:
    """Copy between the descriptors and the console until LEAVE is typed on a terminal or the console ends.

    The end of a file or pipe at `source` ends only the typing. Raises HostError `console-broken`.
    """
    connection.settimeout(SEND_TIMEOUT_S)
    reader = websocket.FrameReader()
    open_sources: list[int] = [source]
    while True:
        ready, _, _ = select.select([connection.fileno(), *open_sources], [], [])  # it may be silent for days
        try:
            if connection.fileno() in ready and not _show(connection, reader, sink):
                return
            if source in ready and not _type(connection, source):
                if os.isatty(source):
                    connection.sendall(websocket.frame(websocket.CLOSE, b"\x03\xe8"))
                    return
                open_sources.clear()
        except OSError as error:
            raise HostError("console-broken", f"the connection to the console broke: {error}") from error


def _show(connection: socket.socket, reader: websocket.FrameReader, sink: int) -> bool:
    data = connection.recv(CHUNK_BYTES)
    for opcode, payload in reader.feed(data):
        if opcode == websocket.CLOSE:
            return False
        if opcode == websocket.PING:
            connection.sendall(websocket.frame(websocket.PONG, payload))
        elif opcode in (websocket.CONTINUATION, websocket.TEXT, websocket.BINARY) and not _write(sink, payload):
            return False
    return bool(data)


def _type(connection: socket.socket, source: int) -> bool:
    typed = os.read(source, CHUNK_BYTES)
    leaving = os.isatty(source) and LEAVE in typed
    text = typed.partition(LEAVE)[0] if leaving else typed
    if text:
        connection.sendall(websocket.frame(websocket.BINARY, text))
    return bool(typed) and not leaving


def _write(sink: int, data: bytes) -> bool:
    """Write all of it; False when nobody reads any more (`| head`)."""
    try:
        while data:
            data = data[os.write(sink, data) :]
    except BrokenPipeError:
        return False
    return True


def run(connection: socket.socket) -> None:
    """Attach this process's terminal, or its pipes. Raises HostError `console-broken`."""
    source, sink = sys.stdin.fileno(), sys.stdout.fileno()
    if os.isatty(source):
        print("console; leave with Ctrl-]", file=sys.stderr, flush=True)
    with raw_terminal(source):
        attach(connection, source, sink)
