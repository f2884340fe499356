"""Hyper-V's pre-copy rule: memory goes over in passes until the difference is small enough, or enough passes are done.

QEMU says MIGRATION_PASS k at the start of pass k, when k - 1 passes are complete and `remaining` is exactly what was
dirtied during the last one. The guest is stopped at that very moment, so "ten passes" means ten complete passes.
"""

from collections.abc import Sequence

from kvmhv.core import blackout
from kvmhv.core.facts import PassStarted
from kvmhv.model import Pass, Rule, Switchover

THRESHOLD = "threshold"
PASS_LIMIT = "pass-limit"  # noqa: S105 - a reason, not a password
BLACKOUT_LIMIT = "blackout-limit"


def complete_pass(begun: PassStarted, ended: PassStarted) -> Pass:
    """Return the pass that lies between two consecutive pass starts."""
    seconds = max(ended.at_ms - begun.at_ms, 0.001) / 1000
    sent_bytes = max(0, ended.sent_bytes - begun.sent_bytes)
    return Pass(
        number=begun.number,
        sent_bytes=sent_bytes,
        remaining_bytes=ended.remaining_bytes,
        dirty_bytes_per_second=ended.dirty_bytes_per_s or ended.remaining_bytes / seconds,
        bytes_per_second=sent_bytes / seconds,
        seconds=seconds,
    )


def decide(
    rule: Rule, started: PassStarted, passes: Sequence[Pass] = (), predicted_ms: float | None = None
) -> Switchover | None:
    """Return why the guest is stopped now, or None to go on.

    The threshold goes first: at the pass limit with little left the reason is the threshold. Whether the blackout keeps
    to its limit is asked after that, by the caller.
    """
    complete = started.number - 1
    if complete < 1:
        return None
    if started.remaining_bytes <= rule.threshold_bytes:
        reason = THRESHOLD
    elif complete >= rule.max_passes:
        reason = PASS_LIMIT
    elif blackout.settled(rule, passes, predicted_ms):
        reason = BLACKOUT_LIMIT
    else:
        return None
    return Switchover(
        reason=reason, pass_number=complete, remaining_bytes=started.remaining_bytes, predicted_ms=predicted_ms
    )


def converged(complete_passes: int) -> Switchover:
    """QEMU switched over by itself: what remained was below its own, smaller threshold."""
    return Switchover(reason=THRESHOLD, pass_number=max(1, complete_passes), remaining_bytes=0)
