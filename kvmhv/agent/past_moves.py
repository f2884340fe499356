"""What earlier moves to a host tell of the way there."""

from collections.abc import Iterable, Iterator, Sequence

import msgspec
import structlog

from kvmhv.model import MoveReport, Outcome

log = structlog.get_logger(__name__)

LOOKED_AT = 20
"""So many of the newest moves say what the link can do."""


def read(reports: Iterable[bytes]) -> Iterator[MoveReport]:
    """Yield the reports that can be read: one that was damaged, or is of another version, hides no other."""
    for encoded in reports:
        try:
            yield msgspec.json.decode(encoded, type=MoveReport)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            log.warning("the report of an ended move cannot be read", error=str(error))


def throughput(reports: Sequence[bytes], target: str) -> float | None:
    """Return what the last move there without a limit reached, in bytes per second."""
    return next(_rates(reports, target), None)


def link(reports: Sequence[bytes], target: str) -> float | None:
    """Return the most that one of the last moves there reached: the link can do that, whatever held the others up."""
    return max(_rates(reports[-LOOKED_AT:], target), default=None)


def _rates(reports: Sequence[bytes], target: str) -> Iterator[float]:
    for report in read(reversed(reports)):
        seconds = sum(one.seconds for one in report.passes)
        limited = report.plan is not None and report.plan.rule.bandwidth_bytes_per_s
        if report.target == target and report.outcome is Outcome.DONE and seconds > 0 and not limited:
            yield sum(one.sent_bytes for one in report.passes) / seconds
