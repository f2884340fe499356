"""Which network the migration takes."""

import ipaddress

from kvmhv.core import addresses
from kvmhv.model import Address


def at(ip: str, prefix: int = 24, priority: int = 0) -> Address:
    return Address(ip=ip, prefix=prefix, priority=priority)


def test_the_common_subnet_of_highest_priority_is_chosen() -> None:
    source = (at("10.0.0.1", priority=99), at("10.0.1.1"))
    target = (at("10.0.0.2"), at("10.0.1.2", priority=5))
    assert addresses.choose(source, target) == (source[1], target[1])


def test_the_source_decides_between_what_is_equal_at_the_target() -> None:
    source = (at("10.0.0.1"), at("10.0.1.1", priority=3))
    target = (at("10.0.0.2"), at("10.0.1.2"))
    assert addresses.choose(source, target) == (source[1], target[1])


def test_no_common_subnet() -> None:
    assert addresses.choose((at("10.0.0.1"),), (at("10.0.1.1"),)) is None
    assert addresses.choose((), (at("10.0.1.1"),)) is None
    assert addresses.choose((at("fd00::1", 64),), (at("10.0.1.1"),)) is None


def test_ipv6() -> None:
    source, target = (at("fd00::1", 64),), (at("fd00::2", 64),)
    assert addresses.choose(source, target) == (source[0], target[0])


def test_only_listed_networks_are_usable_and_the_best_listing_counts() -> None:
    networks = [(ipaddress.ip_network("10.0.0.0/8"), 1), (ipaddress.ip_network("10.0.0.0/24"), 7)]
    host = (("10.0.0.1", 24), ("192.168.0.1", 24), ("127.0.0.1", 8), ("fe80::1", 64))
    assert addresses.usable(host, networks, use_any=False) == (at("10.0.0.1", priority=7),)
    assert addresses.usable(host, networks, use_any=True) == (
        at("10.0.0.1", priority=7),
        at("192.168.0.1", priority=-1),
    )


def test_further_networks_are_those_that_both_list_each_once_and_the_best_first() -> None:
    source = (at("10.0.0.1"), at("10.0.1.1"), at("10.0.2.1", priority=7), at("10.0.2.9"), at("10.0.3.1"))
    target = (at("10.0.0.2", priority=9), at("10.0.1.2"), at("10.0.2.2"), at("10.0.3.2", priority=-1))
    assert addresses.choose(source, target) == (source[0], target[0])
    assert addresses.further(source, target) == ((source[2], target[2]), (source[1], target[1]))
    assert addresses.further(source, ()) == ()


def test_where_any_network_will_do_all_are_taken() -> None:
    source, target = (tuple(at(f"10.0.{net}.{host}", priority=-1) for net in (0, 1)) for host in (1, 2))
    assert addresses.further(source, target) == ((source[1], target[1]),)
