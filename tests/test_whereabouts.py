"""Both sides' words about a VM that another program moved, and the one conclusion: every pair of them."""

import itertools

import pytest

from kvmhv.core.whereabouts import Verdict, conclude
from kvmhv.model import Stay, Whereabouts

NOT_RUNNING = (Stay.ABSENT, Stay.OFF, Stay.PAUSED)
EVERY = [
    Whereabouts(stay=stay, busy=busy, ran=ran)
    for stay, busy, ran in itertools.product(Stay, (False, True), (None, False, True))
]


def at(stay: Stay, *, ran: bool | None = None, busy: bool = False) -> Whereabouts:
    return Whereabouts(stay=stay, ran=ran, busy=busy)


@pytest.mark.parametrize(
    ("here", "there", "verdict"),
    [
        (at(Stay.ABSENT), at(Stay.RUNNING), Verdict.MOVED),
        (at(Stay.OFF), at(Stay.RUNNING), Verdict.MOVED),
        (at(Stay.RUNNING), at(Stay.ABSENT), Verdict.STAYS),
        (at(Stay.RUNNING), at(Stay.OFF), Verdict.STAYS),
        (at(Stay.RUNNING), at(Stay.RUNNING), Verdict.TWICE),
        (at(Stay.RUNNING), at(Stay.PAUSED), Verdict.STANDS),
        (at(Stay.RUNNING), at(Stay.ARRIVING, busy=True), Verdict.END_ARRIVAL),
        (at(Stay.PAUSED), at(Stay.ARRIVING, busy=True), Verdict.END_ARRIVAL),
        (at(Stay.PAUSED), at(Stay.RUNNING), Verdict.END_COPY),
        (at(Stay.PAUSED), at(Stay.ABSENT, ran=False), Verdict.RESUME),
        (at(Stay.PAUSED), at(Stay.ABSENT), Verdict.STANDS),
        (at(Stay.PAUSED), at(Stay.ABSENT, ran=True), Verdict.STANDS),
        (at(Stay.PAUSED), at(Stay.PAUSED, ran=False), Verdict.STANDS),
        (at(Stay.ABSENT), at(Stay.PAUSED), Verdict.STANDS),
        (at(Stay.ABSENT), at(Stay.ABSENT), Verdict.GONE),
        (at(Stay.OFF), at(Stay.OFF), Verdict.GONE),
    ],
)
def test_what_follows(here: Whereabouts, there: Whereabouts, verdict: Verdict) -> None:
    assert conclude(here, there) is verdict


@pytest.mark.parametrize("other", EVERY)
def test_a_side_that_is_silent_or_still_at_it_leaves_no_conclusion(other: Whereabouts) -> None:
    for unheard in (None, at(Stay.SILENT), at(Stay.RUNNING, busy=True), at(Stay.PAUSED, busy=True)):
        assert conclude(unheard, other) is Verdict.WAIT
        assert conclude(other, unheard) is Verdict.WAIT
    for moving in (at(Stay.RUNNING, busy=True), at(Stay.PAUSED, busy=True)):
        assert conclude(moving, at(Stay.ARRIVING, busy=True)) is Verdict.WAIT


def test_nothing_is_ever_let_go_or_ended_without_proof() -> None:
    for here, there in itertools.product(EVERY, EVERY):
        verdict = conclude(here, there)
        if verdict is Verdict.RESUME:
            assert there.stay in (Stay.ABSENT, Stay.OFF)
            assert there.ran is False
            assert here.stay is Stay.PAUSED
        if verdict is Verdict.END_ARRIVAL:
            assert there.stay is Stay.ARRIVING
            assert not here.busy
        if verdict in (Verdict.END_COPY, Verdict.MOVED):
            assert there.stay is Stay.RUNNING
            assert here.stay in NOT_RUNNING
        if verdict is Verdict.STAYS:
            assert here.stay is Stay.RUNNING
            assert there.stay in (Stay.ABSENT, Stay.OFF)
        if here.stay is there.stay is Stay.RUNNING and not (here.busy or there.busy):
            assert verdict is Verdict.TWICE
