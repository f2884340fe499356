"""Agents die while moves run, in every phase and on either side: the VM always runs exactly once, undamaged, where the
move's report says; and no agent's death is noticed by a VM."""

import time

import pytest

from tests.real.moving import MIB, Pair, Side, until

pytestmark = pytest.mark.real

PHASES = ("setup", "storage", "memory", "state", "cleanup")


def test_vms_do_not_notice_their_agents_death(pair: Pair) -> None:
    pair.boot("--disk", "size=4M", "--switch", "lan")
    pair.moved(pair.a, pair.b)
    before = (pair.b.show(), pair.b.left(), pair.b.kvmhv("move", "list"), pair.b.kvmhv("host", "show")["settings"])
    for _ in range(2):
        pair.b.host.agent_kill()
        pair.b.host.agent_wait()
        after = (pair.b.show(), pair.b.left(), pair.b.kvmhv("move", "list"), pair.b.kvmhv("host", "show")["settings"])
        assert after == before
    pair.works(pair.b)
    pair.moved(pair.b, pair.a)
    pair.works(pair.a)


def wait_for_phase(source: Side, move_id: str, phase: str) -> None:
    """Return when a move is in this phase or beyond it."""
    beyond = PHASES[PHASES.index(phase) :]

    def look() -> bool:
        report = source.report(move_id)
        return report["phase"] in beyond or report["outcome"] != "running"

    deadline = time.monotonic() + 60
    while not look():
        assert time.monotonic() < deadline


@pytest.mark.parametrize("who", ["source", "target", "both"])
def test_agents_die_in_every_phase(pair: Pair, who: str) -> None:
    pair.boot_fast(4 * MIB, "--disk", "size=4M", "--switch", "lan")
    source, target = pair.sides
    for phase in PHASES:
        move_id = source.begin(target, "--max-passes", "2", "--bandwidth", "20M")
        wait_for_phase(source, move_id, phase)
        dying = {"source": [source], "target": [target], "both": [source, target]}[who]
        for side in dying:
            side.host.agent_kill()
        for side in dying:
            side.host.agent_wait()
        for side in pair.sides:
            until(f"the move has ended on {side.name}", side.has_no_move)
        outcome = source.report(move_id)["outcome"]
        assert outcome in ("done", "failed"), (phase, source.report(move_id))
        if outcome == "done":
            pair.remember(source)
            source, target = target, source
        assert source.show()["state"] == "running", phase
        assert not target.has(), phase
        assert [len(side.left()["processes"]) for side in (source, target)] == [1, 0], phase
        pair.works(source)
    pair.moved(source, target)
    pair.works(target)
