"""A move that nobody answers any more, at whatever point: its timers alone end it, or tell the operator, in time."""

import math
from typing import Any

import msgspec
import pytest

from kvmhv.core import bounds, facts, source, target
from kvmhv.core.effects import ClearTimer, NeedOperator, SetTimer
from kvmhv.messages import Offer
from kvmhv.model import ErrorBody, Outcome, Timeouts
from tests.fuzz.test_fuzz_wire import STRAIGHT_AT_SOURCE, STRAIGHT_AT_TARGET
from tests.sim import examples
from tests.sim.examples import TIGHT
from tests.test_wire import MESSAGES

LOST = facts.PeerLost(at_ms=1, error=ErrorBody(code="peer-lost", message="", todo=""))
FLAPS_EVERY_S = 0.2
OFFER = next(message for message in MESSAGES if isinstance(message, Offer))


class Alone:
    """One side, its timers, and a clock that only they move on."""

    def __init__(self, machine: Any, state: Any) -> None:
        self.machine, self.state = machine, state
        self.now_s = 0.0
        self.timers: dict[str, float] = {}
        self.told = False

    def hear(self, fact: facts.Fact) -> None:
        self.state, effects = self.machine.step(self.state, fact)
        for effect in effects:
            if isinstance(effect, SetTimer):
                self.timers[effect.name] = self.now_s + effect.after_s
            elif isinstance(effect, ClearTimer):
                self.timers.pop(effect.name, None)
            elif isinstance(effect, NeedOperator):
                self.told = True

    def to_the_end(self) -> None:
        for _ in range(100):
            if self.told or str(self.state.step) == "ended":
                return
            assert self.timers, f"it waits in {self.state.step} without a bound"
            name = min(self.timers, key=self.timers.__getitem__)
            self.now_s = self.timers.pop(name)
            self.hear(facts.TimerFired(at_ms=self.now_s * 1000, name=name))
        raise AssertionError("it goes on and on")

    def in_a_network_that_flaps(self, again: tuple[facts.Fact, ...]) -> None:
        """The connection comes and goes, and what the other side says at each beginning does not help."""
        while not (self.told or str(self.state.step) == "ended"):
            self.now_s += FLAPS_EVERY_S
            assert self.now_s <= bounds.move_s(TIGHT, 0.0), f"it waits in {self.state.step} for ever"
            for fact in (LOST, facts.PeerConnected(at_ms=self.now_s * 1000), *again):
                self.hear(fact)
            for name in [name for name, at_s in self.timers.items() if at_s <= self.now_s]:
                if self.timers.get(name, math.inf) <= self.now_s:
                    del self.timers[name]
                    self.hear(facts.TimerFired(at_ms=self.now_s * 1000, name=name))


def _alone(role: str, timeouts: Timeouts) -> Alone:
    left = examples.source_state(examples.vm(), timeouts=timeouts)
    plan = msgspec.structs.replace(OFFER.plan, timeouts=timeouts)
    offer = msgspec.structs.replace(OFFER, plan=plan)
    return Alone(source, left) if role == "source" else Alone(target, examples.target_state(left, offer))


LIVES = {"source": STRAIGHT_AT_SOURCE, "target": STRAIGHT_AT_TARGET}
POINTS = [(role, count) for role, life in LIVES.items() for count in range(2, len(life) + 1)]


@pytest.mark.parametrize("lost", [False, True])
@pytest.mark.parametrize(("role", "count"), POINTS)
def test_silence_ends_it(role: str, count: int, lost: bool) -> None:
    side = _alone(role, Timeouts())
    for fact in LIVES[role][:count]:
        side.hear(fact)
    if lost:
        side.hear(LOST)
    side.to_the_end()
    assert side.now_s <= bounds.move_s(Timeouts(), 0.0)
    if side.told:
        assert side.state.outcome in (Outcome.NEEDS_OPERATOR, Outcome.FAILED, Outcome.RUNNING)


@pytest.mark.parametrize(("role", "count"), POINTS)
def test_a_network_that_flaps_ends_it(role: str, count: int) -> None:
    side = _alone(role, TIGHT)
    for fact in LIVES[role][:count]:
        side.hear(fact)
    heard = [fact for fact in LIVES[role][:count] if isinstance(fact, facts.Received)]
    side.in_a_network_that_flaps(tuple(heard[-1:]))


def test_the_bound_grows_with_each_of_its_parts() -> None:
    """So that a wait that the configuration knows is never left out."""
    least = bounds.move_s(Timeouts(), 0.0)
    for name in ("answer_s", "prepare_s", "storage_s", "memory_s", "switchover_s", "grant_s", "reconnect_s", "undo_s"):
        assert bounds.move_s(Timeouts(**{name: getattr(Timeouts(), name) + 1.0}), 0.0) > least, name
    assert bounds.move_s(Timeouts(), 1.0) == least + 1.0
