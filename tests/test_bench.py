"""The benchmark's figures, targets and page: pure parts, from measured moves to what is claimed."""

import json
import socket
import xml.etree.ElementTree as ET
from typing import Any

import pytest

from kvmhv.errors import HostError
from kvmhv.lab.bench import crowd, effects, figures, limited, page, plots, raw
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
        "phases": {"setup": 0.2, "memory": 1.0}, "blackout_steps": [{"name": "stopped", "at_ms": 2.0}],
        "before_s": 0.1, "after_s": 0.05, "effects": [], "passes_s": [0.9], "reported_blackout_ms": 30.0, **more,
    }  # fmt: skip


def limited_move(blackout_ms: float | None, seen_ms: float = 90.0, **more: Any) -> dict[str, Any]:
    """A move with a limit of 300 ms, as it was measured."""
    expected_ms = more.get("expected_ms", 100.0)
    report = {
        "outcome": "failed" if blackout_ms is None else "done", "blackout_ms": blackout_ms,
        "error": {"code": more["code"]} if "code" in more else None, "throttle_percent": more.get("slowed", 0),
        "switchover": None if blackout_ms is None else {"predicted_ms": expected_ms},
    }  # fmt: skip
    return {
        "dirty_mib_per_s": 10, "rate": "1gbit", "on_overrun": "cancel", "seen_ms": seen_ms, "report": report,
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
        "limits": figures.limits({"small": rounds}), "cli_start_s": 0.1,
        "extras": {"blackout-limit": [limited_move(80.0), limited_move(None, code="blackout-over-limit")]},
        "cases": [{"name": "small", "title": CASE.title, "ways": {"kvmhv": "k", "raw": "r"}, "moves": rounds}],
    }  # fmt: skip
    shown = page.page(json.loads(json.dumps(result)))
    assert "http" not in shown
    assert "missed" in shown
    assert "a small &lt;guest&gt;" in shown
    assert "MISSED by 0.95 (90%)" in page.text(result)
    assert "What is missed, and where the time goes" in shown
    assert "Blackout, from the order to stop: stopped 2 ms" in shown
    assert "By effect, the round with the middle ratio (round 1)" in shown
    assert "<td>blackout-over-limit<" in shown


def test_the_parts_of_a_command_come_from_the_records_of_both_hosts_and_add_up_to_all_of_it() -> None:
    def took(effect: str, at_ms: float, took_ms: float) -> dict[str, Any]:
        return {"effect": effect, "at_ms": at_ms, "took_ms": took_ms}

    source = [
        took("connect", 0, 10), took("await Answer", 10, 20), took("SendFiles", 40, 50), took("await Ready", 35, 165),
        took("Journal", 92, 5), took("SendMemory", 200, 1200), took("await Owned", 1330, 40),
        took("EndCopy", 1330, 30), took("RemoveCopy", 1370, 10),
    ]  # fmt: skip
    phases = {"setup": 0.2, "memory": 1.1, "state": 0.03, "cleanup": 0.06}
    target = [took("Prepare", 0, 90), took("Adopt", 1, 10)]
    move = moved(1.6, effects=source, target_effects=target, phases=phases, passes_s=[0.9, 0.15])
    parts = effects.of_command(move, 0.08)
    assert parts == pytest.approx({
        effects.INTERPRETER: 80, effects.REQUEST: 20, effects.CONNECTION: 10, effects.CHECK: 20, effects.FILES: 50,
        effects.JOURNAL: 5, effects.OFFER: 165 - 50 - 5 - 90, effects.TARGET_QEMU: 90, effects.BEFOREHAND: 50,
        effects.FIRST: 900, effects.FURTHER: 150, effects.SWITCHOVER: 30, effects.SOURCE_QEMU: 30,
        effects.RECORDS: 20, effects.ANSWER: 50, effects.REST: 5 + 10 + 60,
    })  # fmt: skip
    assert sum(parts.values()) == pytest.approx(1600)


