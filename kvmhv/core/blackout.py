"""How long the blackout would be if the guest were stopped now, and what a limit to it means.

It has two parts. What remains of the memory goes at the rate at which the last passes went. The rest (stop, flush,
device state, grant, the last words of the disks' mirrors) is the *fixed part*: what earlier moves took beyond their
memory. It is judged by the slowest of them but one in ten. A move that this judgement has turned away measures nothing,
so each such move lets the next one be judged by a faster one: a bad hour does not forbid moves for ever.
"""

import math
from collections.abc import Sequence

from kvmhv.model import ErrorBody, MoveReport, Outcome, Pass, Rule

FIXED_MS = 60.0
"""The fixed part where nothing was measured: what idle guests cost."""
LOOKED_AT = 10
"""So many of the newest moves say what the fixed part is."""
SLOWEST = 0.9
"""Which of them is taken for the next."""
RATE_OVER_S = 0.3
"""Passes over so long are judged by: a single short one says little."""
ENOUGH = 0.8
"""A pass that leaves more than so much of what it had to send does not make the blackout shorter any more."""
PATIENCE = 2.0
"""A blackout that lasts so many times its limit before all is sent is taken back..."""
PATIENCE_MIN_S = 1.0
"""... but none is before this."""
THROTTLED_PASSES = 10
"""A guest that is slowed down has at least so many more passes to come under the limit."""

THROTTLE_SLICE_MS = 10.0
"""A CPU that QEMU slows down runs for so long and then sleeps as long as its percentage wants."""
THROTTLE_SHARE = 4
"""No sleep is longer than such a part of the limit: one that began just before the stop holds the switchover up."""
THROTTLE_MAX_PERCENT = 99
"""QEMU allows no more."""

THROTTLE, ACCEPT = "throttle", "accept"
OVER_LIMIT = "blackout-over-limit"
POST_COPY = "postcopy-ram"


def capabilities(rule: Rule) -> tuple[str, ...]:
    """Return the QEMU capabilities without which the rule cannot be kept."""
    converge = ("auto-converge",) if rule.blackout_limit_ms and rule.on_overrun == THROTTLE else ()
    return (*converge, POST_COPY) if rule.post_copy else converge


def memory_bytes_per_s(passes: Sequence[Pass], shrinks: float) -> float | None:
    """Return how fast memory goes over, by the last passes; None before there was one.

    `shrinks`: how many bytes of memory are expected to go in one byte on the wire. A pass after the first one shows it:
    it sends what the one before has left.
    """
    moved, seconds = 0.0, 0.0
    for number in range(len(passes) - 1, -1, -1):
        moved += passes[number - 1].remaining_bytes if number else passes[0].sent_bytes * shrinks
        seconds += passes[number].seconds
        if seconds >= RATE_OVER_S:
            break
    return moved / seconds if moved > 0 and seconds > 0 else None


def predict_ms(
    rule: Rule,
    passes: Sequence[Pass],
    remaining_bytes: int,
    *,
    fixed_ms: float | None,
    shrinks: float = 1.0,
    link_bytes_per_s: float | None = None,
    throttle_percent: int = 0,
    held_back: bool = False,
) -> float | None:
    """Return how long the blackout would be now; None before anything was measured.

    `link`: what moves there reach without a limit: a limit to the bandwidth does not hold in the blackout. Nor does
    what this move is held back for others (core/lead.py): then its own fastest pass counts, too.
    `throttle_percent`: how far the guest is slowed down.
    """
    rate = memory_bytes_per_s(passes, shrinks)
    if rate is None:
        return None
    if (rule.bandwidth_bytes_per_s or held_back) and link_bytes_per_s:
        rate = max(rate, link_bytes_per_s * shrinks)
    if held_back:
        rate = max(rate, *(one.bytes_per_second * shrinks for one in passes if one.seconds >= RATE_OVER_S), 0.0)
    fixed = FIXED_MS if fixed_ms is None else fixed_ms
    return fixed + throttle_sleep_ms(throttle_percent) + remaining_bytes / rate * 1000


def exceeds(rule: Rule, predicted_ms: float | None) -> bool:
    """Whether a blackout would be longer than the move's limit to it."""
    return bool(rule.blackout_limit_ms) and predicted_ms is not None and predicted_ms > rule.blackout_limit_ms


def settled(rule: Rule, passes: Sequence[Pass], predicted_ms: float | None) -> bool:
    """Whether a blackout within the limit is to be had now, and another pass would not make it shorter."""
    if not rule.blackout_limit_ms or predicted_ms is None or exceeds(rule, predicted_ms) or len(passes) < 2:
        return False
    return passes[-1].remaining_bytes > ENOUGH * passes[-2].remaining_bytes


