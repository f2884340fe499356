"""How far a move is, how long it will still take, and how it will end if the guest goes on as it does.

Each pass sends what was dirtied during the one before, so with a dirty rate D and a throughput T the next dirty set is
D x (bytes / T), and never more than the working set. The passes to come are played through until the pre-copy rule
would stop the guest. The low and the high figure come from the same play with the rates a margin better and worse.

The progress goes forward by that share of the rest which the time since the last look is of the seconds left. So it
cannot run backward, reaches the end when the move does, and a wrong judgement slows it down instead of stopping it.
"""

from kvmhv.core import blackout
from kvmhv.core.precopy import PASS_LIMIT, THRESHOLD
from kvmhv.model import Estimate, Pass, Phase, Rule, Struct

BLACKOUT_FIXED_S = blackout.FIXED_MS / 1000
CLEANUP_S = 0.3
MARGIN = 1.25
"""How much better or worse the rates of a steady guest become."""
RATE_AFTER_S = 0.5
"""A pass or a disk copy that runs for so long is worth judging by."""
WORKING_SET_LIKELY = 0.5
"""Of the used memory, until a pass has shown how much of it the guest writes to; the high figure takes all of it."""
UNFINISHED_MAX = 0.97
"""What the passes can reach; nothing but the end is 1."""
BLACKOUT_PROGRESS = 0.98


NEAR_S = 2.0
"""The switchover is near: longer than a look at QEMU and a slow disk write take together."""
IMMINENT_S = 0.5
"""The switchover is imminent: two looks at QEMU."""
FAST_BYTES_PER_S = 1.25e9
"""The fastest that the memory may go as long as nobody has measured it ..."""
FASTER = 4
"""... or so many times what the last move there reached."""


class Standing(Struct, frozen=True, kw_only=True):
    """What the source knows of its move at one moment."""

    phase: Phase
    rule: Rule
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
    pass_sent_bytes: int = 0
    expected_dirty_bytes_per_s: float = 0.0
    """Measured before the move."""
    shrinks: float = 1.0
    """How many bytes of memory go in one byte on the wire."""
    expected_bytes_per_s: float = 0.0
    """What the last move there reached; 0: nobody knows."""
    blackout_fixed_s: float = BLACKOUT_FIXED_S
    """What the blackout takes beyond its memory."""


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
    if standing.phase in (Phase.STATE, Phase.PAGES, Phase.CLEANUP):
        return None
    measured = throughput_bytes_per_s(standing)
    limits = [rate for rate in (standing.rule.bandwidth_bytes_per_s, standing.expected_bytes_per_s) if rate]
    memory_rate = measured if standing.phase is Phase.MEMORY and measured else min(limits, default=measured or 0)
    if memory_rate <= 0:
        return None
    wire_rate, memory_rate = memory_rate, memory_rate * standing.shrinks
    disk_rate = measured if standing.phase is Phase.STORAGE and measured else wire_rate
    plays = [_play(standing, disk_rate, memory_rate, worse) for worse in (1 / MARGIN, 1.0, MARGIN)]
    likely = plays[1]
    return Estimate(
        seconds_low=min(play.seconds for play in plays),
        seconds_likely=likely.seconds,
        seconds_high=max(play.seconds for play in plays),
        passes=likely.passes,
        switchover=likely.switchover,
        blackout_ms=likely.blackout_s * 1000,
    )


def storage_estimate(total_bytes: int, copied_bytes: int, seconds: float) -> Estimate | None:
    """Return the seconds left of a move of disks alone, `seconds` after its copies began; None before that is known.

    It has no passes and no blackout.
    """
    if seconds < RATE_AFTER_S or not copied_bytes:
        return None
    likely = max(0, total_bytes - copied_bytes) * seconds / copied_bytes
    return Estimate(
        seconds_low=likely / MARGIN + CLEANUP_S,
        seconds_likely=likely + CLEANUP_S,
        seconds_high=likely * MARGIN + CLEANUP_S,
        passes=0,
        switchover="",
        blackout_ms=0.0,
    )


