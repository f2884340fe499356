"""What earlier moves to a host tell of the way there."""

from collections.abc import Iterator, Sequence

import msgspec

from kvmhv.model import MoveReport, Outcome

LOOKED_AT = 20
"""So many of the newest moves say what the link can do."""


def throughput(reports: Sequence[bytes], target: str) -> float | None:
    """Return what the last move there without a limit reached, in bytes per second."""
    return next(_rates(reports, target), None)


def link(reports: Sequence[bytes], target: str) -> float | None:
    """Return the most that one of the last moves there reached: the link can do that, whatever held the others up."""
    return max(_rates(reports[-LOOKED_AT:], target), default=None)


def _rates(reports: Sequence[bytes], target: str) -> Iterator[float]:
    for encoded in reversed(reports):
        report = msgspec.json.decode(encoded, type=MoveReport)
        seconds = sum(one.seconds for one in report.passes)
        limited = report.plan is not None and report.plan.rule.bandwidth_bytes_per_s
        if report.target == target and report.outcome is Outcome.DONE and seconds > 0 and not limited:
            yield sum(one.sent_bytes for one in report.passes) / seconds
