"""The one loop keeps its promise of effects when the journal cannot be written: nothing is done until it is."""

import asyncio
from collections.abc import Awaitable, Callable

import msgspec
import pytest

from kvmhv.agent import runner
from kvmhv.core import facts
from kvmhv.core.effects import Cont, Effect, Finish, Journal
from kvmhv.core.source_state import SourceState, report
from kvmhv.drivers.host import HostClock
from kvmhv.errors import HostError
from kvmhv.model import MoveReport, Outcome
from kvmhv.ports import QemuEvent
from tests.sim import examples


class Machine:
    """Journals, acts, and is done."""

    role = "source"

    def __init__(self) -> None:
        self.acted = 0

    def step(self, state: runner.State, fact: facts.Fact) -> tuple[runner.State, list[Effect]]:
        ended = msgspec.structs.replace(self.report(state, 0.0), outcome=Outcome.DONE)
        return state, [Journal(), Cont(vm_id="1", epoch=1), Finish(report=ended)]

    def report(self, state: runner.State, now_ms: float) -> MoveReport:
        assert isinstance(state, SourceState)
        return report(state, now_ms)

    def performer(self, effect: Effect) -> Callable[[], Awaitable[None]]:
        async def act() -> None:
            self.acted += 1

        return act

    async def hear(self, event: QemuEvent) -> None:
        raise AssertionError(event)


class FullDisk:
    """A journal whose disk has room at the fifth attempt, and again none for the end."""

    volatile_id = "v"

    def __init__(self) -> None:
        self.attempts = 0
        self.looks: Callable[[], None] = lambda: None

    def write(self, move_id: str, role: str, state: bytes, *, durable: bool) -> None:
        self._fail()

    def end(self, move_id: str, role: str, report: bytes) -> None:
        self._fail()

    def load(self) -> tuple[tuple[str, str, bytes], ...]:
        return ()

    def reports(self) -> tuple[bytes, ...]:
        return ()

    def _fail(self) -> None:
        self.attempts += 1
        self.looks()
        if self.attempts % 5:
            raise HostError("database", "the agent's database: disk full", "make room")


async def test_a_full_disk_holds_the_move_up_until_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "JOURNAL_AGAIN_S", 0.0)
    machine, journal = Machine(), FullDisk()
    one = runner.Runner(machine, examples.source_state(examples.vm()), HostClock(), journal, 100, 30.0)
    told: list[MoveReport] = []
    seen: list[tuple[int, Outcome]] = []
    one.on_need_operator = told.append
    journal.looks = lambda: seen.append((machine.acted, one.report().outcome))
    ends: list[tuple[int, MoveReport]] = []
    one.on_end = lambda: ends.append((journal.attempts, one.report()))
    one.put(facts.Started(at_ms=1))
    ended = await asyncio.wait_for(one.run([]), 20)
    assert seen[:5] == [(0, Outcome.RUNNING), *[(0, Outcome.NEEDS_OPERATOR)] * 4]
    assert machine.acted == 1
    assert [(shown.outcome, shown.error and shown.error.code) for shown in told] == [
        (Outcome.NEEDS_OPERATOR, "database")
    ] * 2
    assert (ended.outcome, one.report().outcome) == (Outcome.DONE, Outcome.DONE)
    assert ends == [(10, ended)]  # in the moment in which it is kept
    assert [one.effect for one in ended.effects] == ["Journal", "Cont"]
