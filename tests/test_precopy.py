"""The pre-copy rule on recorded traces, and its properties."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmhv.core import precopy
from kvmhv.core.facts import PassStarted
from kvmhv.model import MIB, Rule, Switchover

RULE = Rule(max_passes=10, threshold_bytes=4 * MIB)


def started(
    number: int, remaining_bytes: int, *, at_ms: float = 0, sent_bytes: int = 0, dirty: float = 0
) -> PassStarted:
    return PassStarted(
        at_ms=at_ms,
        number=number,
        sent_bytes=sent_bytes,
        remaining_bytes=remaining_bytes,
        total_bytes=64 * MIB,
        dirty_bytes_per_s=dirty,
    )


def play(rule: Rule, remaining_mb: list[float]) -> Switchover | None:
    """What the rule says of a trace: `remaining` at the start of pass 1, 2, ..."""
    for number, megabytes in enumerate(remaining_mb, start=1):
        switchover = precopy.decide(rule, started(number, round(megabytes * 1e6)))
        if switchover is not None:
            return switchover
    return None


def test_a_recorded_trace_of_a_20_mb_per_s_dirtier_ends_by_threshold() -> None:
    """400 Mbit/s link, 64 MiB guest: measured remainders at pass 2, 3, ..."""
    switchover = play(RULE, [67.1, 58.7, 25.3, 10.9, 4.5, 1.6])
    assert switchover == Switchover(reason="threshold", pass_number=5, remaining_bytes=1_600_000)


def test_a_guest_that_dirties_faster_than_the_link_ends_at_exactly_ten_complete_passes() -> None:
    assert play(RULE, [67.1] * 10) is None
    assert play(RULE, [67.1] * 30) == Switchover(reason="pass-limit", pass_number=10, remaining_bytes=67_100_000)


def test_both_at_once_is_the_threshold() -> None:
    switchover = play(RULE, [67.1] * 10 + [1.0])
    assert switchover == Switchover(reason="threshold", pass_number=10, remaining_bytes=1_000_000)


@pytest.mark.parametrize(("remaining", "stops"), [(4 * MIB, True), (4 * MIB + 1, False)])
def test_the_threshold_itself_is_small_enough(remaining: int, stops: bool) -> None:
    assert (precopy.decide(RULE, started(2, remaining)) is not None) is stops


def test_the_first_pass_always_runs() -> None:
    assert precopy.decide(Rule(max_passes=1, threshold_bytes=10**12), started(1, 0)) is None


def test_one_pass_is_a_limit_too() -> None:
    switchover = precopy.decide(Rule(max_passes=1, threshold_bytes=0), started(2, 5 * MIB))
    assert switchover == Switchover(reason="pass-limit", pass_number=1, remaining_bytes=5 * MIB)


def test_a_guest_that_qemu_converged_counts_as_threshold() -> None:
    assert precopy.converged(3) == Switchover(reason="threshold", pass_number=3, remaining_bytes=0)
    assert precopy.converged(0).pass_number == 1


def test_a_pass_lies_between_two_starts() -> None:
    one = precopy.complete_pass(
        started(2, 60 * MIB, at_ms=1000, sent_bytes=64 * MIB),
        started(3, 20 * MIB, at_ms=3000, sent_bytes=124 * MIB, dirty=5e6),
    )
    assert (one.number, one.sent_bytes, one.remaining_bytes) == (2, 60 * MIB, 20 * MIB)
    assert (one.seconds, one.bytes_per_second, one.dirty_bytes_per_second) == (2.0, 30 * MIB, 5e6)


def test_a_pass_of_no_time_has_finite_rates() -> None:
    one = precopy.complete_pass(started(1, 10), started(2, 10))
    assert one.seconds > 0
    assert one.bytes_per_second == 0
    assert one.dirty_bytes_per_second == pytest.approx(10 / one.seconds)


@given(
    st.integers(1, 20),
    st.integers(0, 100 * MIB),
    st.lists(st.integers(0, 200 * MIB), min_size=25, max_size=25),
)
def test_it_always_stops_within_the_limit_and_never_without_a_reason(
    max_passes: int, threshold: int, trace: list[int]
) -> None:
    rule = Rule(max_passes=max_passes, threshold_bytes=threshold)
    for number, remaining in enumerate(trace, start=1):
        switchover = precopy.decide(rule, started(number, remaining))
        if switchover is None:
            assert number == 1 or (remaining > threshold and number - 1 < max_passes)
            continue
        assert switchover.pass_number == number - 1 <= max_passes
        assert (switchover.reason == "threshold") == (remaining <= threshold)
        return
    raise AssertionError("it went on for ever")
