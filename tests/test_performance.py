"""How the memory travels: the choice of channels, the sample of pages, and what QEMU is told."""

import mmap
import os
from pathlib import Path

import msgspec
import pytest

from kvmhv.core import checks, performance, plan
from kvmhv.drivers import host as linux_host
from kvmhv.drivers.qemu import memory, page_sample
from kvmhv.model import MIB, Address, Channels, Inventory, MoveRequest, PageSample, Rule, Severity, Timeouts
from tests.sim import examples

FAST = PageSample(method="zstd", level=1, ratio=3.0, bytes_per_s=400 * MIB)
SMALL = PageSample(method="zstd", level=3, ratio=3.3, bytes_per_s=200 * MIB)
STIFF = PageSample(method="zstd", level=1, ratio=1.0, bytes_per_s=900 * MIB)
VM = examples.vm()


def host(name: str, *samples: PageSample, compressions: tuple[str, ...] = ("zstd", "zlib"), cpus: int = 2) -> Inventory:
    made = examples.inventory(name, octet=1 if name == "host1" else 2, running=VM if samples else None)
    qemu = msgspec.structs.replace(
        made.qemu, compressions=compressions, capabilities=(*made.qemu.capabilities, "multifd")
    )
    facts = made.facts_of_vm and msgspec.structs.replace(made.facts_of_vm, compression=samples)
    return msgspec.structs.replace(made, qemu=qemu, facts_of_vm=facts, cpus=cpus)


def chosen(*samples: PageSample, link: float | None = 50 * MIB, option: str = "compression") -> Channels:
    return performance.choose(option, host("host1", *samples), host("host2"), link)


def test_memory_that_shrinks_is_compressed_on_a_slow_link() -> None:
    assert chosen(FAST) == Channels(count=2, method="zstd", level=1, ratio=3.0)


def test_the_higher_level_is_taken_where_the_link_and_not_the_cpu_is_the_limit() -> None:
    assert chosen(FAST, SMALL, link=50 * MIB).level == 3
    assert chosen(FAST, SMALL, link=250 * MIB).level == 1


@pytest.mark.parametrize(
    ("samples", "link"), [((STIFF,), 50 * MIB), ((FAST,), 2000 * MIB), ((), 50 * MIB), ((STIFF,), None)]
)
def test_what_would_not_be_faster_travels_as_it_is(samples: tuple[PageSample, ...], link: float | None) -> None:
    assert chosen(*samples, link=link) == Channels()


def test_without_a_known_link_the_cheapest_that_shrinks_is_taken() -> None:
    assert chosen(SMALL, FAST, link=None).level == 1


def test_nothing_is_compressed_unasked() -> None:
    assert chosen(FAST, option="tcpip") == Channels()


def test_channels_are_bounded_by_the_cpus_of_both_hosts() -> None:
    counts = [
        performance.choose("compression", host("host1", FAST, cpus=a), host("host2", cpus=b), MIB).count
        for a, b in ((1, 8), (8, 3), (64, 64))
    ]
    assert counts == [2, 3, 4]


def test_a_qemu_that_cannot_is_told_and_the_memory_travels_as_it_is() -> None:
    source, target = host("host1", FAST), host("host2", compressions=())
    request = MoveRequest(vm=VM.name, target="host2", include_storage=True, performance="compression")
    found = [one for one in checks.check(VM, request, source, target) if one.id == "compression-missing"]
    assert [(one.host, one.severity) for one in found] == [("host2", Severity.WARNING)]
    assert performance.choose("compression", source, target, MIB) == Channels()


def test_the_plan_has_the_channels_and_the_capability_that_they_need() -> None:
    request = MoveRequest(vm=VM.name, target="host2", include_storage=True, performance="compression")
    rule = Rule(performance="compression")
    made = plan.make(VM, request, rule, Timeouts(), host("host1", FAST), host("host2"), 50 * MIB, 50 * MIB)
    plain = plan.make(VM, request, Rule(), Timeouts(), host("host1", FAST), host("host2"), 50 * MIB, 50 * MIB)
    assert made.channels.method == "zstd"
    assert set(made.capabilities) - set(plain.capabilities) == {"multifd"}
    assert made.estimate_seconds is not None
    assert plain.estimate_seconds is not None
    assert made.estimate_seconds < plain.estimate_seconds
    assert made.estimate_bytes < plain.estimate_bytes


def test_both_qemus_are_told_the_same() -> None:
    assert memory.channel_parameters(Channels()) == {}
    assert memory.channel_parameters(Channels(count=3, method="zstd", level=1)) == {
        "multifd-channels": 3,
        "multifd-compression": "zstd",
        "multifd-zstd-level": 1,
    }


