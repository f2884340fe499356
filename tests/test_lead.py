"""The lead among moves over one network: who has it, who is held back, and that nobody can be held for ever."""

import asyncio
import random

import msgspec
import pytest

from kvmhv.agent.leads import Leads
from kvmhv.core import blackout, lead
from kvmhv.core.lead import LEAD_MS, Lead, Leaving, Stage, held, look
from kvmhv.core.source_state import SourceState, SourceStep
from kvmhv.errors import HostError
from kvmhv.model import Pass, Rule
from tests.test_progress import STEADY, stepped

SENDING, NEAR, STANDING = Stage.SENDING, Stage.NEAR, Stage.STANDING


def move(name: str, stage: Stage, network: str = "10.0.0.1") -> Leaving:
    return Leaving(move_id=name, network=network, stage=stage)


def test_nobody_is_held_back_while_none_is_near() -> None:
    moves = [move("a", SENDING), move("b", SENDING)]
    assert look((), frozenset(), moves, 0.0) == ((), frozenset())
    assert held((), moves) == frozenset()


def test_who_is_near_has_the_network_and_a_guest_that_stands_still_goes_first() -> None:
    moves = [move("a", NEAR), move("b", STANDING), move("c", SENDING), move("d", SENDING, "10.1.0.1")]
    leads, _ = look((), frozenset(), moves, 0.0)
    assert [one.move_id for one in leads] == ["b"]
    assert held(leads, moves) == {"a", "c"}


def test_one_follows_the_other_and_none_has_it_twice() -> None:
    moves = [move("a", NEAR), move("b", NEAR)]
    leads, led = look((), frozenset(), moves, 0.0)
    leads, led = look(leads, led, moves, LEAD_MS)
    assert [one.move_id for one in leads] == ["b"]
    leads, led = look(leads, led, moves, 2 * LEAD_MS)
    assert (leads, held(leads, moves)) == ((), frozenset())
    leads, led = look(leads, led, [*moves, move("c", NEAR)], 2 * LEAD_MS)
    assert [one.move_id for one in leads] == ["c"]


def test_the_end_of_a_move_ends_its_lead() -> None:
    moves = [move("a", STANDING), move("b", NEAR)]
    leads, led = look((), frozenset(), moves, 0.0)
    leads, led = look(leads, led, moves[1:], 1.0)
    assert ([one.move_id for one in leads], led) == (["b"], {"b"})


@pytest.mark.parametrize("seed", range(30))
def test_whatever_moves_do_each_rule_holds(seed: int) -> None:
    chance = random.Random(seed)
    leads: tuple[Lead, ...] = ()
    led: frozenset[str] = frozenset()
    moves: dict[str, Leaving] = {}
    since: dict[str, float] = {}
    now_ms = 0.0
    for number in range(400):
        now_ms += chance.random() * 300
        if chance.random() < 0.2:
            moves[f"m{number}"] = move(f"m{number}", SENDING, chance.choice(["x", "y"]))
        for name in list(moves):
            if chance.random() < 0.2:
                moves[name] = msgspec.structs.replace(moves[name], stage=Stage(min(2, moves[name].stage + 1)))
            elif chance.random() < 0.1:
                del moves[name]
        before = leads
        leads, led = look(leads, led, tuple(moves.values()), now_ms)
        holds = held(leads, tuple(moves.values()))
        assert len({one.network for one in leads}) == len(leads)
        assert all(moves[name].stage is not STANDING for name in holds), "a guest that stands still is not slowed down"
        assert not holds & {one.move_id for one in leads}
        for one in leads:
            since.setdefault(one.move_id, now_ms)
            assert now_ms - since[one.move_id] < LEAD_MS
            assert one in before or one.until_ms == now_ms + LEAD_MS