def timeout_s(rule: Rule, switchover_s: float) -> float:
    """Return how long the guest may stand still before the move is taken back."""
    if not rule.blackout_limit_ms:
        return switchover_s
    return min(switchover_s, max(PATIENCE_MIN_S, PATIENCE * rule.blackout_limit_ms / 1000))


def throttle_sleep_ms(percent: int) -> float:
    """Return how long a CPU sleeps at a time that is slowed down so far.

    QEMU's stop does not end a sleep that is due just then (seen: 1 s at 99 %), and the rest of the memory waits for it.
    """
    return THROTTLE_SLICE_MS * percent / (100 - min(percent, THROTTLE_MAX_PERCENT))


def throttle_max_percent(rule: Rule) -> int:
    """Return how far the guest may be slowed down, so that its sleep leaves room in the blackout."""
    sleep_ms = rule.blackout_limit_ms / THROTTLE_SHARE
    return min(THROTTLE_MAX_PERCENT, int(100 * sleep_ms / (sleep_ms + THROTTLE_SLICE_MS)))


def gives_up(rule: Rule, passes: int, throttled_s: float, at_most_s: float) -> bool:
    """Whether a guest that is slowed down has had its chance."""
    return throttled_s >= at_most_s and passes >= rule.max_passes + THROTTLED_PASSES


def over_limit(
    rule: Rule,
    source: str,
    predicted_ms: float,
    remaining_bytes: int,
    fixed_ms: float | None,
    *,
    throttle_percent: int = 0,
    throttled_s: float = 0.0,
) -> ErrorBody:
    """Return why a move is taken back before its guest was stopped.

    `throttle_percent`, `throttled_s`: how far and how long the guest was slowed down in vain.
    """
    fixed = FIXED_MS if fixed_ms is None else fixed_ms
    parts = [f"{remaining_bytes / 2**20:.1f} MiB remain to be sent", f"{fixed:.0f} ms go for the rest"]
    todo = "move it at a quieter time or over a faster network, allow it more"
    if throttle_percent:
        sleep_ms = throttle_sleep_ms(throttle_percent)
        parts.append(f"{sleep_ms:.0f} ms for the sleep of a CPU slowed down by {throttle_percent} %")
        todo += f"; slowing it down for {throttled_s:.0f} s was not enough"
    else:
        todo += ", or say --on-overrun throttle"
    if fixed > rule.blackout_limit_ms:
        todo = "allow it more: the last moves took so long without any memory to send"
    return ErrorBody(
        code="blackout-over-limit",
        message=f"the blackout would last about {predicted_ms:.0f} ms ({', '.join(parts)}) and may last "
        f"{rule.blackout_limit_ms} ms; the VM runs on {source}",
        todo=todo,
        host=source,
        exit_status=1,
    )


def overrun(report: MoveReport, rule: Rule) -> str | None:
    """Say that a blackout was longer than its limit; None if it was not."""
    switchover, blackout_ms = report.switchover, report.blackout_ms
    if not rule.blackout_limit_ms or switchover is None or blackout_ms is None or blackout_ms <= rule.blackout_limit_ms:
        return None
    seen = "" if switchover.predicted_ms is None else f"; {switchover.predicted_ms:.0f} ms were expected"
    over_ms = blackout_ms - rule.blackout_limit_ms
    return f"the blackout lasted {blackout_ms:.0f} ms, {over_ms:.0f} ms over its limit{seen}"


def fixed_ms(reports: Sequence[MoveReport], *, disks: bool, performance: str) -> float | None:
    """Return the fixed part by earlier moves to one target, the newest last; None where none of this kind was.

    `disks`: moves whose disks travel; `performance`: under which option.
    """
    measured: list[float] = []
    turned_away = 0
    for report in reversed(reports):
        if report.plan is None or _kind(report) != (disks, performance) or len(measured) >= LOOKED_AT:
            continue
        if report.error is not None and report.error.code == OVER_LIMIT and not measured:
            turned_away += 1
        beyond_ms = _beyond_memory_ms(report)
        if beyond_ms is not None:
            measured.append(beyond_ms)
    if not measured:
        return None
    measured.sort()
    return measured[max(0, math.ceil(SLOWEST * len(measured)) - 1 - turned_away)]


def _kind(report: MoveReport) -> tuple[bool, str]:
    assert report.plan is not None
    return bool(report.plan.disk_copies), report.plan.rule.performance


def _beyond_memory_ms(report: MoveReport) -> float | None:
    """Return what a blackout took beyond its memory."""
    assert report.plan is not None
    if report.outcome is not Outcome.DONE or report.blackout_ms is None or report.switchover is None:
        return None
    rate = memory_bytes_per_s(report.passes, report.plan.channels.ratio)
    if rate is None:
        return None
    return max(0.0, report.blackout_ms - report.switchover.remaining_bytes / rate * 1000)
