"""Progress and estimate: against moves that were recorded fact by fact on real hosts, and by rule."""

import functools
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Union

import msgspec
import pytest

from kvmhv.core import facts, progress, source
from kvmhv.core.effects import Journal, StopGuest
from kvmhv.core.handover import SourceHold
from kvmhv.core.progress import Standing
from kvmhv.core.source_state import SourceState, report
from kvmhv.model import GIB, MIB, MoveReport, Outcome, Pass, Phase, Rule

RECORDED = Path(__file__).parent / "recorded"
RECORDINGS = sorted(path.stem for path in RECORDED.glob("*.json"))
STEADY = [name for name in RECORDINGS if name.startswith(("steady", "busy", "faster"))]
"""Guests that dirty memory at a constant rate."""


class Look(NamedTuple):
    """What a person would have been shown at a moment of a recorded move."""

    at_s: float
    report: MoveReport


def _kinds(kind: type) -> list[type]:
    return [found for below in kind.__subclasses__() for found in (below, *_kinds(below))]


def stepped(name: str) -> Iterator[tuple[facts.Fact, SourceState]]:
    """Step the source machine through the recorded facts: each with the state that it leads to."""
    raw = msgspec.json.decode((RECORDED / f"{name}.json").read_bytes(), type=dict[str, Any])
    state = msgspec.convert(raw["state"], SourceState)
    any_fact = Union[tuple(_kinds(facts.Fact))]  # noqa: UP007 - made at run time
    for fact in msgspec.convert(raw["facts"], list[any_fact]):  # type: ignore[valid-type]
        state, _ = source.step(state, fact)
        yield fact, state


@functools.cache
def replay(name: str) -> tuple[Look, ...]:
    """Return what would have been shown of a recorded move."""
    looks = [Look(fact.at_ms / 1000, report(state, fact.at_ms)) for fact, state in stepped(name)]
    assert looks[-1].report.outcome is Outcome.DONE
    return tuple(looks)


def at(looks: tuple[Look, ...], share: float) -> Look:
    """Return what was shown when this share of the whole time was over."""
    return [look for look in looks if look.at_s <= looks[-1].at_s * share][-1]


@pytest.mark.parametrize("name", STEADY)
def test_at_half_time_the_estimate_is_within_30_percent(name: str) -> None:
    looks = replay(name)
    half = at(looks, 0.5)
    left_s = looks[-1].at_s - half.at_s
    assert half.report.estimate is not None
    assert half.report.estimate.seconds_likely == pytest.approx(left_s, rel=0.3)
    assert half.report.estimate.seconds_low <= left_s <= half.report.estimate.seconds_high


@pytest.mark.parametrize("name", RECORDINGS)
def test_progress_never_goes_backward_and_ends_at_one(name: str) -> None:
    shown = [look.report.progress for look in replay(name)]
    assert all(later >= earlier for earlier, later in itertools.pairwise(shown))
    assert all(share < 1 for share in shown[:-1])
    assert shown[-1] == 1.0


@pytest.mark.parametrize("name", RECORDINGS)
def test_progress_is_a_share_of_the_time(name: str) -> None:
    looks = replay(name)
    assert at(looks, 0.5).report.progress == pytest.approx(0.5, abs=0.25)


@pytest.mark.parametrize("name", RECORDINGS)
def test_the_bounds_enclose_the_likely_figure(name: str) -> None:
    for look in replay(name):
        seen = look.report.estimate
        if seen is not None:
            assert 0 <= seen.seconds_low <= seen.seconds_likely <= seen.seconds_high