def test_the_first_pass_of_a_small_guest_is_held_back_and_a_large_ones_only_below_an_eighth() -> None:
    assert memory.measuring_bytes_per_s(32 * MIB) == memory.MEASURING_BYTES_PER_S
    assert memory.measuring_bytes_per_s(800 * MIB) * memory.QEMU_WINDOW_S == pytest.approx(100 * MIB)
    assert memory.measuring_bytes_per_s(800 * MIB, 4.0) * memory.QEMU_WINDOW_S == pytest.approx(25 * MIB)


def test_pages_of_a_running_process_are_compressed_as_qemu_would() -> None:
    memory_bytes = 24 * MIB + 4096
    mapping = _mapping(memory_bytes)
    try:
        assert page_sample.samples(os.getpid(), memory_bytes, ("zlib",)) == ()  # empty pages are not sent
        mapping[:] = (b"kvmhv moves" + os.urandom(5)) * (memory_bytes // 16)
        shrinks = page_sample.samples(os.getpid(), memory_bytes, ("zlib",))
        mapping[:] = os.urandom(memory_bytes)
        stiff = page_sample.samples(os.getpid(), memory_bytes, ("zlib",))
    finally:
        mapping.close()
    assert shrinks[0].ratio > 2
    assert shrinks[0].bytes_per_s > 0
    assert stiff[0].ratio == pytest.approx(1, abs=0.05)


def test_a_process_that_is_gone_gives_no_sample() -> None:
    assert page_sample.samples(2**22 + 1, 24 * MIB, ("zlib", "zstd")) == ()


def _mapping(size_bytes: int) -> mmap.mmap:
    return mmap.mmap(-1, size_bytes)


# --- several networks


def on(*hosts: Inventory, networks: int = 2, mptcp: bool = True) -> list[Inventory]:
    """The same hosts in so many networks."""
    return [
        msgspec.structs.replace(
            one,
            mptcp=mptcp,
            migration_addresses=tuple(Address(ip=f"10.0.{net}.{octet}", prefix=24) for net in range(networks)),
        )
        for octet, one in enumerate(hosts, start=1)
    ]


def test_smb_takes_every_network_that_both_hosts_have() -> None:
    source, target = on(host("host1", FAST), host("host2"), networks=3)
    assert performance.more_networks("smb", source, target) == (("10.0.1.1", "10.0.1.2"), ("10.0.2.1", "10.0.2.2"))
    assert performance.more_networks("tcpip", source, target) == ()
    assert [one.id for one in performance.findings("smb", source, target)] == ["rdma-not-used"]
    made = plan.make(VM, MoveRequest(vm="web01", target="host2"), Rule(performance="smb"), Timeouts(), source, target)
    assert made.more_networks == performance.more_networks("smb", source, target)
    assert made.channels == Channels()


def test_what_smb_lacks_is_told_and_the_move_takes_one_network() -> None:
    for lacking, found in (
        (on(host("host1"), host("host2"), networks=1), {"one-network"}),
        (on(host("host1"), host("host2"), mptcp=False), {"mptcp-missing"}),
    ):
        findings = list(performance.findings("smb", *lacking))
        assert {one.id for one in findings} == {*found, "rdma-not-used"}
        assert {one.severity for one in findings} == {Severity.WARNING}
        assert performance.more_networks("smb", *lacking) == ()


@pytest.mark.parametrize(
    ("devices", "blamed", "text"),
    [
        (((), ()), "host1", "host1 and host2 have no RDMA device"),
        ((("mlx5_0",), ()), "host2", "host2 has no RDMA device"),
        (((), ("mlx5_0",)), "host1", "host1 has no RDMA device"),
        ((("mlx5_0", "mlx5_1"), ("rxe0",)), "host1", "mlx5_0+mlx5_1 on host1, rxe0 on host2"),
    ],
)
def test_smb_says_which_host_has_rdma_and_that_it_is_not_used(
    devices: tuple[tuple[str, ...], tuple[str, ...]], blamed: str, text: str
) -> None:
    both = on(host("host1"), host("host2"))
    pair = [msgspec.structs.replace(one, rdma=has) for one, has in zip(both, devices, strict=True)]
    (found,) = performance.findings("smb", *pair)
    assert (found.id, found.severity, found.host) == ("rdma-not-used", Severity.WARNING, blamed)
    assert text in found.text
    assert "under TLS" in found.text
    assert not list(performance.findings("tcpip", *pair))


def test_rdma_devices_are_those_that_the_kernel_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linux_host, "RDMA_DEVICES", tmp_path / "infiniband")
    assert linux_host.rdma_devices() == ()
    for name in ("rxe0", "mlx5_0"):
        (tmp_path / "infiniband" / name).mkdir(parents=True)
    assert linux_host.rdma_devices() == ("mlx5_0", "rxe0")
