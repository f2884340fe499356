"""The network gap in a move's report: from the guest's stop to its first frame at the target.

The target knows it best and last: the blackout from the source's report, and on its own clock the time from RESUME to
the frame (less than nothing where RESUME was noticed late). So no clocks have to be aligned for it.
"""

import msgspec

from kvmhv.model import BlackoutStep, MoveReport

NAME = "first-frame"


def network_gap_ms(blackout_ms: float | None, first_frame_after_ms: float | None) -> float | None:
    """Return the gap; None while one of its parts is not known."""
    if blackout_ms is None or first_frame_after_ms is None:
        return None
    return max(0.0, blackout_ms + first_frame_after_ms)


def noted(report: MoveReport, first_frame_after_ms: float | None) -> MoveReport:
    """Return the report with the first frame in it, so long after RESUME; one that has it stays as it is."""
    gap_ms = network_gap_ms(report.blackout_ms, first_frame_after_ms)
    if gap_ms is None or report.network_gap_ms is not None:
        return report
    step = BlackoutStep(name=NAME, host=report.target, at_ms=gap_ms)
    steps = sorted((*report.blackout_steps, step), key=lambda one: one.at_ms)
    return msgspec.structs.replace(report, network_gap_ms=gap_ms, blackout_steps=tuple(steps))
