"""Moves that do not begin: wrong requests, limits and settings of either host, trust, and what the check finds."""

import pytest

from tests.real.moving import MIB, Answer, Pair, Side, codes_of

pytestmark = pytest.mark.real


def refused(answer: Answer, status: int, code: str, *words: str) -> None:
    """Assert that a move was refused with this code, and that what it says has these words."""
    error = answer.json["error"]
    assert (answer.status, error["code"], error["exit_status"]) == (status, code, status), answer
    assert all(word in f"{error['message']} {error['todo']}" for word in words), answer
    assert f"[{code}]" in answer.said


def test_requests_that_are_wrong(pair: Pair) -> None:
    pair.boot()
    a, b = pair.sides
    moves = a.kvmhv("move", "list")
    refused(a.run("vm", "move", "nobody", "--to", "host2"), 2, "vm-unknown", "nobody")
    refused(b.run("vm", "move", "web01", "--to", "host1"), 2, "vm-unknown", "web01")
    refused(a.run("vm", "move", "web01", "--to", "host1"), 2, "move-to-itself")
    refused(a.run("vm", "move", "web01", "--to", "host9"), 2, "host-unknown", "host9")
    refused(a.run("vm", "check", "web01", "--to", "host9"), 2, "host-unknown", "host9")
    for option in (["--max-passes", "0"], ["--threshold", "much"], ["--bandwidth", "-1"], ["--to", "a b"]):
        assert a.run("vm", "move", "web01", "--to", "host2", *option).status == 2, option
    named = [report["target"] for report in a.kvmhv("move", "list")[len(moves) :]]
    assert set(named) <= {"host9", "a b"}, named
    pair.works(a)


def test_a_second_move_of_the_same_vm(pair: Pair) -> None:
    pair.boot_fast(8 * MIB)
    pid = pair.a.show()["pid"]
    move_id = pair.a.begin(pair.b, "--bandwidth", "1M")
    pair.a.reaches(move_id, "memory")
    refused(pair.a.move(pair.b), 4, "vm-in-move", move_id)
    refused(pair.a.run("vm", "stop", "web01"), 4, "vm-in-move")
    refused(pair.a.run("vm", "remove", "web01", "--yes"), 4, "vm-in-move")
    refused(pair.b.run("vm", "remove", "web01", "--yes"), 4, "vm-in-move")
    refused(pair.b.run("vm", "create", "web01", "--memory", "32M"), 4, "vm-in-move")
    (arriving,) = pair.b.kvmhv("vm", "list")
    assert (arriving["name"], arriving["state"]) == ("web01", "incoming")
    assert pair.a.kvmhv("move", "cancel", move_id)["outcome"] == "cancelled"
    assert pair.a.show()["pid"] == pid
    pair.works(pair.a)


@pytest.mark.parametrize(
    ("side", "setting", "value", "code"),
    [
        ("a", "moves_out", "0", "limit-reached"),
        ("b", "moves_in", "0", "limit-reached"),
        ("a", "storage_copies", "0", "limit-reached"),
        ("b", "storage_copies", "0", "limit-reached"),
        ("a", "enabled", "false", "migration-disabled"),
        ("b", "enabled", "false", "migration-disabled"),
        ("b", "sources", "10.99.0.0/16", "source-not-allowed"),
    ],
)
def test_settings_of_either_host_refuse(pair: Pair, side: str, setting: str, value: str, code: str) -> None:
    pair.create()
    empty, pid = pair.b.left(), pair.a.show()["pid"]
    refuser: Side = getattr(pair, side)
    with refuser.settings(**{setting: value}):
        pair.a.kvmhv("vm", "create", "web02", "--memory", "32M", "--disk", "size=1M", "--start")
        refused(pair.a.move(pair.b, vm="web02"), 4, code, refuser.name, f"migration.{setting}")
        checked = pair.a.run("vm", "check", "web02", "--to", "host2", "--include-storage")
        assert checked.status == 4, checked
        (finding,) = checked.json["findings"]
        assert (finding["id"], finding["host"]) == (code, refuser.name), checked
    assert pair.a.show()["pid"] == pid
    pair.b.is_again(empty)
    pair.moved(pair.a, pair.b)


