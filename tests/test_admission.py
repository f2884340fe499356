"""Who is let in and out, and which setting said no."""

import msgspec
import pytest

from kvmhv.core import admission, plan
from kvmhv.core.admission import Load
from kvmhv.model import Address, HostSettings, MoveRequest, Plan, Refusal, Rule, Timeouts
from tests.sim import examples

ON = HostSettings(enabled=True)
IDLE = Load(moves_out=0, moves_in=0, storage_copies=0)


def into(settings: HostSettings, load: Load, ip: str = "10.0.0.9", *, with_storage: bool = True) -> Refusal | None:
    return admission.admit_in(settings, "host2", load, source="host1", source_ip=ip, with_storage=with_storage)


def out(settings: HostSettings, load: Load, *, with_storage: bool = True) -> Refusal | None:
    return admission.admit_out(settings, "host1", load, with_storage=with_storage)


def setting(refusal: Refusal | None) -> str | None:
    return refusal.setting if refusal else None


def test_an_idle_host_lets_both_ways() -> None:
    assert into(ON, IDLE) is None
    assert out(ON, IDLE) is None


def test_switched_off_is_off_in_both_directions() -> None:
    assert setting(into(HostSettings(), IDLE)) == setting(out(HostSettings(), IDLE)) == "migration.enabled"


def test_the_limits_are_apart() -> None:
    full = Load(moves_out=2, moves_in=2, storage_copies=0)
    assert setting(out(ON, full)) == "migration.moves_out"
    assert setting(into(ON, full)) == "migration.moves_in"
    assert out(ON, msgspec.structs.replace(full, moves_out=1)) is None
    assert into(ON, msgspec.structs.replace(full, moves_in=1)) is None


def test_copies_of_disks_are_counted_only_for_moves_that_copy() -> None:
    copying = Load(moves_out=1, moves_in=1, storage_copies=2)
    assert setting(out(ON, copying)) == setting(into(ON, copying)) == "migration.storage_copies"
    assert out(ON, copying, with_storage=False) is None
    assert into(ON, copying, with_storage=False) is None


@pytest.mark.parametrize(
    ("ip", "allowed"),
    [
        ("10.0.0.9", True),
        ("::ffff:10.0.0.9", True),
        ("10.1.0.9", False),
        ("192.168.0.4", True),
        ("192.168.0.5", False),
        ("fd00::1", False),
    ],
)
def test_only_the_named_sources(ip: str, allowed: bool) -> None:
    settings = msgspec.structs.replace(ON, sources=("10.0.0.0/24", "192.168.0.4"))
    refusal = into(settings, IDLE, ip)
    assert (refusal is None) is allowed
    if refusal is not None:
        assert refusal.code == "source-not-allowed"
        assert ip in refusal.text


@pytest.mark.parametrize(
    ("target", "further", "stranger"),
    [
        ("10.0.1.2", (), None),
        ("10.0.1.2", ("10.0.2.2",), None),
        ("FD00:0::2", (), None),
        ("0.0.0.0", (), "0.0.0.0"),
        ("127.0.0.1", (), "127.0.0.1"),
        ("10.0.3.2", (), "10.0.3.2"),
        ("10.0.1.2", ("10.0.2.2", "10.0.3.2"), "10.0.3.2"),
        ("::", (), "::"),
        ("1.2.3", (), "1.2.3"),
    ],
)
def test_an_offer_names_this_hosts_own_addresses(target: str, further: tuple[str, ...], stranger: str | None) -> None:
    usable = tuple(Address(ip=ip, prefix=24) for ip in ("10.0.1.2", "10.0.2.2", "fd00::2"))
    ways = tuple(("10.0.9.1", ip) for ip in further)
    offered = msgspec.structs.replace(plan_of_a_move(), target_address=target, more_networks=ways)
    refusal = admission.admit_addresses(offered, "host2", "host1", usable)
    assert (refusal is None) is (stranger is None)
    if refusal is not None:
        assert (refusal.code, refusal.setting) == ("address-not-allowed", "migration.networks")
        assert f"to {stranger}," in refusal.text


def plan_of_a_move() -> Plan:
    request = MoveRequest(vm="web01", target="host2", include_storage=True)
    source = examples.inventory("host1", running=examples.vm())
    return plan.make(examples.vm(), request, Rule(), Timeouts(), source, examples.inventory("host2", octet=2))
