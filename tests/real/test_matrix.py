"""The matrix of faults: whatever dies, hangs or is cut off, in whichever phase of a move, the VM's fate is the
promised one (docs/promises.md), it never runs twice, no acknowledged write is lost, and it can be moved again."""

import contextlib
import time
from collections.abc import Iterator

import pytest

from kvmhv.lab.guest_images import GuestImages
from kvmhv.lab.lab import Lab
from tests.real.faults import FAULTS, WRITES_MS, ground
from tests.real.moving import Side, until
from tests.real.promises import promises
from tests.real.rehearsal import held_agents
from tests.real.stage import PHASES, Player, Stage

pytestmark = pytest.mark.real

NAMES, PROMISES = promises()
SETTLED_S = 60.0
OUTCOMES = {
    "stays": "failed",
    "moves": "done",
    "off-source": "failed",
    "off-target": "done",
    "operator": "needs-operator",
}


@pytest.fixture(scope="module")
def held(lab: Lab) -> Iterator[Lab]:
    """Return the lab with agents that can be held."""
    with held_agents(lab):
        yield lab


def test_the_matrix_is_whole() -> None:
    assert PROMISES.keys() == FAULTS.keys()
    assert tuple(PHASES) == NAMES
    assert sum(fate != "-" for fates in PROMISES.values() for fate in fates.values()) >= 60


@pytest.mark.parametrize("fault", FAULTS)
def test_the_promise_is_kept(held: Lab, images: GuestImages, fault: str) -> None:
    fates = {phase: fate for phase, fate in PROMISES[fault].items() if fate != "-"}
    stage = Stage(held, images, fates)
    before = [side.settled() for side in stage.sides]
    with contextlib.closing(stage.witness), ground(stage, fault):
        try:
            stage.enter(WRITES_MS.get(fault, 60))
            stage.set_out()
            FAULTS[fault](stage)
            _judge(stage, fates)
        finally:
            stage.leave()
    for side, empty in zip(stage.sides, before, strict=True):
        side.is_again(empty)


def _judge(stage: Stage, fates: dict[str, str]) -> None:
    """Compare each player's fate with the promise, restart the agents, look again, and move everybody once more."""
    latest_s = time.monotonic() + SETTLED_S  # for all of them: what is wrong with one is wrong with many
    wrong = [f"{player.phase}: {text}" for player in stage.players if (text := _fate(stage, player, fates, latest_s))]
    assert not wrong, "\n".join(wrong)
    seen = [stage.outcomes(player) for player in stage.players]
    for side in stage.sides:
        side.host.agent_kill()
    for side in stage.sides:
        side.host.agent_wait()
    for player, outcomes in zip(stage.players, seen, strict=True):
        until(f"{player.name}: {outcomes} also after a restart", lambda p=player, o=outcomes: stage.outcomes(p) == o)
    for player in stage.players:
        _start_again(stage, player, fates[player.phase])
    _move_again(stage, fates)
    for player in stage.players:
        stage.witness.check(player.id, player.boots)
        home = _other(stage, _home(stage, fates[player.phase]))
        stage.call(home, "POST", f"vms/{player.name}/stop", {"force": True})
        stage.verify_disks(home, player)


def _home(stage: Stage, fate: str) -> Side:
    """Return the host whose VM it is after all."""
    return stage.b if fate in ("moves", "off-target") else stage.a


def _other(stage: Stage, side: Side) -> Side:
    return stage.a if side is stage.b else stage.b


def _fate(stage: Stage, player: Player, fates: dict[str, str], latest_s: float) -> str:
    """Return what is not as it was promised, empty if all is."""
    fate = fates[player.phase]
    home = _home(stage, fate)
    try:
        left_s = max(1.0, latest_s - time.monotonic())
        until(f"{player.name} {fate}", lambda: set(stage.outcomes(player)) == {OUTCOMES[fate]}, left_s)
        if fate == "operator":
            assert stage.state(home, player) != "running"
            # Who has seen it run there must not choose the source: what it did there would be undone.
            chosen = stage.resolve(stage.a, player, "target" if player.phase == "runs" else "source")
            fates[player.phase] = {"target": "off-target", "source": "stays", "restart": "off-source"}[chosen]
            return _fate(stage, player, fates, latest_s)
        states = stage.state(home, player), stage.state(_other(stage, home), player)
        assert states == ("crashed" if fate.startswith("off") else "running", "absent"), states
        assert stage.copies(player) == ([] if fate.startswith("off") else [home.name])
        assert fate.startswith("off") or stage.runs(home, player), f"silent on {home.name}"
        stage.witness.check(player.id, 1)
    except AssertionError as error:
        return f"promised {fate}, but {error}; the agents say {stage.outcomes(player)}"
    return ""


def _start_again(stage: Stage, player: Player, fate: str) -> None:
    if fate.startswith("off"):
        home = _home(stage, fate)
        stage.verify_disks(home, player)
        stage.call(home, "POST", f"vms/{player.name}/start")
        player.boots += 1
        assert stage.runs(home, player)


def _move_again(stage: Stage, fates: dict[str, str]) -> None:
    for player in stage.players:
        home = _home(stage, fates[player.phase])
        stage.begin(player, home, _other(stage, home), slow=False)
    for player in stage.players:
        until(f"{player.name} has moved again", lambda p=player: set(stage.outcomes(p)) == {"done"})
        assert stage.runs(_other(stage, _home(stage, fates[player.phase])), player), player
