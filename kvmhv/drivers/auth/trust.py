"""Which hosts are trusted: one pinned certificate for each name, kept in Records.

A change takes effect at once for every new connection and every new request. A move that runs over a connection of a
host that is removed meanwhile goes on to its end: cutting it in the middle of the handover would only do harm.
"""

import ssl
from typing import Annotated

import msgspec
from msgspec import Meta

from kvmhv.drivers.auth import tls
from kvmhv.drivers.auth.certificate import Identity, fingerprint_of_pem, normalized_pem
from kvmhv.errors import CallerError, Refused
from kvmhv.model import Name, Struct, TrustedHost
from kvmhv.ports import Records

KIND = "trust"

HostAddress = Annotated[str, Meta(pattern=r"^(\[[0-9a-fA-F:.]{2,45}\]|[A-Za-z0-9._-]{1,253}):[0-9]{1,5}$")]
"""`host:port` or `[v6]:port`."""


class TrustRecord(Struct, frozen=True, kw_only=True):
    """A trusted host as it is kept."""

    name: Name
    address: HostAddress
    fingerprint: str
    certificate_pem: str

    def shown(self) -> TrustedHost:
        """Return what people see of it."""
        return TrustedHost(name=self.name, address=self.address, fingerprint=self.fingerprint)


class Trust:
    """The trusted hosts of this host, and the TLS contexts that follow from them."""

    def __init__(self, records: Records, identity: Identity, hosts_max: int) -> None:
        self._records = records
        self._identity = identity
        self._hosts_max = hosts_max
        self._hosts = {name: msgspec.json.decode(value, type=TrustRecord) for name, value in records.all(KIND)}
        self._server_context = self._make_server_context()

    @property
    def own_name(self) -> str:
        """Name of this host."""
        return self._identity.name

    @property
    def fingerprint(self) -> str:
        """SHA-256 of this host's certificate."""
        return self._identity.fingerprint

    @property
    def certificate_pem(self) -> str:
        """This host's certificate."""
        return self._identity.certificate_pem

    def list(self) -> tuple[TrustedHost, ...]:
        """Return all trusted hosts by name."""
        return tuple(self._hosts[name].shown() for name in sorted(self._hosts))

    def find(self, host: str) -> TrustedHost | None:
        """Return the trusted host of this name or this `host:port`."""
        record = self._hosts.get(host)
        if record is None:
            record = next((known for known in self._hosts.values() if known.address == host), None)
        return record.shown() if record is not None else None

    def host_of(self, fingerprint: str) -> TrustedHost | None:
        """Return the trusted host that this certificate belongs to."""
        for record in self._hosts.values():
            if record.fingerprint == fingerprint:
                return record.shown()
        return None

    def check_new(self, name: str, fingerprint: str) -> None:
        """Raise what `add` would raise: CallerError `trust-name-taken`, `trust-host-known`, Refused `trust-limit`."""
        if name == self.own_name or fingerprint == self.fingerprint:
            raise CallerError(
                "trust-name-taken",
                f"{name!r} is this very host",
                "each host needs a name of its own: set `name` in its agent.toml and start its agent again",
                host=self.own_name,
                http_status=409,
            )
        known = self._hosts.get(name)
        if known is not None and known.fingerprint != fingerprint:
            raise CallerError(
                "trust-name-taken",
                f"another host of the name {name!r} is trusted here (certificate {known.fingerprint[:16]}...)",
                f"give the new host another name; if it replaces the old: `kvmhv host trust remove {name}` here first",
                host=self.own_name,
                http_status=409,
            )
        other = self.host_of(fingerprint)
        if other is not None and other.name != name:
            raise CallerError(
                "trust-host-known",
                f"this certificate is trusted here already, as {other.name!r}",
                f"`kvmhv host trust remove {other.name}` here first if the host has a new name",
                host=self.own_name,
                http_status=409,
            )
        if known is None and len(self._hosts) >= self._hosts_max:
            raise Refused(
                "trust-limit",
                f"{self._hosts_max} hosts are trusted here already",
                "remove one, or raise limits.peers in agent.toml",
                host=self.own_name,
                http_status=429,
            )

    def add(self, name: str, address: str, certificate_pem: str) -> TrustedHost:
        """Trust a host from now on; again for the same certificate: its address is replaced.

        Raises as `check_new`, and CallerError `certificate-invalid`; then nothing was changed.
        """
        fingerprint = fingerprint_of_pem(certificate_pem)
        self.check_new(name, fingerprint)
        record = TrustRecord(
            name=name, address=address, fingerprint=fingerprint, certificate_pem=normalized_pem(certificate_pem)
        )
        self._records.put(KIND, name, msgspec.json.encode(record))
        self._hosts[name] = record
        self._server_context = self._make_server_context()
        return record.shown()

    def remove(self, name: str) -> None:
        """Trust a host no longer. Raises CallerError `host-unknown`."""
        if name not in self._hosts:
            raise self.unknown(name)
        self._records.delete(KIND, name)
        del self._hosts[name]
        self._server_context = self._make_server_context()

    def unknown(self, host: str) -> CallerError:
        """Return the error for a host that is not trusted here."""
        return CallerError(
            "host-unknown",
            f"{host!r} is no host that {self.own_name} trusts",
            "`kvmhv host trust list` shows them; `kvmhv host trust invite` there and `... join CODE` here add one",
            host=self.own_name,
            http_status=404,
        )

    def server_context(self) -> ssl.SSLContext:
        """Return the listener's TLS context of this moment: take it anew for each connection."""
        return self._server_context

    def client_context(self, host: TrustedHost) -> ssl.SSLContext:
        """Return the TLS context for a connection to a trusted host. Raises CallerError `host-unknown`."""
        record = self._hosts.get(host.name)
        if record is None:
            raise self.unknown(host.name)
        return tls.client_context(
            self._identity, record.certificate_pem, lambda fingerprint: fingerprint == record.fingerprint
        )

    def introduction_context(self, fingerprint: str) -> ssl.SSLContext:
        """Return the TLS context for a host known by nothing but its fingerprint; this host shows no certificate."""
        return tls.introduction_context(lambda shown: shown == fingerprint)

    def _make_server_context(self) -> ssl.SSLContext:
        pems = tuple(record.certificate_pem for record in self._hosts.values())
        return tls.server_context(self._identity, pems, self._accepts)

    def _accepts(self, fingerprint: str | None) -> bool:
        return fingerprint is None or self.host_of(fingerprint) is not None
