"""Who asks, and whether they may.

On the UNIX socket the kernel says who it is (SO_PEERCRED), and the socket's mode has let only root and one group in.
Over TLS it is a trusted host by its certificate, or whoever has a bearer token.
"""

import enum
import ipaddress
import socket
import struct
from dataclasses import dataclass

from aiohttp import web

from kvmhv.agent.web.sessions import COOKIE, Sessions
from kvmhv.drivers.auth.certificate import fingerprint_of_der
from kvmhv.drivers.auth.tokens import Tokens
from kvmhv.drivers.auth.trust import Trust
from kvmhv.errors import Refused
from kvmhv.model import Asked

CALLER_HEADER = "X-Kvmhv-Caller"
"""A trusted host that forwards a request names here who asked it."""
CALLER_MAX_CHARACTERS = 100


class Kind(enum.StrEnum):
    """How a caller is known."""

    LOCAL = "local"
    HOST = "host"
    TOKEN = "token"  # noqa: S105 - a kind, not a secret
    PAGE = "page"
    """Who has signed in to the live page: may see it, and nothing else."""
    NOBODY = "nobody"


class Access(enum.StrEnum):
    """Who may use a route."""

    API = "api"
    """The UNIX socket, trusted hosts, tokens."""
    PEER = "peer"
    """Trusted hosts only."""
    METRICS = "metrics"
    """As API, and the subnets of `metrics_subnets`."""
    PAGE = "page"
    """As API, and who has signed in to the live page."""
    OPEN = "open"
    """Everybody who reaches the port."""


USERS = frozenset({Kind.LOCAL, Kind.HOST, Kind.TOKEN})
ADMITTED = {
    Access.API: USERS,
    Access.METRICS: USERS,
    Access.PEER: frozenset({Kind.HOST}),
    Access.PAGE: USERS | {Kind.PAGE},
}


@dataclass(frozen=True)
class Caller:
    """Who asks: `name` is the host, the token or the user; `ip` is empty on the UNIX socket."""

    kind: Kind
    name: str
    ip: str = ""

    def __str__(self) -> str:
        """For logs and the move's record."""
        return f"{self.kind} {self.name}" + (f" at {self.ip}" if self.ip else "")


class Gate:
    """Tells who asks and refuses who may not."""

    def __init__(self, trust: Trust, tokens: Tokens, sessions: Sessions, metrics_subnets: tuple[str, ...]) -> None:
        self._trust = trust
        self._tokens = tokens
        self._sessions = sessions
        self._metrics_subnets = tuple(ipaddress.ip_network(subnet) for subnet in metrics_subnets)

    def identify(self, request: web.Request) -> Caller:
        """Return who asks; never raises for a stranger."""
        transport = request.transport
        connection = transport.get_extra_info("socket") if transport is not None else None
        if transport is None or connection is None:
            return Caller(Kind.NOBODY, "a connection that has ended")
        if connection.family == socket.AF_UNIX:
            pid, uid, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
            return Caller(Kind.LOCAL, f"uid {uid} (pid {pid})")
        ip = plain_ip(transport.get_extra_info("peername")[0])
        secured = transport.get_extra_info("ssl_object")
        if secured is None:
            return Caller(Kind.NOBODY, "a connection without TLS", ip)
        certificate = secured.getpeercert(binary_form=True)
        if certificate is not None:
            # Asked again for every request: the trust may have been removed since the connection was made.
            host = self._trust.host_of(fingerprint_of_der(certificate))
            return (
                Caller(Kind.HOST, host.name, ip)
                if host is not None
                else Caller(Kind.NOBODY, "whose certificate is trusted no longer", ip)
            )
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        name = self._tokens.name_of(token.strip()) if scheme.lower() == "bearer" else None
        if name is not None:
            return Caller(Kind.TOKEN, name, ip)
        signed_in = self._sessions.name_of(request.cookies.get(COOKIE, ""))
        if signed_in is not None:
            return Caller(Kind.PAGE, signed_in, ip)
        return Caller(Kind.NOBODY, "without certificate or token", ip)

    def check(self, caller: Caller, access: Access) -> None:
        """Let the caller in, or raise Refused `peer-untrusted` or `not-authorised` (401)."""
        if access is Access.OPEN or caller.kind in ADMITTED[access]:
            return
        own = self._trust.own_name
        if access is Access.PEER:
            raise Refused(
                "peer-untrusted",
                f"{own} takes this from the agents of trusted hosts only",
                f"run `kvmhv host trust invite` on {own}, then `kvmhv host trust join CODE` on the other host",
                host=own,
            )
        if access is Access.METRICS and caller.ip and self._in_metrics_subnets(caller.ip):
            return
        raise Refused(
            "not-authorised",
            f"{own} does not know who asks",
            "use a token (`kvmhv host token create NAME` on that host), a trusted host, or the host's own socket",
            host=own,
            http_status=401,
        )

    def _in_metrics_subnets(self, ip: str) -> bool:
        address = ipaddress.ip_address(ip)
        return any(address in subnet for subnet in self._metrics_subnets)


def asked_by(caller: Caller, request: web.Request) -> Asked:
    """Return who asked, for records: for a forwarded request also whom the forwarding host names."""
    named = request.headers.get(CALLER_HEADER, "") if caller.kind is Kind.HOST else ""
    if not named:
        return Asked(who=caller.name, authentication=caller.kind.value, address=caller.ip)
    printable = "".join(character for character in named if character.isprintable())[:CALLER_MAX_CHARACTERS]
    return Asked(who=printable, authentication=caller.kind.value, address=caller.ip, via=caller.name)


def plain_ip(text: str) -> str:
    """Return an IP without scope, and an IPv4 address that came over an IPv6 socket as IPv4."""
    ip = ipaddress.ip_address(text.partition("%")[0])
    return str(getattr(ip, "ipv4_mapped", None) or ip)