def test_the_pass_limit_and_its_blackout_are_said_early() -> None:
    looks = replay("faster_than_the_link")
    after_first_pass = next(look.report for look in looks if look.report.passes)
    early = [look.report.estimate for look in looks if look.report.estimate and look.report.passes]
    assert all(seen.switchover == "pass-limit" and seen.passes == 10 for seen in early)
    assert after_first_pass.estimate is not None
    blackout_ms = looks[-1].report.blackout_ms
    assert blackout_ms is not None
    assert after_first_pass.estimate.blackout_ms == pytest.approx(blackout_ms, rel=0.7)
    # Half-way the link's speed of that moment is known too.
    half = at(looks, 0.5).report.estimate
    assert half is not None
    assert half.blackout_ms == pytest.approx(blackout_ms, rel=0.3)


def test_a_steady_guest_ends_by_the_threshold_and_is_said_to() -> None:
    half = at(replay("steady_4M_at_12M"), 0.5).report.estimate
    assert half is not None
    assert half.switchover == "threshold"
    assert half.blackout_ms < 300


# --- by rule ------------------------------------------------------------------------------------------------------

RULE = Rule(max_passes=10, threshold_bytes=1 * MIB)


def one_pass(number: int, sent_mib: float, left_mib: float, seconds: float) -> Pass:
    return Pass(
        number=number,
        sent_bytes=int(sent_mib * MIB),
        remaining_bytes=int(left_mib * MIB),
        dirty_bytes_per_second=left_mib * MIB / seconds,
        bytes_per_second=sent_mib * MIB / seconds,
        seconds=seconds,
    )


def standing(**changes: Any) -> Standing:
    return Standing(**{"phase": Phase.MEMORY, "rule": RULE, "phase_s": 0.0, "used_bytes": 400 * MIB, **changes})


def test_nothing_is_estimated_while_no_throughput_is_known() -> None:
    assert progress.estimate(standing()) is None
    assert progress.progress(standing(), 0.25, 1.0) == 0.25


def test_the_passes_are_played_through() -> None:
    """100 MiB/s sent, 50 MiB/s dirtied: each pass is half of the one before; 64 MiB: 64, 32, 16, 8, 4, 2, 1."""
    passes = (one_pass(1, 400, 64, 4.0), one_pass(2, 64, 32, 0.64))
    seen = progress.estimate(standing(passes=passes, remaining_bytes=32 * MIB))
    assert seen is not None
    assert (seen.switchover, seen.passes) == ("threshold", 7)
    to_send_s = (32 + 16 + 8 + 4 + 2 + 1) / 100
    fixed_s = progress.BLACKOUT_FIXED_S + progress.CLEANUP_S
    assert seen.seconds_likely == pytest.approx(to_send_s + fixed_s, rel=0.05)
    assert seen.blackout_ms == pytest.approx(progress.BLACKOUT_FIXED_S * 1000 + 10, rel=0.1)


def test_a_guest_that_dirties_faster_ends_by_the_limit_whatever_its_working_set() -> None:
    passes = (one_pass(1, 400, 200, 4.0), one_pass(2, 200, 200, 2.0))
    seen = progress.estimate(standing(passes=passes, remaining_bytes=200 * MIB))
    assert seen is not None
    assert (seen.switchover, seen.passes) == ("pass-limit", 10)
    assert seen.blackout_ms == pytest.approx(2000 + progress.BLACKOUT_FIXED_S * 1000, rel=0.01)
    assert seen.seconds_likely == pytest.approx(8 * 2 + 2, abs=1)


def test_the_first_pass_sends_what_is_used_not_what_is_empty() -> None:
    seen = progress.estimate(standing(remaining_bytes=3000 * MIB, pass_s=2.0, pass_sent_bytes=200 * MIB))
    assert seen is not None
    assert seen.seconds_likely == pytest.approx(2.0 + progress.BLACKOUT_FIXED_S + progress.CLEANUP_S, rel=0.05)