def is_near(standing: Standing) -> bool:
    """Return whether the guest is likely to be stopped within NEAR_S; until its rate is measured, whether it may be."""
    seen = estimate(standing)
    if seen is None or throughput_bytes_per_s(standing) is None:
        fastest = FASTER * standing.expected_bytes_per_s or FAST_BYTES_PER_S
        return standing.used_bytes / min(fastest, standing.rule.bandwidth_bytes_per_s or fastest) <= NEAR_S / 2
    return seen.seconds_likely - CLEANUP_S - standing.blackout_fixed_s <= NEAR_S


def is_imminent(standing: Standing) -> bool:
    """Return whether the guest is likely to be stopped within IMMINENT_S, as far as its rate is known."""
    seen = estimate(standing)
    if seen is None or throughput_bytes_per_s(standing) is None:
        return False
    return seen.seconds_likely - CLEANUP_S - seen.blackout_ms / 1000 <= IMMINENT_S


class _Play(Struct, frozen=True, kw_only=True):
    seconds: float
    passes: int
    switchover: str
    blackout_s: float


def _play(standing: Standing, disk_rate: float, memory_rate: float, worse: float) -> _Play:
    """Play the rest with rates that are so much worse."""
    rule, rate = standing.rule, memory_rate / worse
    dirty, working_set = dirty_bytes_per_s(standing) * worse, _working_set(standing, worse)
    total_s, during_s = 0.0, standing.pass_s if standing.phase is Phase.MEMORY else 0.0
    if standing.phase in (Phase.SETUP, Phase.STORAGE):
        total_s = max(0, standing.disk_total_bytes - standing.disk_copied_bytes) * worse / disk_rate
    left, complete = _left_of_pass(standing, worse), len(standing.passes)
    while True:
        total_s += left / rate
        during_s += left / rate
        complete += 1
        left, during_s = min(working_set, dirty * during_s), 0.0
        below = left <= rule.threshold_bytes
        if below or complete >= rule.max_passes:
            blackout_s = standing.blackout_fixed_s + left / _last_rate(standing, rate)
            return _Play(
                seconds=total_s + blackout_s + CLEANUP_S,
                passes=complete,
                switchover=THRESHOLD if below else PASS_LIMIT,
                blackout_s=blackout_s,
            )


def _last_rate(standing: Standing, rate: float) -> float:
    """Return the rate of the last bytes: a limit that is set does not hold in the blackout."""
    return max(rate, standing.expected_bytes_per_s) if standing.rule.bandwidth_bytes_per_s else rate


def _working_set(standing: Standing, worse: float) -> float:
    """Return how much of its memory the guest writes to: the most that a pass left, or a guess before there was one."""
    if standing.passes:
        return float(max(one.remaining_bytes for one in standing.passes))
    return standing.used_bytes * (1.0 if worse > 1 else WORKING_SET_LIKELY)


def _left_of_pass(standing: Standing, worse: float) -> float:
    """Return what the running pass has still to send; the first one skips what is empty, and nobody knows where."""
    if standing.passes:
        return float(standing.remaining_bytes)
    if standing.phase is not Phase.MEMORY or not (standing.remaining_bytes or standing.pass_sent_bytes):
        return float(standing.used_bytes)  # QEMU has not told yet what there is to send
    used_left = standing.used_bytes * min(worse, 1.1) - standing.pass_sent_bytes
    return min(float(standing.remaining_bytes), max(used_left, 0.02 * standing.used_bytes))


def progress(standing: Standing, before: float, since_s: float) -> float:
    """Return 0..1, never less than `before`, the progress that was noted `since_s` seconds ago.

    Where no throughput is known it does not move.
    """
    if standing.phase in (Phase.STATE, Phase.PAGES, Phase.CLEANUP):
        return max(before, BLACKOUT_PROGRESS)
    seen = estimate(standing)
    if seen is None or since_s <= 0:
        return before
    return max(before, min(UNFINISHED_MAX, before + (1 - before) * since_s / (since_s + seen.seconds_likely)))