def test_what_is_known_by_hand_has_the_same_words_and_of_virsh_the_job_is_known() -> None:
    by_hand = effects.of_other(moved(1.0, steps={effects.FIRST: 0.7, effects.SWITCHOVER: 0.1}))
    assert by_hand == pytest.approx({effects.FIRST: 700, effects.SWITCHOVER: 100, effects.REST: 200})
    assert effects.of_other(moved(1.0)) == pytest.approx({effects.JOB: 900, effects.AROUND: 100})
    mine = {effects.CHECK: 20.0, effects.FIRST: 900.0, effects.SWITCHOVER: 70.0, effects.REST: 5.0}
    shown = plots.by_effect(mine, by_hand, ("mine", "<theirs>"), 3)
    assert "&lt;theirs&gt;" in shown
    for part, cells in (
        (effects.CHECK, "<td class=n>20<td class=n><td class=n>+20"),
        (effects.FIRST, "<td class=n>900<td class=n>700<td class=n>+200"),
        (effects.REST, "<td class=n>5<td class=n>200<td class=n>-195"),
    ):
        assert f"<td>{part}{cells}" in shown, shown
    assert "<th>all of it<th class=n>995<th class=n>1000<th class=n>-5" in shown
    unlike = plots.by_effect(mine, effects.of_other(moved(1.0)), ("mine", "virsh"), 3)
    assert "<td class=n>900<td class=n><td class=n><td>" in unlike, "virsh's job is none of kvmhv's parts"


def test_the_parts_of_a_blackout_add_up_to_what_the_guest_saw() -> None:
    steps = [{"name": name, "at_ms": at} for name, at in (("stopped", 5.0), ("running", 30.0), ("first-frame", 60.0))]
    parts = effects.of_blackout(moved(1.0, blackout_ms=100.0, reported_blackout_ms=30.0, blackout_steps=steps))
    assert list(parts.values()) == pytest.approx([5.0, 25.0, 70.0])


def test_the_middle_round_is_the_one_that_the_median_is_of() -> None:
    rounds = {
        "kvmhv": [moved(3.0, 0), moved(1.1, 1), moved(2.0, 2)],
        "raw": [moved(1.0, 0), moved(1.0, 1), moved(1.0, 2)],
    }
    pair = effects.middle_round(rounds, "kvmhv", "raw", "wall_s")
    assert pair is not None
    assert [one["round"] for one in pair] == [2, 2]
    assert effects.middle_round({"kvmhv": [moved(1.0)], "raw": []}, "kvmhv", "raw", "wall_s") is None


def test_a_blackout_that_was_too_long_counts_unless_that_was_expected_before_the_stop() -> None:
    def found(*moves: dict[str, Any]) -> list[tuple[float, bool]]:
        return [(one["value"], one["met"]) for one in limited.limits(list(moves))]

    away = limited_move(None, code="blackout-over-limit")
    assert found(limited_move(359.0, 360.0), away) == [(0.0, True), (0.0, True)]
    assert found(limited_move(361.0), away) == [(1.0, False), (0.0, True)]
    assert found(limited_move(361.0, 400.0, expected_ms=350.0)) == [(0.0, True), (0.0, True)]
    assert found(limited_move(200.0, 400.0)) == [(0.0, True), (1.0, False)]
    assert found(limited_move(None, 500.0, code="switchover-timeout")) == [(0.0, True), (1.0, False)]
    assert found(limited_move(200.0, 400.0, slowed=60)) == [(0.0, True), (0.0, True)], "it sleeps to be slow"
    note = limited.limits([limited_move(250.0), away, limited_move(90.0, slowed=20)])[0]["note"]
    assert note == "2 moved (longest blackout 250 ms), 1 of them slowed down; 1 turned away; 0 failed otherwise"
    assert "slowed down by 20 %, blackout 90 ms (100 ms expected)" in limited.told(limited_move(90.0, slowed=20))


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
