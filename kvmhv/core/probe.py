"""`vm set --probe TEXT`: which question the source asks a guest while it moves."""

import ipaddress
import re

from kvmhv.errors import CallerError
from kvmhv.model import Probe, ProbeKind

TEXT_MAX = 300
_HOST = r"(?:\[(?P<v6>[0-9A-Fa-f:.]+)\]|(?P<v4>[0-9.]+))"
_TCP = re.compile(rf"tcp:{_HOST}:(?P<port>\d{{1,5}})")
_HTTP = re.compile(rf"http://{_HOST}(?::(?P<port>\d{{1,5}}))?(?P<path>/[!-~]*)?")
_PING = re.compile(r"ping:(?P<v6>[0-9A-Fa-f:.]+)")


def parse(text: str) -> Probe:
    """Return the probe of `ping:IP`, `tcp:IP:PORT` or `http://IP[:PORT][/PATH]`. Raises CallerError `probe-invalid`."""
    for kind, pattern in ((ProbeKind.PING, _PING), (ProbeKind.TCP, _TCP), (ProbeKind.HTTP, _HTTP)):
        match = pattern.fullmatch(text) if len(text) <= TEXT_MAX else None
        if match is None:
            continue
        found = {"v4": None, **match.groupdict()}
        port = int(found.get("port") or 80) if kind is not ProbeKind.PING else 0
        path = (found.get("path") or "/") if kind is ProbeKind.HTTP else ""
        try:
            address = str(ipaddress.ip_address(found["v6"] or found["v4"] or ""))
        except ValueError as error:
            raise _invalid(text, str(error)) from None
        if kind is not ProbeKind.PING and not 1 <= port <= 65535:
            raise _invalid(text, f"{port} is no port")
        return Probe(kind=kind, address=address, port=port, path=path)
    raise _invalid(text, "it is none of the three kinds")


def _invalid(text: str, why: str) -> CallerError:
    shown = text if len(text) <= 80 else f"{text[:80]}..."
    return CallerError(
        "probe-invalid",
        f"{shown!r} cannot be a probe: {why}",
        "give ping:IP, tcp:IP:PORT or http://IP[:PORT][/PATH], with the guest's IP address, not a name",
    )