def test_disks_come_first_and_a_limit_holds_until_the_blackout() -> None:
    rule = Rule(max_passes=1, threshold_bytes=0, bandwidth_bytes_per_s=50 * MIB)
    seen = progress.estimate(
        standing(
            phase=Phase.STORAGE,
            rule=rule,
            phase_s=10.0,
            disk_total_bytes=3000 * MIB,
            disk_copied_bytes=1000 * MIB,
            expected_dirty_bytes_per_s=1000.0 * MIB,
            expected_bytes_per_s=100.0 * MIB,
        )
    )
    assert seen is not None
    blackout_s = 200 / 100 + progress.BLACKOUT_FIXED_S  # half of what is used, and no limit
    assert seen.blackout_ms == pytest.approx(blackout_s * 1000)
    assert seen.seconds_likely == pytest.approx(20 + 8 + blackout_s + progress.CLEANUP_S)


def test_until_the_network_is_measured_a_switchover_is_near_if_it_may_be() -> None:
    assert progress.is_near(standing(phase=Phase.MEMORY, used_bytes=1 * GIB))
    assert not progress.is_near(standing(phase=Phase.MEMORY, used_bytes=8 * GIB))
    limited = Rule(bandwidth_bytes_per_s=100 * MIB)
    assert not progress.is_near(standing(phase=Phase.MEMORY, used_bytes=1 * GIB, rule=limited))
    assert not progress.is_near(standing(phase=Phase.MEMORY, used_bytes=1 * GIB, expected_bytes_per_s=100e6))


def test_before_the_first_page_goes_all_of_the_memory_is_left() -> None:
    """The disks are there, and QEMU has not said yet how much memory there is to send."""
    rates = {"expected_bytes_per_s": 10.0 * MIB, "expected_dirty_bytes_per_s": 0.0}
    before = progress.estimate(standing(phase=Phase.MEMORY, used_bytes=100 * MIB, remaining_bytes=0, **rates))
    assert before is not None
    assert before.seconds_likely > 10


def test_a_move_of_disks_alone_goes_on_as_it_went_so_far() -> None:
    assert progress.storage_estimate(400, 100, 0.1) is None, "nothing can be told yet"
    assert progress.storage_estimate(400, 0, 60.0) is None
    seen = progress.storage_estimate(400, 100, 10.0)
    assert seen is not None
    assert seen.seconds_low < seen.seconds_likely < seen.seconds_high
    assert seen.seconds_likely == pytest.approx(30, abs=1)
    grown = progress.storage_estimate(400, 500, 10.0)
    assert grown is not None
    assert grown.seconds_likely < 1


def test_progress_in_the_blackout_is_near_the_end() -> None:
    assert progress.progress(standing(phase=Phase.STATE), 0.3, 0.0) == progress.BLACKOUT_PROGRESS
    assert progress.progress(standing(phase=Phase.CLEANUP), 0.99, 1.0) == 0.99


@pytest.mark.parametrize("name", [one for one in RECORDINGS if not one.startswith("faster")])
def test_the_switchover_is_announced_shortly_before_it_comes(name: str) -> None:
    """While the guest runs, and not long before it stops: until then a power cut of both hosts has a clear end.

    (The other recording's memory is so small that its first pass might have been over before anybody could measure.)
    """
    raw = msgspec.json.decode((RECORDED / f"{name}.json").read_bytes(), type=dict[str, Any])
    state = msgspec.convert(raw["state"], SourceState)
    hold = SourceHold(epoch=state.hold.epoch, announced=False)
    state = msgspec.structs.replace(state, hold=hold, throughput_bytes_per_s=state.throughput_bytes_per_s or 14e6)
    announced_ms = None
    any_fact = Union[tuple(_kinds(facts.Fact))]  # noqa: UP007 - made at run time
    for fact in msgspec.convert(raw["facts"], list[any_fact]):  # type: ignore[valid-type]
        state, effects = source.step(state, fact)
        if announced_ms is None and state.hold.announced:
            announced_ms = fact.at_ms
            assert Journal(durable=True) in effects
            assert StopGuest() not in effects
    assert announced_ms is not None
    assert state.stopped_ms is not None
    assert 0 < state.stopped_ms - announced_ms < 6000
