"""When the guest is stopped: at the threshold, or after so many complete passes, whichever comes first."""

from contextlib import ExitStack

import pytest

from tests.real.moving import MIB, Pair, Report

pytestmark = pytest.mark.real

RUNS = 2
"""There and back so often: the rule holds every time."""


def switchover(report: Report) -> tuple[str, int]:
    return report["switchover"]["reason"], report["switchover"]["pass"]


def numbers(report: Report) -> list[int]:
    return [one["number"] for one in report["passes"]]


def there_and_back(pair: Pair, *options: str) -> list[Report]:
    ways = [(pair.a, pair.b), (pair.b, pair.a)] * RUNS
    return [pair.moved(source, target, *options) for source, target in ways]


def test_a_guest_that_dirties_faster_than_the_network_is_stopped_after_ten_passes(pair: Pair) -> None:
    pair.boot_fast(8 * MIB)
    with ExitStack() as slow:
        for side in pair.sides:
            slow.enter_context(side.slow_network("200mbit"))
        for report in there_and_back(pair):
            assert switchover(report) == ("pass-limit", 10), report
            assert numbers(report) == list(range(1, 11)), report
            assert all(one["remaining_bytes"] > MIB for one in report["passes"]), report
    pair.works(pair.a)


@pytest.mark.parametrize("passes", [1, 3])
def test_the_limit_of_passes_is_the_operators_to_choose(pair: Pair, passes: int) -> None:
    pair.boot_fast(8 * MIB)
    for report in there_and_back(pair, "--max-passes", str(passes), "--bandwidth", "20M"):
        assert switchover(report) == ("pass-limit", passes), report
        assert numbers(report) == list(range(1, passes + 1)), report
    pair.works(pair.a)


def test_a_guest_that_dirties_slowly_is_stopped_at_the_threshold(pair: Pair) -> None:
    pair.boot(working_set_bytes=16 * MIB, rate_bytes_per_s=4 * MIB, memory="48M")
    for report in there_and_back(pair, "--threshold", "1M", "--bandwidth", "20M"):
        reason, at = switchover(report)
        assert reason == "threshold", report
        assert 1 <= at < 10, report
        assert numbers(report) == list(range(1, at + 1)), report
        assert report["passes"][-1]["remaining_bytes"] <= MIB, report
        assert all(one["remaining_bytes"] > MIB for one in report["passes"][:-1]), report
    pair.works(pair.a)


def test_an_idle_guest_is_stopped_after_the_first_pass(pair: Pair) -> None:
    pair.boot(working_set_bytes=MIB, rate_bytes_per_s=0)
    for report in there_and_back(pair):
        assert switchover(report) == ("threshold", 1), report
        assert numbers(report) == [1], report
    pair.works(pair.a)


def test_a_small_fast_guest_on_a_fast_network_is_stopped_after_ten_passes_too(pair: Pair) -> None:
    """QEMU must not switch over by itself because all was sent before it had measured anything."""
    pair.boot_fast(4 * MIB)
    for report in there_and_back(pair, "--threshold", "64K"):
        assert switchover(report) == ("pass-limit", 10), report
        assert numbers(report) == list(range(1, 11)), report
    pair.works(pair.a)


def test_a_guest_at_the_pass_limit_is_slowed_down_until_its_blackout_keeps_to_the_limit(pair: Pair) -> None:
    """What it dirties in a pass takes longer to send than the blackout may last, and so it would be for ever.

    Slowed down by 96 %, it dirties less than the network carries on any machine that lets it dirty less than
    700 MiB/s otherwise: half of that was seen.
    """
    limit_ms = 1000
    pair.boot_fast(40 * MIB)
    before = dirtied_per_ms(pair.works(pair.a))
    for source, target in ((pair.a, pair.b), (pair.b, pair.a)):
        with source.slow_network("240mbit"):
            report = pair.moved(source, target, "--blackout-limit", str(limit_ms), "--on-overrun", "throttle")
        _, at = switchover(report)
        assert at > 10, report
        assert numbers(report) == list(range(1, at + 1)), report
        assert report["throttle_percent"] == 96, report  # by the limit: see blackout.throttle_max_percent
        assert report["passes"][9]["remaining_bytes"] > 30 * MIB, report
        assert report["switchover"]["remaining_bytes"] < 30 * MIB, report
        assert report["blackout_ms"] <= limit_ms, report
    after = dirtied_per_ms(pair.works(pair.a))
    assert after > before / 4, (before, after)


def dirtied_per_ms(beats: list[tuple[int, ...]]) -> float:
    """Return how fast the guest dirtied memory between its last beats but one, by its own clock."""
    first, last = beats[-3], beats[-1]
    return (last[4] - first[4]) / (last[3] - first[3])