def near_before_stop_ms(name: str) -> float | None:
    """Return how long before its guest's stop a recorded move was near; None: it never was."""
    near_ms = None
    before: Leaving | None = None
    for fact, state in stepped(name):
        before = lead.leaving(state, before, fact.at_ms, alone=False)
        if before is not None and before.stage is NEAR and near_ms is None:
            near_ms = fact.at_ms
        if state.step is SourceStep.STOPPING:
            return None if near_ms is None else fact.at_ms - near_ms
    raise AssertionError(f"{name} was never stopped")


def test_recorded_moves_are_near_before_their_guests_are_stopped_and_not_long_before() -> None:
    found = [near_before_stop_ms(name) for name in STEADY]
    near = [one for one in found if one is not None]
    assert len(near) >= len(STEADY) - 1, "what is seen too late has the lead from its guest's stop on"
    assert all(0 <= one < LEAD_MS for one in near), found


def test_a_prediction_is_not_made_worse_by_being_held_back() -> None:
    fast, slow = (
        Pass(number=n, sent_bytes=1 << 20, remaining_bytes=1 << 20, dirty_bytes_per_second=0.0, bytes_per_second=rate,
             seconds=1.0) for n, rate in ((1, 50e6), (2, 1e5))
    )  # fmt: skip
    passes = (fast, msgspec.structs.replace(slow, seconds=10.0))
    alone, waited = (
        blackout.predict_ms(Rule(), passes, 1 << 20, fixed_ms=50.0, held_back=held_back) for held_back in (False, True)
    )
    assert alone == pytest.approx(10050.0)
    assert waited == pytest.approx(50 + (1 << 20) / 50e6 * 1000)


class Qemus:
    """What VMs' QEMUs were told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, int | None]] = []
        self.fails = False
        self.sends = True

    async def hold(self, vm_id: str, bytes_per_s: int | None) -> bool:
        self.told.append((vm_id, bytes_per_s))
        if self.fails:
            raise HostError("qemu-hangs", "no answer")
        return self.sends


class Still:
    def monotonic_ms(self) -> float:
        return 0.0


def leaves(name: str, step: SourceStep) -> SourceState:
    state = next(state for _, state in stepped(STEADY[0]) if state.plan is not None)
    vm = msgspec.structs.replace(state.vm, id=f"vm-{name}")
    return msgspec.structs.replace(state, move_id=name, vm=vm, step=step)


async def told(leads: Leads, qemus: Qemus, *states: SourceState) -> list[tuple[str, int | None]]:
    """Return what the QEMUs were told after these steps."""
    qemus.told.clear()
    for state in states:
        leads.note(state)
    for _ in range(5):
        await asyncio.sleep(0)
    return list(qemus.told)


async def test_the_others_are_held_back_and_let_go_when_the_guest_runs_at_the_target() -> None:
    qemus = Qemus()
    leads = Leads(qemus, Still())  # type: ignore[arg-type]
    heard: list[str] = []
    leads.on_held = heard.append
    memory, standing = leaves("a", SourceStep.MEMORY), leaves("b", SourceStep.STOPPING)
    assert await told(leads, qemus, memory) == []
    assert await told(leads, qemus, standing) == [("vm-a", lead.HELD_BYTES_PER_S)]
    assert heard == ["a"]
    assert await told(leads, qemus, memory, standing) == []
    assert await told(leads, qemus, leaves("b", SourceStep.CLEANUP)) == [("vm-a", None)]
    assert await told(leads, qemus, leaves("b", SourceStep.ENDED), memory) == []


async def test_a_move_that_cannot_be_held_is_tried_again_and_harms_nobody() -> None:
    qemus = Qemus()
    leads = Leads(qemus, Still())  # type: ignore[arg-type]
    memory, standing = leaves("a", SourceStep.MEMORY), leaves("b", SourceStep.SWITCHING)
    qemus.fails = True
    assert await told(leads, qemus, memory, standing) == [("vm-a", lead.HELD_BYTES_PER_S)]
    qemus.fails, qemus.sends = False, False
    assert await told(leads, qemus, memory) == [("vm-a", lead.HELD_BYTES_PER_S)]
    leads.forget("b")
    assert await told(leads, qemus, memory) == []
    await leads.close()
