"""Which network the migration takes: the one of highest priority that both hosts may use."""

import ipaddress

from kvmhv.model import Address

LISTED = 0
"""The least priority of a network that the settings name."""


def choose(source: tuple[Address, ...], target: tuple[Address, ...]) -> tuple[Address, Address] | None:
    """Return (source's, target's) address in a common subnet; the target's priority counts first, then the source's."""
    return next(iter(_pairs(source, target)), None)


def further(source: tuple[Address, ...], target: tuple[Address, ...]) -> tuple[tuple[Address, Address], ...]:
    """Return a pair of addresses in each other network that both hosts list for migration, the best first.

    Networks that are only allowed because any is are none of them, unless the first one is such a network, too.
    """
    pairs = _pairs(source, target)
    if not pairs:
        return ()
    least = min(one.priority for one in pairs[0])
    seen = {_subnet(pairs[0][0])}
    found = []
    for pair in pairs:
        if _subnet(pair[0]) not in seen and min(one.priority for one in pair) >= min(least, LISTED):
            seen.add(_subnet(pair[0]))
            found.append(pair)
    return tuple(found)


def _pairs(source: tuple[Address, ...], target: tuple[Address, ...]) -> list[tuple[Address, Address]]:
    pairs = [(here, there) for there in target for here in source if _subnet(here) == _subnet(there)]
    return sorted(pairs, key=lambda pair: (pair[1].priority, pair[0].priority), reverse=True)


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
