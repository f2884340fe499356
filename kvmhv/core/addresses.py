"""Which network the migration takes: the one of highest priority that both hosts may use."""

import ipaddress

from kvmhv.model import Address


def choose(source: tuple[Address, ...], target: tuple[Address, ...]) -> tuple[Address, Address] | None:
    """Return (source's, target's) address in a common subnet; the target's priority counts first, then the source's."""
    pairs = [(here, there) for there in target for here in source if _subnet(here) == _subnet(there)]
    return max(pairs, key=lambda pair: (pair[1].priority, pair[0].priority), default=None)


def usable(
    host: tuple[tuple[str, int], ...],
    networks: list[tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, int]],
    use_any: bool,
) -> tuple[Address, ...]:
    """Return the host's addresses that its settings let migration use, with their priorities.

    With `use_any` the listed networks still give their priorities; others have the lowest.
    """
    found = []
    for ip, prefix in host:
        address = ipaddress.ip_address(ip)
        if address.is_loopback or address.is_link_local:
            continue
        priorities = [priority for network, priority in networks if address in network]
        if priorities or use_any:
            found.append(Address(ip=ip, prefix=prefix, priority=max(priorities, default=-1)))
    return tuple(found)


def _subnet(address: Address) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    return ipaddress.ip_network(f"{address.ip}/{address.prefix}", strict=False)
