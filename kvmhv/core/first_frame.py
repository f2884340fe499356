"""The gaps that the network sees, in a move's report: from the guest's stop to its first frame, to its first answer.

The target knows the frame best and last: the blackout from the source's report, and on its own clock the time from
RESUME to the frame (less than nothing where RESUME was noticed late). The answer to the probe is the source's, which
told the guest to stop on the same clock. So no clocks have to be aligned for either.
"""

import msgspec

from kvmhv.model import BlackoutStep, MoveReport

NAME = "first-frame"
ANSWER = "first-answer"


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
    steps = _with_step(report, BlackoutStep(name=NAME, host=report.target, at_ms=gap_ms))
    return msgspec.structs.replace(report, network_gap_ms=gap_ms, blackout_steps=steps)


def answered(report: MoveReport, gap_ms: float | None) -> MoveReport:
    """Return the report with the first answer in it, so long after the stop; one that has it stays as it is."""
    if gap_ms is None or report.blackout_ms is None or report.answer_gap_ms is not None:
        return report
    steps = _with_step(report, BlackoutStep(name=ANSWER, host=report.source, at_ms=gap_ms))
    return msgspec.structs.replace(report, answer_gap_ms=gap_ms, blackout_steps=steps)


def _with_step(report: MoveReport, step: BlackoutStep) -> tuple[BlackoutStep, ...]:
    return tuple(sorted((*report.blackout_steps, step), key=lambda one: one.at_ms))
