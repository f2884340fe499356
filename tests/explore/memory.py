"""Every value of the exploration once, by a small number: worlds become short tuples, and each step is taken once."""

from collections.abc import Callable
from typing import Any

import msgspec

from kvmhv.core import recover, source, target
from kvmhv.core.effects import Effect
from kvmhv.core.facts import Fact, Restarted
from kvmhv.core.source_state import SourceState
from kvmhv.core.target_state import TargetState
from kvmhv.messages import Running
from kvmhv.model import ErrorBody, MoveReport, Phase

State = SourceState | TargetState
WORDS = ErrorBody(code="error", message="", todo="")
CANCELLED = ErrorBody(code="cancelled", message="", todo="")


class Interned:
    """Values by number, equal ones by the same number."""

    def __init__(self, key: Callable[[Any], object]) -> None:
        self._key = key
        self._numbers: dict[object, int] = {}
        self._same: dict[Any, int] = {}
        self.values: list[Any] = []

    def number(self, value: object) -> int:
        """Return the value's number."""
        number = self._same.get(value)
        if number is None:
            number = self._same[value] = self._number(self._key(value), value)
        return number

    def _number(self, key: object, value: object) -> int:
        number = self._numbers.get(key)
        if number is None:
            number = self._numbers[key] = len(self.values)
            self.values.append(value)
        return number


class States(Interned):
    """States: they hold inventories, which cannot be hashed."""

    def number(self, value: object) -> int:
        """Return the value's number."""
        return self._number(self._key(value), value)


def _without_words(value: msgspec.Struct) -> msgspec.Struct:
    """The value with errors reduced to what the machines look at, so that worlds that differ in words are one."""
    changes: dict[str, object] = {}
    for name in ("failure", "error"):
        error = getattr(value, name, None)
        if isinstance(error, ErrorBody):
            changes[name] = WORDS if error.code != "cancelled" else CANCELLED
    for name in ("message", "report", "source_report"):
        inner = getattr(value, name, None)
        if isinstance(inner, msgspec.Struct):
            changes[name] = _without_words(inner)
    if hasattr(value, "warnings"):
        changes["warnings"] = ()
    if isinstance(value, MoveReport):
        changes |= {"reason": None, "phases": (), "passes": (), "switchover": None, "blackout_steps": ()}
        changes |= dict.fromkeys(("blackout_ms", "blackout_uncertainty_ms", "network_gap_ms", "plan"))
        changes |= {"memory_bytes": 0, "remaining_bytes": 0, "phase": Phase.SETUP, "progress": 0.0}
    if isinstance(value, SourceState):
        changes |= {"passes": (), "marks": (), "ended_ms": None, "pass_begun": None, "blackout_marks": ()}
        changes |= {"stopped_ms": None, "clock_uncertainty_ms": None, "switchover": None, "memory_sent_bytes": 0}
        changes |= {"progress_ms": None}
    if isinstance(value, TargetState):
        changes |= {"loaded_ms": None, "granted_ms": None}
    if isinstance(value, Running):
        changes |= {"loaded_before_ms": None, "granted_before_ms": None}
    return msgspec.structs.replace(value, **changes) if changes else value


def _encoded(value: msgspec.Struct) -> tuple[str, bytes]:
    return type(value).__name__, msgspec.msgpack.encode(_without_words(value))


def _journalled(state: State) -> tuple[str, bytes]:
    """A state as the journal keeps it; each state that is reached must come back from there as it was."""
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(state), type=type(state)) == state
    return _encoded(state)


class Memory:
    """The machines' steps and recoveries, each computed once."""

    def __init__(self) -> None:
        self.states = States(_journalled)
        self.facts = Interned(_encoded)
        self.effects = Interned(_encoded)
        self.messages = Interned(_encoded)
        self.reports = Interned(_encoded)
        self._steps: dict[tuple[int, int], tuple[int, tuple[int, ...]]] = {}
        self._recoveries: dict[tuple[int, Restarted], tuple[int, tuple[int, ...]]] = {}

    def step(self, state: int, fact: Fact) -> tuple[int, tuple[int, ...]]:
        """Take one step of the machine whose state this is."""
        key = (state, self.facts.number(fact))
        known = self._steps.get(key)
        if known is None:
            before = self.states.values[state]
            machine = source.step if isinstance(before, SourceState) else target.step
            known = self._steps[key] = self._kept(machine(before, fact))
        return known

    def recover(self, state: int, found: Restarted) -> tuple[int, tuple[int, ...]]:
        """Take a journalled state up again."""
        key = (state, found)
        known = self._recoveries.get(key)
        if known is None:
            before = self.states.values[state]
            again = recover.recover_source if isinstance(before, SourceState) else recover.recover_target
            known = self._recoveries[key] = self._kept(again(before, found))
        return known

    def _kept(self, result: tuple[State, list[Effect]]) -> tuple[int, tuple[int, ...]]:
        state, effects = result
        return self.states.number(state), tuple(self.effects.number(effect) for effect in effects)
