"""Tells systemd how the service is (sd_notify): one datagram, no library needed."""

import contextlib
import os
import socket


def notify(state: str) -> None:
    """Send e.g. `READY=1` to the service manager; does nothing where there is none (NOTIFY_SOCKET unset)."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
        sender.setblocking(False)
        sender.connect(address)
        sender.send(state.encode())
