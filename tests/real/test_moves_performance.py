"""Performance options: memory that shrinks travels compressed and arrives as it was; other memory travels as it is."""

import json
from contextlib import ExitStack
from typing import Any

import pytest

from kvmhv.core.lead import HELD_BYTES_PER_S
from kvmhv.drivers.qemu.memory import UNLIMITED_BYTES_PER_S
from tests.real.moving import MIB, Pair, Report, Side, codes_of, until

pytestmark = pytest.mark.real

SET = 64 * MIB
ASK = "import socket; print(socket.create_connection(('{}', 8), 5).makefile().read())"


def channels(report: Report) -> tuple[int, str]:
    chosen = report["plan"]["channels"]
    return chosen["count"], chosen["method"]


def compress_both(pair: Pair) -> list[Report]:
    ways = [(pair.a, pair.b), (pair.b, pair.a)]
    return [pair.moved(source, target, "--performance", "compression") for source, target in ways]


def boot_linux(pair: Pair, ip: str) -> None:
    """Start the Linux guest with a working set that can be compressed, and wait until all of it is written."""
    pair.a.sh("mkdir -p /srv")
    for file in (pair.images.vmlinuz, pair.images.initrd):
        pair.a.file(f"/srv/{file.name}").write_bytes(file.read_bytes())
    work = f"kvmhv.ip={ip}/24 kvmhv.dirty=4M kvmhv.dirty_set=64M kvmhv.dirty_kind=compressible"
    files = ("--kernel", "/srv/vmlinuz", "--initrd", "/srv/initrd", "--append", f"{pair.images.cmdline} {work}")
    pair.a.kvmhv("image", "import", "linux", *files)
    pair.create("--image", "linux", "--switch", "lan", memory="192M")
    until("the guest works", lambda: (status(pair, ip) or {}).get("dirtied_bytes"))


def status(pair: Pair, ip: str) -> Any:
    """Return what the guest says of itself, None while it says nothing."""
    done = pair.lab.host("client").exec(["python3", "-c", ASK.format(ip)], check=False)
    return json.loads(done.stdout) if done.stdout.strip() else None


def test_memory_that_shrinks_travels_compressed_and_arrives_as_it_was(pair: Pair) -> None:
    ip = f"{pair.lab.host('client').plan.addresses['lan'].rsplit('.', 1)[0]}.51"
    boot_linux(pair, ip)
    with ExitStack() as slow:
        for side in pair.sides:
            slow.enter_context(side.slow_network("200mbit"))
        plain = pair.moved(pair.a, pair.b, "--performance", "tcpip")
        assert channels(plain) == (0, "none")
        pair.moved(pair.b, pair.a)
        for report in compress_both(pair):
            count, method = channels(report)
            assert (count >= 2, method) == (True, "zstd"), report["plan"]
            assert report["memory_bytes"] < plain["memory_bytes"] / 2, (report, plain)
            assert report["switchover"]["reason"] == "threshold", report
    before = status(pair, ip)["dirtied_bytes"]
    until("the guest verified all of its working set again", lambda: status(pair, ip)["dirtied_bytes"] > before + SET)
    assert status(pair, ip)["memory_errors"] == 0


def test_memory_that_does_not_shrink_travels_as_it_is(pair: Pair) -> None:
    """The boot-sector guest's pages are pseudo-random: to compress them would only cost."""
    pair.boot(working_set_bytes=16 * MIB, rate_bytes_per_s=2 * MIB, memory="48M")
    for report in compress_both(pair):
        assert channels(report) == (0, "none"), report["plan"]
    pair.works(pair.a)


def test_the_host_setting_decides_where_nothing_is_asked(pair: Pair) -> None:
    pair.boot(working_set_bytes=16 * MIB, rate_bytes_per_s=0, memory="48M")
    with pair.a.settings(performance="compression"):
        assert pair.moved(pair.a, pair.b)["request"]["performance"] == "compression"
    assert pair.moved(pair.b, pair.a)["request"]["performance"] == "tcpip"
    pair.works(pair.a)


def test_of_two_moves_the_one_that_ends_first_has_the_network_and_both_are_right(pair: Pair) -> None:
    """The larger one, on its way meanwhile, is held back while the guest of the smaller one is about to be stopped."""
    pair.a.kvmhv("vm", "create", "web02", "--memory", "32M", "--start")
    pair.boot(working_set_bytes=64 * MIB, rate_bytes_per_s=6 * MIB, memory="96M")
    with ExitStack() as slow:
        for side in pair.sides:
            slow.enter_context(side.slow_network("100mbit"))
            slow.enter_context(side.settings(moves_out="2", moves_in="2"))
        large = pair.a.begin(pair.b)
        pair.a.reaches(large, "memory")
        small = pair.a.begin(pair.b, vm="web02")
        assert [pair.a.wait(move).json["outcome"] for move in (small, large)] == ["done", "done"]
    told = pair.a.file(f"/run/kvmhv/ended/{pair.vm_id}/qmp.log").read_text()
    held, freed = f'"max-bandwidth":{HELD_BYTES_PER_S}', f'"max-bandwidth":{UNLIMITED_BYTES_PER_S}'
    assert held in told
    assert freed in told.rpartition(held)[2]
    pair.remember(pair.a)
    pair.works(pair.b)


def test_a_move_takes_all_networks_at_once_and_leaves_nothing_of_that(pair: Pair) -> None:
    """Both carry a good share; the management network is the second one here."""
    before = [side.sh("ip mptcp endpoint; ip mptcp limits") for side in pair.sides]
    subnets = ",".join(f"{ip.rsplit('.', 1)[0]}.0/24" for ip in list(pair.a.host.plan.addresses.values())[:2])
    pair.boot(working_set_bytes=64 * MIB, rate_bytes_per_s=8 * MIB, memory="96M")
    with ExitStack() as settings:
        for side in pair.sides:
            settings.enter_context(side.settings(networks=subnets))
            for network in ("management", "migration"):
                settings.enter_context(side.slow_network("200mbit", network))
        sent = [sent_bytes(pair.a, network) for network in ("management", "migration")]
        report = pair.moved(pair.a, pair.b, "--performance", "smb")
        sent = [
            sent_bytes(pair.a, network) - had for network, had in zip(("management", "migration"), sent, strict=True)
        ]
    assert len(report["plan"]["more_networks"]) == 1, report["plan"]
    assert "rdma-not-used" in codes_of(report["findings"], "warning"), report["findings"]
    assert min(sent) > sum(sent) / 5, sent
    assert sum(sent) > 64 * MIB, sent
    after = [side.sh("ip mptcp endpoint | grep -v implicit; ip mptcp limits") for side in pair.sides]
    assert after == before
    pair.works(pair.b)


def sent_bytes(side: Side, network: str) -> int:
    return int(side.file(f"/sys/class/net/{network}/statistics/tx_bytes").read_text())
