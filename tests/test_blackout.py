"""How long a blackout would be, what its limit means to a move, and what is learnt of earlier ones."""

import msgspec
import pytest

from kvmhv.core import blackout
from kvmhv.core import effects as ef
from kvmhv.core.facts import PassStarted
from kvmhv.core.source_state import SourceStep, report
from kvmhv.model import MIB, Channels, MoveReport, Outcome, Pass, Plan, Rule, Switchover
from tests.test_source import Driven, at

LIMIT = Rule(max_passes=3, threshold_bytes=1 * MIB, blackout_limit_ms=300)


def one(sent: int, remaining: int, seconds: float) -> Pass:
    rate = sent * MIB / seconds
    return Pass(
        number=1,
        sent_bytes=sent * MIB,
        remaining_bytes=remaining * MIB,
        dirty_bytes_per_second=0.0,
        bytes_per_second=rate,
        seconds=seconds,
    )


def test_what_remains_goes_at_the_rate_of_the_last_passes_and_the_rest_is_what_it_was() -> None:
    passes = [one(100, 40, 10.0), one(40, 10, 0.8)]  # the first one was slower, and is long ago
    assert blackout.predict_ms(LIMIT, passes, 10 * MIB, fixed_ms=70) == pytest.approx(70 + 200)
    assert blackout.predict_ms(LIMIT, passes, 0, fixed_ms=None) == blackout.FIXED_MS
    assert blackout.predict_ms(LIMIT, [], 10 * MIB, fixed_ms=70) is None


def test_one_short_pass_is_not_judged_by_alone() -> None:
    passes = [one(100, 50, 1.9), one(50, 1, 0.9), one(1, 1, 0.1)]
    assert blackout.memory_bytes_per_s(passes, 1.0) == pytest.approx(51 * MIB)
    assert blackout.memory_bytes_per_s(passes[:1], 1.0) == pytest.approx(100 / 1.9 * MIB)


def test_compressed_memory_goes_as_fast_as_it_went_not_as_its_bytes() -> None:
    first = [one(20, 40, 1.0)]
    assert blackout.memory_bytes_per_s(first, 3.0) == pytest.approx(60 * MIB)  # by the sample
    second = [*first, one(10, 5, 1.0)]
    assert blackout.memory_bytes_per_s(second, 3.0) == pytest.approx(40 * MIB)  # by what it did


def test_a_limit_to_the_bandwidth_does_not_hold_in_the_blackout() -> None:
    rule = Rule(bandwidth_bytes_per_s=10 * MIB)
    passes = [one(100, 10, 10.0)]
    assert blackout.predict_ms(rule, passes, 10 * MIB, fixed_ms=0, link_bytes_per_s=100 * MIB) == pytest.approx(100)
    assert blackout.predict_ms(rule, passes, 10 * MIB, fixed_ms=0) == pytest.approx(1000)


# --- what the source does with it


def in_memory(rule: Rule) -> Driven:
    """A source whose first pass, of 60 MiB in a second, is complete."""
    driven = at(SourceStep.MEMORY)
    assert driven.state.plan is not None
    plan = msgspec.structs.replace(driven.state.plan, rule=rule)
    driven.state = msgspec.structs.replace(driven.state, rule=rule, plan=plan, pass_begun=None, passes=())
    return driven.told(begun(1, 0, 0, 60))


def begun(number: int, at_s: float, sent: int, remaining: int, throttle_percent: int = 0) -> PassStarted:
    return PassStarted(
        at_ms=at_s * 1000,
        number=number,
        sent_bytes=sent * MIB,
        remaining_bytes=remaining * MIB,
        total_bytes=64 * MIB,
        dirty_bytes_per_s=0.0,
        throttle_percent=throttle_percent,
    )


def test_a_guest_that_comes_under_the_threshold_is_stopped_as_without_a_limit() -> None:
    driven = in_memory(LIMIT).told(begun(2, 1, 60, 20), begun(3, 1.4, 80, 1))
    assert driven.state.step is SourceStep.STOPPING
    assert driven.state.switchover is not None
    assert driven.state.switchover.reason == "threshold"
    assert driven.state.switchover.predicted_ms == pytest.approx(60 + 1000 / 50)


def test_what_fits_and_does_not_get_smaller_is_stopped_before_the_last_pass() -> None:
    rule = msgspec.structs.replace(LIMIT, max_passes=10)
    driven = in_memory(rule).told(begun(2, 1, 60, 10), begun(3, 1.2, 70, 9))
    assert driven.state.switchover == Switchover(
        reason="blackout-limit",
        pass_number=2,
        remaining_bytes=9 * MIB,
        predicted_ms=pytest.approx(60 + 9000 / 58.33, 0.01),
    )
    shrinking = in_memory(rule).told(begun(2, 1, 60, 10), begun(3, 1.2, 70, 4))
    assert shrinking.state.step is SourceStep.MEMORY


def too_much(rule: Rule) -> Driven:
    return in_memory(rule).told(begun(2, 1, 60, 50), begun(3, 2, 110, 50), begun(4, 3, 160, 50))


def test_a_blackout_that_would_be_too_long_takes_the_move_back_before_the_guest_was_stopped() -> None:
    driven = too_much(LIMIT)
    assert driven.state.step is SourceStep.UNDOING
    assert ef.StopGuest not in driven.kinds()
    failure = driven.state.failure
    assert failure is not None
    assert failure.code == "blackout-over-limit"
    assert "1060 ms" in failure.message
    assert "300 ms" in failure.message


