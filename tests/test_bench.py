"""The benchmark's figures, targets and page: pure parts, from measured moves to what is claimed."""

import json
import socket
import xml.etree.ElementTree as ET
from typing import Any

import pytest

from kvmhv.errors import HostError
from kvmhv.lab.bench import crowd, figures, page, raw
from kvmhv.lab.bench.cases import BY_HAND, CASES, GUEST_NUMBERS, OURS, Case, Comparison, Guest
from kvmhv.lab.bench.libvirt import domain_xml
from kvmhv.lab.bench.machine import hardware
from kvmhv.lab.bench.meters import damage
from kvmhv.lab.bench.pace import Pace

GUEST = Guest(256, 20, 64)
CASE = Case(
    "small", "a small <guest>", GUEST, "1gbit", (BY_HAND, OURS),
    (Comparison("kvmhv", "raw", "wall_s", 1.05), Comparison("kvmhv", "raw", "blackout_ms")),
)  # fmt: skip


def moved(wall_s: float, number: int = 0, **more: Any) -> dict[str, Any]:
    return {
        "round": number, "wall_s": wall_s, "blackout_ms": 50.0, "network_gap_ms": 60.0, "qemu_s": 0.9 * wall_s,
        "wire_bytes": 1 << 20, "cpu_s": 0.1, "agent_cpu_s": 0.1, "qemu_cpu_s": 4.0, "load": 0.5,
        "target_start_s": 0.1, "setup_s": 0.2, "cleanup_s": 0.1, "around_s": 0.1,
        "phases": {"setup": 0.2, "memory": 1.0}, "blackout_steps": [{"name": "stopped", "at_ms": 2.0}], **more,
    }  # fmt: skip


def test_a_ratio_is_that_of_the_same_round_and_its_median_decides() -> None:
    rounds = {
        "kvmhv": [moved(2.0, 0), moved(4.2, 1), moved(9.0, 2), moved(3.0, 3)],
        "raw": [moved(2.0, 0), moved(4.0, 1), moved(1.0, 3)],
    }
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


def test_each_round_begins_with_another_way_and_has_all_that_a_target_depends_on() -> None:
    case = CASES[0]
    firsts = [case.turns(2 * number)[0] for number in range(len(case.ways))]
    assert set(firsts) == set(case.ways)
    wanted = {way for one in case.comparisons if one.target for way in (one.way, one.other)}
    assert {way.name for way in case.turns(7)} == wanted
    assert case.moves(2) == len(case.ways) + len(wanted)


def test_comparisons_are_against_raw_or_virsh_and_those_of_kvmhv_with_itself_say_so() -> None:
    for case in CASES:
        rounds = {way.name: [{**moved(1.0), "agent_bytes": 1}] for way in case.ways}
        for one in figures.compare(case, rounds):
            method = next(way.method for way in case.ways if way.name == one["compared"][1])
            assert one["against"] == method
            assert one["against"] in ("raw", "virsh", "kvmhv")


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
        "comparisons": figures.compare(CASE, rounds), "own_comparisons": [],
        "limits": figures.limits({"small": rounds}),
        "cases": [{"name": "small", "title": CASE.title, "ways": {"kvmhv": "k", "raw": "r"}, "moves": rounds}],
    }  # fmt: skip
    shown = page.page(json.loads(json.dumps(result)))
    assert "http" not in shown
    assert "missed" in shown
    assert "a small &lt;guest&gt;" in shown
    assert "MISSED by 0.95 (90%)" in page.text(result)
    assert "What is missed, and where the time goes" in shown
    assert "Blackout, from the order to stop: stopped 2 ms" in shown


def test_the_time_that_is_left_follows_what_was_measured() -> None:
    now = [0.0]
    pace = Pace({"a": 60.0, "b": 40.0}, lambda: now[0])
    assert pace.left_s() is None
    pace.begin("a")
    assert pace.left_s() == 100.0
    pace.done(30.0)
    now[0] = 60.0
    assert pace.left_s() == 140.0
    pace.end()
    assert pace.left_s() == 80.0, "what a part that broke left out is not waited for"
    pace.begin("b")
    pace.done(1000.0)
    pace.end()
    assert pace.left_s() == 0.0


def test_a_crowd_is_measured_by_its_time_its_blackouts_and_its_fairness() -> None:
    def ran(at_once: bool, seconds: float, blackouts_ms: tuple[float, float], memory_s: float) -> dict[str, Any]:
        phases = [[{"phase": "memory", "seconds": one}] for one in (memory_s, 1.4 * memory_s)]
        reports = [{"blackout_ms": ms, "phases": one} for ms, one in zip(blackouts_ms, phases, strict=True)]
        return {"at_once": at_once, "seconds": seconds, "reports": reports}

    found = crowd.limits([ran(False, 10.0, (20.0, 60.0), 1.0), ran(True, 9.0, (40.0, 60.0), 4.0)])
    assert [(one["value"], one["met"]) for one in found] == [
        (0.9, True),
        (1.25, True),
        (2.0, False),  # the first guest's, by its own alone
        (pytest.approx(1.4), True),
    ]


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
