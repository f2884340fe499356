"""Moves that wait for a slot instead of being refused."""

import json

import pytest

from tests.real.moving import Pair, Side, until
from tests.real.observers import scrape

pytestmark = pytest.mark.real


def queued(side: Side, reason: str) -> int:
    """Return how many moves wait for that, as a scrape has it."""
    start = f'kvmhv_migrations_queued{{reason="{reason}"}}'
    (line,) = (line for line in scrape(side).splitlines() if line.startswith(start))
    return int(float(line.split()[1]))


def test_moves_wait_for_a_slot_in_their_order(pair: Pair) -> None:
    pair.boot()
    a, b = pair.sides
    pid = a.show()["pid"]
    a.kvmhv("vm", "create", "web02", "--memory", "32M", "--start")
    with b.settings(moves_in="0"):
        assert a.run("vm", "move", "web01", "--to", "host9", "--queue", "5").status == 2
        assert a.run("vm", "move", "web01", "--to", "host2", "--queue", "5").status == 3, (
            "found at once, not at its turn"
        )
        first = a.begin(b, "--queue", "5")
        second = a.begin(b, "--queue", "5", vm="web02")
        until("both wait for host2", lambda: queued(a, "target_moves_in") == 2)
        rows = {row["id"]: row for row in a.kvmhv("move", "list")}
        assert [rows[one]["queue"]["place"] for one in (first, second)] == [1, 2]
        assert rows[first]["outcome"] == "running"
        assert "migration.moves_in" in rows[first]["queue"]["reason"]
        assert "queued" in a.host.exec(["kvmhv", "move", "list"]).stdout
        again = a.move(b)
        assert (again.status, again.json["error"]["code"]) == (4, "vm-in-move")
        a.host.agent_kill()
        a.host.agent_wait()
        assert [report["id"] for report in a.kvmhv("move", "list") if report["queue"]] == [first, second]
        assert a.kvmhv("move", "cancel", second)["outcome"] == "cancelled"
        assert (a.show()["pid"], a.show("web02")["state"]) == (pid, "running")
    ended = a.wait(first)
    assert (ended.status, ended.json["outcome"], ended.json["queue"]) == (0, "done", None)
    assert ended.json["queued_seconds"] > 0
    assert queued(a, "target_moves_in") == 0
    kinds = [event["kind"] for event in a.kvmhv("events") if event["move"] == first]
    assert kinds[:2] == ["move-queued", "move-asked"], json.dumps(kinds)
    pair.remember(a)
    pair.works(b)
