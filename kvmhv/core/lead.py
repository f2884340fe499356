"""Which of several moves over one network may use all of it for a moment: each blackout is then as short as alone.

What remains when a guest is stopped goes at whatever the network leaves to its move, and behind what the others have
queued there. So a move that is about to stop its guest has the *lead*: the others are held back until its guest runs at
the target. The network is not idle meanwhile, and a move that is held back does not come to its own end, so one
switchover follows the other by itself. Nobody waits for the lead: a guest is stopped when the rule says so, with it or
without. A move has the lead once, and for LEAD_MS at most.
"""

import enum
from collections.abc import Sequence

from kvmhv.core import progress
from kvmhv.core.source_state import SourceState, SourceStep, standing_of
from kvmhv.model import Struct

LEAD_MS = 2000.0
HELD_BYTES_PER_S = 128 * 1024
"""How fast a move that is held back may send: enough to be seen to go on."""


class Stage(enum.IntEnum):
    """How far a move that uses the network is."""

    SENDING = 0
    NEAR = 1
    """Its guest is about to be stopped."""
    STANDING = 2
    """Its guest stands still."""


class Leaving(Struct, frozen=True, kw_only=True):
    """A move whose memory goes over a network, known by its source's address there."""

    move_id: str
    network: str
    stage: Stage


class Lead(Struct, frozen=True, kw_only=True):
    """Who has the lead in a network."""

    network: str
    move_id: str
    until_ms: float


def leaving(state: SourceState, before: Leaving | None, now_ms: float, *, alone: bool) -> Leaving | None:
    """Return how a move uses the network now; None if it does not. `alone`: then it does not matter how near it is.

    A move that was near stays so: it is slower than it thought because it is held back.
    """
    if state.plan is None or state.step not in STAGES:
        return None
    stage = STAGES[state.step]
    if stage is Stage.SENDING and not alone:
        was_near = before is not None and before.stage is Stage.NEAR
        stage = Stage.NEAR if was_near or progress.is_imminent(standing_of(state, now_ms)) else stage
    return Leaving(move_id=state.move_id, network=state.plan.source_address, stage=stage)


def look(
    leads: Sequence[Lead], led: frozenset[str], moves: Sequence[Leaving], now_ms: float
) -> tuple[tuple[Lead, ...], frozenset[str]]:
    """Return who has the lead now, at most one in a network, and who has had it. `led`: who had it before."""
    by_id = {one.move_id: one for one in moves}
    kept = [one for one in leads if one.until_ms > now_ms and one.move_id in by_id]
    taken = {one.network for one in kept}
    led = frozenset(move_id for move_id in led if move_id in by_id)
    for one in sorted(moves, key=lambda move: -move.stage):  # a guest that stands still goes before one that runs
        if one.stage is Stage.SENDING or one.network in taken or one.move_id in led:
            continue
        kept.append(Lead(network=one.network, move_id=one.move_id, until_ms=now_ms + LEAD_MS))
        taken.add(one.network)
        led |= {one.move_id}
    return tuple(kept), led


def held(leads: Sequence[Lead], moves: Sequence[Leaving]) -> frozenset[str]:
    """Return the moves that are held back: those in a network in which another one leads, and whose guests run."""
    leaders = {one.network: one.move_id for one in leads}
    return frozenset(
        one.move_id
        for one in moves
        if one.stage is not Stage.STANDING and leaders.get(one.network, one.move_id) != one.move_id
    )


STAGES = {
    SourceStep.MEMORY: Stage.SENDING,
    SourceStep.STOPPING: Stage.STANDING,
    SourceStep.SWITCHING: Stage.STANDING,
    SourceStep.GRANTED: Stage.STANDING,
}
"""In which steps a move uses the network, or would rather not be disturbed."""
