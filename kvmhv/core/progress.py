"""How far a move is, how long it will still take, and how it will end if the guest goes on as it does.

Each pass sends what was dirtied during the one before, so with a dirty rate D and a throughput T the next dirty set is
D x (bytes / T), and never more than the working set. The passes to come are played through until the pre-copy rule
would stop the guest. The low and the high figure come from the same play with the rates a margin better and worse.
"""

from kvmhv.core.precopy import PASS_LIMIT, THRESHOLD
from kvmhv.model import Estimate, Pass, Phase, Rule, Struct

BLACKOUT_FIXED_S = 0.06
"""Stop, device state, grant and run beside the last memory: what idle guests cost."""
CLEANUP_S = 0.3
MARGIN = 1.25
"""How much better or worse the rates of a steady guest become."""
RATE_AFTER_S = 0.5
"""A pass or a disk copy that runs for so long is worth judging by."""
UNFINISHED_MAX = 0.99
"""Nothing but the end is 1."""
BLACKOUT_PROGRESS = 0.98


class Standing(Struct, frozen=True, kw_only=True):
    """What the source knows of its move at one moment."""

    phase: Phase
    rule: Rule
    elapsed_s: float
    """Since the move began."""
    phase_s: float
    """Since the phase began."""
    disk_total_bytes: int = 0
    disk_copied_bytes: int = 0
    used_bytes: int = 0
    """Memory that is not empty: what the first pass sends."""
    remaining_bytes: int = 0
    """Memory that the running pass has not looked at yet."""
    passes: tuple[Pass, ...] = ()
    pass_s: float = 0.0
    """Since the running pass began."""
    pass_bytes: int = 0
    """Dirty when the running pass began."""
    pass_sent_bytes: int = 0
    expected_dirty_bytes_per_s: float = 0.0
    """Measured before the move."""
    expected_bytes_per_s: float = 0.0
    """What an earlier move there reached, or the limit that is set; 0: nobody knows."""


def throughput_bytes_per_s(standing: Standing) -> float | None:
    """Return what travels now: in the storage phase disks, in the memory phase memory; None before that is known."""
    if standing.phase is Phase.STORAGE:
        if standing.phase_s < RATE_AFTER_S or not standing.disk_copied_bytes:
            return None
        return standing.disk_copied_bytes / standing.phase_s
    sent, seconds = float(standing.pass_sent_bytes), standing.pass_s
    if standing.passes:  # the last complete pass steadies the judgement of one that has just begun
        sent, seconds = sent + standing.passes[-1].sent_bytes, seconds + standing.passes[-1].seconds
    return sent / seconds if sent > 0 and seconds >= RATE_AFTER_S else None


def dirty_bytes_per_s(standing: Standing) -> float:
    """Return how fast the guest dirties memory.

    A long pass dirties the whole working set and then the same pages again, so the first pass says too little: the rate
    that was sampled before the move counts if it is higher.
    """
    if not standing.passes:
        return standing.expected_dirty_bytes_per_s
    last = standing.passes[-1]
    seen = last.remaining_bytes / last.seconds
    return max(seen, standing.expected_dirty_bytes_per_s) if len(standing.passes) == 1 else seen


def estimate(standing: Standing) -> Estimate | None:
    """Return the seconds left and the end to be expected; None while nothing is known of the throughput."""
    rate = throughput_bytes_per_s(standing) or standing.expected_bytes_per_s
    if standing.phase in (Phase.STATE, Phase.CLEANUP) or rate <= 0:
        return None
    likely_s, passes, switchover, blackout_s = _play(standing, rate, 1.0)
    low_s, high_s = _play(standing, rate, 1 / MARGIN)[0], _play(standing, rate, MARGIN)[0]
    return Estimate(
        seconds_low=min(low_s, likely_s),
        seconds_likely=likely_s,
        seconds_high=max(high_s, likely_s),
        passes=passes,
        switchover=switchover,
        blackout_ms=blackout_s * 1000,
    )


def _play(standing: Standing, rate: float, worse: float) -> tuple[float, int, str, float]:
    """Play the rest with rates that are so much worse: (seconds left, complete passes, why they end, blackout)."""
    rate, dirty = rate / worse, dirty_bytes_per_s(standing) * worse
    rule = standing.rule
    total_s = 0.0
    if standing.phase in (Phase.SETUP, Phase.STORAGE):
        total_s = max(0, standing.disk_total_bytes - standing.disk_copied_bytes) / rate
    left = _left_of_pass(standing, worse)
    working_set = max([one.remaining_bytes for one in standing.passes], default=standing.used_bytes)
    complete = len(standing.passes)
    during_s = standing.pass_s if standing.phase is Phase.MEMORY else 0.0
    while True:
        total_s += left / rate
        during_s += left / rate
        complete += 1
        left = min(float(working_set), dirty * during_s)
        during_s = 0.0
        reason = THRESHOLD if left <= rule.threshold_bytes else PASS_LIMIT
        if reason == THRESHOLD or complete >= rule.max_passes:
            blackout_s = BLACKOUT_FIXED_S + left / rate
            return total_s + blackout_s + CLEANUP_S, complete, reason, blackout_s


def _left_of_pass(standing: Standing, worse: float) -> float:
    """Return what the running pass has still to send; the first one skips what is empty, and nobody knows where."""
    if standing.passes:
        return float(standing.remaining_bytes)
    if standing.phase is not Phase.MEMORY:
        return float(standing.used_bytes)
    used_left = standing.used_bytes * min(worse, 1.1) - standing.pass_sent_bytes
    return min(float(standing.remaining_bytes), max(used_left, 0.02 * standing.used_bytes))


def progress(standing: Standing, before: float) -> float:
    """Return 0..1 as a share of the whole time, never less than `before`.

    Where no throughput is known it does not move: a bar that stands is honest, one that runs back is not.
    """
    if standing.phase in (Phase.STATE, Phase.CLEANUP):
        return max(before, BLACKOUT_PROGRESS)
    seen = estimate(standing)
    if seen is None:
        return before
    share = standing.elapsed_s / max(standing.elapsed_s + seen.seconds_likely, 0.001)
    return min(UNFINISHED_MAX, max(before, share))