@pytest.mark.parametrize(("side", "setting"), [("a", "moves_out"), ("b", "moves_in"), ("b", "storage_copies")])
def test_one_move_more_than_the_limit(pair: Pair, side: str, setting: str) -> None:
    pair.boot_fast(8 * MIB)
    pair.a.kvmhv("vm", "create", "web02", "--memory", "32M", "--disk", "size=1M", "--start")
    refuser: Side = getattr(pair, side)
    with refuser.settings(**{setting: "1"}):
        move_id = pair.a.begin(pair.b, "--bandwidth", "1M")
        pair.a.reaches(move_id, "memory")
        refused(pair.a.move(pair.b, vm="web02"), 4, "limit-reached", refuser.name, f"migration.{setting}")
        assert pair.a.kvmhv("move", "cancel", move_id)["outcome"] == "cancelled"
        answer = pair.a.move(pair.b, vm="web02")
        assert answer.status == 0, answer


def test_a_host_that_is_not_trusted_any_more(pair: Pair) -> None:
    pair.boot()
    pair.b.kvmhv("host", "trust", "remove", "host1")
    try:
        log_bytes = pair.b.host.agent_log.stat().st_size
        answer = pair.a.move(pair.b)
        refused(answer, 4, "peer-untrusted", "host2", "trust invite")
        assert "host1" in pair.b.host.agent_log.read_text()[log_bytes:]
        assert pair.a.run("vm", "check", "web01", "--to", "host2").status == 4
    finally:
        pair.a.run("host", "trust", "remove", "host2")
        invitation = pair.a.kvmhv("host", "trust", "invite")
        pair.b.kvmhv("host", "trust", "join", invitation["code"])
    pair.works(pair.a)
    pair.moved(pair.a, pair.b)
    pair.works(pair.b)


def test_all_findings_come_at_once(pair: Pair) -> None:
    total_kib = int(pair.a.sh("grep MemTotal /proc/meminfo").split()[1])
    pair.b.kvmhv("vm", "create", "web01", "--memory", "32M")
    pair.b.sh("sed -i 's/^switches.*/switches = [\"dmz\"]/' /etc/kvmhv/agent.toml")
    pair.b.restart_agent()
    try:
        pair.create("--disk", "size=1M", "--switch", "lan", memory=f"{total_kib // 1024 - 64}M")
        expected = {"name-taken", "memory-short", "switch-missing"}
        for options, more in (
            (["--include-storage", "--storage", "nowhere"], "location-missing"),
            (["--storage", "nowhere"], "disk-local"),
            ([], "disk-local"),
        ):
            checked = pair.a.run("vm", "check", "web01", "--to", "host2", *options)
            assert (checked.status, codes_of(checked.json["findings"])) == (3, expected | {more}), checked
            assert all(finding["todo"] and finding["host"] for finding in checked.json["findings"])
            moved = pair.a.run("vm", "move", "web01", "--to", "host2", *options)
            refused(moved, 3, "incompatible")
            assert codes_of(moved.json["error"]["findings"]) == codes_of(checked.json["findings"])
            dry = pair.a.run("vm", "move", "web01", "--to", "host2", "--dry-run", *options)
            assert (dry.status, dry.json["plan"]) == (3, None), dry
    finally:
        pair.b.sh("sed -i 's/^switches.*/switches = [\"lan\"]/' /etc/kvmhv/agent.toml")
        pair.b.restart_agent()


def test_a_stopped_vm_has_no_memory_to_move(pair: Pair) -> None:
    pair.a.kvmhv("vm", "create", "web01", "--memory", "32M", "--disk", "size=1M")
    checked = pair.a.run("vm", "check", "web01", "--to", "host2", "--include-storage")
    assert (checked.status, codes_of(checked.json["findings"])) == (3, {"vm-not-running"}), checked


def test_a_dry_run_changes_nothing(pair: Pair) -> None:
    pair.boot("--disk", "size=4M")
    before = [side.left() for side in pair.sides]
    moves = pair.a.kvmhv("move", "list")
    answer = pair.a.move(pair.b, "--dry-run", "--bandwidth", "10M")
    assert answer.status == 0, answer
    plan = answer.json["plan"]
    assert (plan["mode"], len(plan["disk_copies"]), plan["target_vm"]["name"]) == ("shared-nothing", 2, "web01")
    assert plan["estimate_seconds"] > 0
    assert [side.left() for side in pair.sides] == before
    assert pair.a.kvmhv("move", "list") == moves
