"""Where an agent is reached: its UNIX socket, a lab host's socket, another host through the local agent, or a URL."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, urlsplit

from kvmhv.config import PORT
from kvmhv.errors import CallerError, KvmhvError

DEFAULT_SOCKET = Path("/run/kvmhv/agent.sock")


@dataclass(frozen=True, kw_only=True)
class Address:
    """One agent's address; exactly one of `socket` and `server` is set."""

    host: str | None
    """The host's name as the operator wrote it; None: the local host."""
    socket: Path | None = None
    server: tuple[str, int] | None = None
    base: str = "/v1"
    """What every path of the API begins with."""
    token: str | None = None
    fingerprint: str | None = None
    """SHA-256 of the agent's certificate, hex; None: the machine's certificate authorities decide."""

    @property
    def local(self) -> bool:
        """Whether paths of this machine mean the same to the agent."""
        return self.host is None

    def __str__(self) -> str:
        """For people: the socket or the URL."""
        if self.server is None:
            return str(self.socket)
        name, port = self.server
        return f"https://[{name}]:{port}" if ":" in name else f"https://{name}:{port}"


def find(host: str | None) -> Address:
    """Return the address for `--host`.

    Raises CallerError `host-url-invalid`, `token-invalid` or `fingerprint-invalid`, and `host-unknown` where a lab is
    all that this machine has; whether an agent is there shows when it is asked.
    """
    if host is not None and "://" in host:
        return _from_url(host)
    local = Path(os.environ.get("KVMHV_SOCKET") or DEFAULT_SOCKET)
    if host is None:
        return Address(host=None, socket=local)
    lab_socket = _lab_socket(host)
    if lab_socket is not None:
        return Address(host=host, socket=lab_socket)
    hosts = () if local.exists() else _lab_hosts()
    if hosts and host not in hosts:
        raise CallerError("host-unknown", f"the lab has no host {host!r}", f"its hosts are: {', '.join(hosts)}")
    return Address(host=host, socket=local, base=f"/v1/hosts/{segment(host)}")


def segment(name: str) -> str:
    """Return a name as one segment of a URL's path, whatever characters it has."""
    return quote(name, safe="")


def _lab_socket(host: str) -> Path | None:
    from kvmhv.lab.state import default_lab, socket_of  # noqa: PLC0415 - only commands that name a host pay for it

    if not re.fullmatch(r"[a-z][a-z0-9-]*", host):
        return None  # no lab host is called so, and the name must not become a path
    return socket_of(default_lab(), host)


def _lab_hosts() -> tuple[str, ...]:
    """Return the names of the running lab's hosts; empty without a lab."""
    from kvmhv.lab.state import default_lab, load  # noqa: PLC0415

    try:
        return tuple(host.name for host in load(default_lab()).plan.hosts)
    except KvmhvError:
        return ()


def _from_url(url: str) -> Address:
    todo = "write https://NAME or https://NAME:PORT"
    try:
        parts = urlsplit(url)
        server = (parts.hostname or "", PORT if parts.port is None else parts.port)
    except ValueError as error:
        raise CallerError("host-url-invalid", f"--host {url!r}: {error}", todo) from None
    if parts.scheme != "https" or not server[0] or parts.path not in ("", "/") or parts.query or "@" in parts.netloc:
        raise CallerError("host-url-invalid", f"--host {url!r} is not the URL of an agent", todo)
    return Address(
        host=server[0],
        server=server,
        token=_token(os.environ.get("KVMHV_TOKEN", "")),
        fingerprint=_fingerprint(os.environ.get("KVMHV_FINGERPRINT", "")),
    )


def _token(text: str) -> str | None:
    plain = text.strip()
    if plain and not re.fullmatch(r"[\x21-\x7e]+", plain):
        raise CallerError(
            "token-invalid",
            "KVMHV_TOKEN has characters that no token has",
            "copy what `kvmhv host token create` printed",
        )
    return plain or None


def _fingerprint(text: str) -> str | None:
    plain = text.strip().lower().removeprefix("sha256:").replace(":", "")
    if not plain:
        return None
    if not re.fullmatch(r"[0-9a-f]{64}", plain):
        raise CallerError(
            "fingerprint-invalid",
            "KVMHV_FINGERPRINT is not a SHA-256 fingerprint",
            "take the 64 hex digits that `kvmhv host show` prints on that host",
        )
    return plain
