"""The benchmark's figures, targets and page: pure parts, from measured moves to what is claimed."""

import json
import socket
import xml.etree.ElementTree as ET
from typing import Any

import pytest

from kvmhv.errors import HostError
from kvmhv.lab.bench import figures, page, raw, run
from kvmhv.lab.bench.cases import BY_HAND, CASES, GUEST_NUMBERS, OURS, Case, Comparison, Guest
from kvmhv.lab.bench.libvirt import domain_xml
from kvmhv.lab.bench.machine import hardware
from kvmhv.lab.bench.meters import damage

GUEST = Guest(256, 20, 64)
CASE = Case(
    "small", "a small <guest>", GUEST, "1gbit", (BY_HAND, OURS),
    (Comparison("kvmhv", "raw", "wall_s", 1.05), Comparison("kvmhv", "raw", "blackout_ms")),
)  # fmt: skip


def moved(wall_s: float, blackout_ms: float = 50.0, **more: Any) -> dict[str, Any]:
    return {
        "wall_s": wall_s, "blackout_ms": blackout_ms, "wire_bytes": 1 << 20, "cpu_s": 0.1, "agent_cpu_s": 0.1,
        "qemu_cpu_s": 4.0, "load": 0.5, "target_start_s": 0.1, "setup_s": 0.2, "cleanup_s": 0.1, "around_s": 0.1,
        "phases": {"setup": 0.2, "memory": 1.0}, "blackout_steps": [{"name": "stopped", "at_ms": 2.0}], **more,
    }  # fmt: skip


def test_a_ratio_is_that_of_the_same_round_and_its_median_decides() -> None:
    rounds = {"kvmhv": [moved(2.0), moved(4.2), moved(3.0)], "raw": [moved(2.0), moved(4.0), moved(1.0)]}
    wall, blackout = figures.compare(CASE, rounds)
    assert (wall["ratio_median"], wall["ratio_min"], wall["ratio_max"]) == (1.05, 1.0, 3.0)
    assert (wall["name"], wall["metric"], wall["against"], wall["target"], wall["met"]) == (
        "small", "wall_s", "raw", 1.05, True,
    )  # fmt: skip
    assert (blackout["target"], blackout["met"]) == (None, None)


@pytest.mark.parametrize(("factor", "at_least", "met"), [(1.06, False, False), (2.1, True, True), (1.9, True, False)])
def test_a_target_is_missed_above_or_below(factor: float, at_least: bool, met: bool) -> None:
    wanted = Comparison("kvmhv", "raw", "wall_s", 2.0 if at_least else 1.05, at_least=at_least)
    case = Case("c", "c", GUEST, "1gbit", (BY_HAND, OURS), (wanted,))
    assert figures.compare(case, {"kvmhv": [moved(factor)], "raw": [moved(1.0)]})[0]["met"] is met


def test_a_way_that_was_not_measured_is_compared_with_nothing() -> None:
    assert figures.compare(CASE, {"kvmhv": [], "raw": [moved(1.0)]}) == []


def test_limits_come_from_the_moves() -> None:
    found = figures.limits({"small": {"kvmhv": [moved(2.0), moved(2.0, agent_cpu_s=0.4)], "raw": [moved(1.0)]}})
    assert [(one["value"], one["met"]) for one in found] == [(pytest.approx(0.0625), False), (pytest.approx(0.2), True)]


def test_every_comparison_is_of_ways_that_are_moved() -> None:
    for case in CASES:
        names = {way.name for way in case.ways}
        assert {name for one in case.comparisons for name in (one.way, one.other)} <= names, case.name
        assert len(names) == len(case.ways)
    assert any(case.in_quick for case in CASES)


def test_each_round_begins_with_another_way_and_has_all() -> None:
    ways = CASES[0].ways
    firsts = [run.rotated(ways, number)[0] for number in range(len(ways))]
    assert set(firsts) == set(ways)
    assert set(run.rotated(ways, 7)) == set(ways)


def test_the_ways_give_the_same_machine_with_a_card_of_its_own() -> None:
    made = [hardware(GUEST, method, "quiet", 7000, "10.0.0.9") for method in GUEST_NUMBERS]
    assert len({one.mac for one in made}) == len({one.append for one in made}) == len(made)
    assert {one.memory_mib for one in made} == {256}
    assert all("kvmhv.dirty=20M kvmhv.dirty_set=64M" in one.append for one in made)


def test_libvirts_definition_is_xml_with_the_command_line_as_it_is() -> None:
    machine = hardware(Guest(256, 0, 64, disk_mib=8), "virsh", "a<b&c", 7000, "10.0.0.9")
    domain = ET.fromstring(domain_xml(machine))
    assert domain.findtext("os/cmdline") == machine.append
    assert domain.find("devices/disk/source").attrib == {"file": machine.disk}  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("told", "wrong"),
    [
        ({}, None),
        ({"boot_id": "b"}, "booted"),
        ({"memory_errors": 1}, "memory"),
        ({"disks": [{"mismatches": 1, "errors": 0}]}, "disks"),
    ],
)
def test_a_guest_that_was_damaged_is_found(told: dict[str, Any], wrong: str | None) -> None:
    found = damage({"boot_id": "a", "memory_errors": 0, "disks": [], **told}, "a")
    assert found is None if wrong is None else found is not None and wrong in found


def test_the_page_needs_nothing_else_and_says_what_is_missed() -> None:
    rounds = {"kvmhv": [moved(2.0)], "raw": [moved(1.0)]}
    result = {
        "kvmhv": "0", "quick": True, "rounds": 1, "started": "2026", "seconds": 1, "failures": [],
        "machine": {"cpus": 2, "load_before": 0.1}, "versions": {"qemu": "10"},
        "comparisons": figures.compare(CASE, rounds), "limits": figures.limits({"small": rounds}),
        "cases": [{"name": "small", "title": CASE.title, "ways": {"kvmhv": "k", "raw": "r"}, "moves": rounds}],
    }  # fmt: skip
    shown = page.page(json.loads(json.dumps(result)))
    assert "http" not in shown
    assert "missed" in shown
    assert "a small &lt;guest&gt;" in shown
    assert "MISSED" in page.text(result)


def test_an_error_of_qemu_is_told_in_its_words(tmp_path: Any) -> None:
    path = str(tmp_path / "qmp")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(1)
        lines = [{"QMP": {}}, {"return": {}}, {"event": "STOP"}, {"error": {"desc": "no such thing"}}]
        listener.settimeout(5)
        client = socket.socket(socket.AF_UNIX)
        client.connect(path)
        server, _ = listener.accept()
        server.sendall(b"".join(json.dumps(line).encode() + b"\n" for line in lines))
        qmp = raw.Qmp.__new__(raw.Qmp)
        qmp.take(client)
        with pytest.raises(HostError, match="no such thing"):
            qmp.execute("stop")
        assert raw.next_event((qmp,), 0.0)[1]["event"] == "STOP"
        server.close()
        client.close()