def test_it_is_accepted_where_that_was_asked_for() -> None:
    driven = too_much(msgspec.structs.replace(LIMIT, on_overrun="accept"))
    assert driven.state.step is SourceStep.STOPPING


def test_or_the_guest_is_slowed_down_until_it_fits() -> None:
    rule = msgspec.structs.replace(LIMIT, on_overrun="throttle")
    driven = too_much(rule)
    assert ef.ThrottleGuest(max_percent=88) in driven.effects
    driven.told(begun(5, 4, 210, 40, 20))
    assert ef.ThrottleGuest not in driven.kinds()
    assert driven.state.step is SourceStep.MEMORY
    driven.told(begun(6, 5, 250, 8, 60))
    assert driven.state.step is SourceStep.STOPPING
    assert driven.state.throttle_percent == 60
    assert driven.state.switchover is not None
    assert driven.state.switchover.predicted_ms == pytest.approx(60 + 15 + 8000 / 40)


@pytest.mark.parametrize(("limit_ms", "percent"), [(40, 50), (300, 88), (1000, 96), (60_000, 99)])
def test_no_cpu_sleeps_longer_than_a_quarter_of_the_limit(limit_ms: int, percent: int) -> None:
    assert blackout.throttle_max_percent(Rule(blackout_limit_ms=limit_ms)) == percent
    assert blackout.throttle_sleep_ms(percent) <= limit_ms / 4


def test_but_not_for_ever() -> None:
    driven = too_much(msgspec.structs.replace(LIMIT, on_overrun="throttle"))
    number = 5
    while driven.state.step is SourceStep.MEMORY:
        assert number < 100
        driven.told(begun(number, number * 2.0, number * 50, 50, 99))
        number += 1
    assert driven.state.step is SourceStep.UNDOING
    assert number * 2.0 > driven.state.timeouts.throttled_s
    failure = driven.state.failure
    assert failure is not None
    assert "990 ms for the sleep of a CPU slowed down by 99 %" in failure.message
    assert "slowing it down for 121 s was not enough" in failure.todo
    assert "--on-overrun throttle" not in failure.todo


def test_slowing_down_does_not_help_where_the_fixed_part_alone_is_too_long() -> None:
    driven = in_memory(msgspec.structs.replace(LIMIT, on_overrun="throttle"))
    driven.state = msgspec.structs.replace(driven.state, fixed_blackout_ms=400.0)
    driven.told(begun(2, 1, 60, 1))
    assert driven.state.step is SourceStep.UNDOING
    assert driven.state.failure is not None
    assert "the last moves took so long" in driven.state.failure.todo


def test_a_blackout_that_hangs_is_taken_back_early_where_there_is_a_limit() -> None:
    assert blackout.timeout_s(Rule(), 30.0) == 30.0
    assert blackout.timeout_s(LIMIT, 30.0) == 1.0
    assert blackout.timeout_s(msgspec.structs.replace(LIMIT, blackout_limit_ms=5000), 30.0) == 10.0
    assert blackout.timeout_s(msgspec.structs.replace(LIMIT, blackout_limit_ms=60_000), 30.0) == 30.0


# --- what earlier moves tell


def past(
    blackout_ms: float | None, *, remaining: int = 1, turned_away: bool = False, performance: str = "tcpip"
) -> MoveReport:
    """A move whose memory went at 50 MiB/s."""
    made = at(SourceStep.MEMORY).state.plan
    assert isinstance(made, Plan)
    plan = msgspec.structs.replace(made, rule=Rule(performance=performance), channels=Channels())
    error = blackout.over_limit(LIMIT, "host1", 400.0, MIB, None) if turned_away else None
    return msgspec.structs.replace(
        report(at(SourceStep.MEMORY).state, 0.0),
        plan=plan,
        outcome=Outcome.FAILED if turned_away else Outcome.DONE,
        error=error,
        blackout_ms=blackout_ms,
        passes=(one(50, remaining, 1.0),),
        switchover=Switchover(reason="threshold", pass_number=1, remaining_bytes=remaining * MIB),
    )


def fixed(reports: list[MoveReport]) -> float | None:
    return blackout.fixed_ms(reports, disks=True, performance="tcpip")


def test_the_fixed_part_is_what_blackouts_took_beyond_their_memory() -> None:
    assert fixed([past(120.0, remaining=1)]) == pytest.approx(100)
    assert fixed([past(120.0, remaining=10)]) == 0.0
    assert fixed([]) is None
    assert fixed([past(120.0, performance="compression")]) is None


def test_the_slowest_but_one_in_ten_is_taken_of_the_newest() -> None:
    times = [900.0, *(120.0 + number for number in range(8)), 620.0, 70.0]
    assert fixed([past(ms) for ms in times]) == pytest.approx(107)


def test_each_move_that_was_turned_away_lets_the_next_be_judged_by_a_faster_one() -> None:
    slow = [past(80.0), past(420.0), past(430.0)]
    away = past(None, turned_away=True)
    assert fixed(slow) == pytest.approx(410)
    assert fixed([*slow, away]) == pytest.approx(400)
    assert fixed([*slow, away, away]) == pytest.approx(60)
    assert fixed([*slow, *[away] * 9]) == pytest.approx(60)
    assert fixed([*slow, away, past(420.0)]) == pytest.approx(410)


def test_an_overrun_is_told() -> None:
    late = past(350.0)
    assert blackout.overrun(late, Rule()) is None
    assert blackout.overrun(late, LIMIT) == "the blackout lasted 350 ms, 50 ms over its limit"
    assert blackout.overrun(past(300.0), LIMIT) is None
