"""May this move begin, as far as this host's settings go? Each side asks for itself, before it allocates anything."""

import ipaddress
from collections.abc import Collection

import msgspec

from kvmhv.model import Address, HostSettings, Plan, Refusal, Struct

LIMIT = "limit-reached"


class Load(Struct, frozen=True, kw_only=True):
    """The moves that this host takes part in right now."""

    moves_out: int
    moves_in: int
    storage_copies: int

    def plus(self, promises: "Collection[Promise]") -> "Load":
        """Return the load when these have begun."""
        out = sum(one.out for one in promises)
        return msgspec.structs.replace(
            self,
            moves_out=self.moves_out + out,
            moves_in=self.moves_in + len(promises) - out,
            storage_copies=self.storage_copies + sum(one.with_storage for one in promises),
        )


class Promise(Struct, frozen=True, kw_only=True):
    """A slot that is kept for a move which is about to begin."""

    out: bool
    """One of the moves out; else of the moves in."""
    with_storage: bool
    until_ms: float


def admit_out(settings: HostSettings, host: str, load: Load, *, with_storage: bool) -> Refusal | None:
    """Return why this host does not let another VM out now, None if it does."""
    if not settings.enabled:
        return _switched_off(host)
    if load.moves_out >= settings.moves_out:
        return _limit(host, "migration.moves_out", "outgoing moves", load.moves_out, settings.moves_out)
    return _storage(settings, host, load) if with_storage else None


def admit_in(
    settings: HostSettings, host: str, load: Load, *, source: str, source_ip: str, with_storage: bool
) -> Refusal | None:
    """Return why this host does not let another VM in now, None if it does."""
    if not settings.enabled:
        return _switched_off(host)
    if settings.sources and not _allowed(source_ip, settings.sources):
        return Refusal(
            code="source-not-allowed",
            host=host,
            setting="migration.sources",
            text=f"{host} lets VMs in from {', '.join(settings.sources)} only, and {source} comes from {source_ip}",
        )
    if load.moves_in >= settings.moves_in:
        return _limit(host, "migration.moves_in", "incoming moves", load.moves_in, settings.moves_in)
    return _storage(settings, host, load) if with_storage else None


def admit_addresses(plan: Plan, host: str, source: str, usable: tuple[Address, ...]) -> Refusal | None:
    """Return why this host does not listen where an offer says, None if it does.

    The source has chosen from what this host named; its settings may have changed since, or the source means harm.
    """
    ours = {ipaddress.ip_address(address.ip) for address in usable}
    for ip in (plan.target_address, *(there for _, there in plan.more_networks)):
        if not _is_one_of(ip, ours):
            return Refusal(
                code="address-not-allowed",
                host=host,
                setting="migration.networks",
                text=f"{source} would migrate to {ip}, which is no address of {host} that its settings let migration "
                "use",
            )
    return None


def _is_one_of(ip: str, addresses: set[ipaddress.IPv4Address | ipaddress.IPv6Address]) -> bool:
    try:
        return ipaddress.ip_address(ip) in addresses
    except ValueError:  # the wire lets all pass that looks like one
        return False


def admit_storage(settings: HostSettings, host: str, load: Load) -> Refusal | None:
    """Return why no disks may change their location on this host now, None if they may.

    It is no live migration: as with Hyper-V it does not depend on `migration.enabled`.
    """
    return _storage(settings, host, load)


def _storage(settings: HostSettings, host: str, load: Load) -> Refusal | None:
    if load.storage_copies < settings.storage_copies:
        return None
    what = "moves that copy disks"
    return _limit(host, "migration.storage_copies", what, load.storage_copies, settings.storage_copies)


def _allowed(ip: str, sources: tuple[str, ...]) -> bool:
    address = ipaddress.ip_address(ip)
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    return any(address in ipaddress.ip_network(source) for source in sources)


def _switched_off(host: str) -> Refusal:
    return Refusal(
        code="migration-disabled",
        host=host,
        setting="migration.enabled",
        text=f"live migration is switched off on {host} (migration.enabled=false)",
    )


def _limit(host: str, setting: str, what: str, now: int, limit: int) -> Refusal:
    return Refusal(
        code="limit-reached",
        host=host,
        setting=setting,
        text=f"{host} has {now} {what} and allows {limit} ({setting})",
    )
