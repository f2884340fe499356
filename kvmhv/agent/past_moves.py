"""What earlier moves to a host tell of the way there."""

from collections.abc import Iterable, Iterator, Sequence

import msgspec
import structlog

from kvmhv.core import blackout
from kvmhv.model import MoveReport, Outcome, Rule, Struct

log = structlog.get_logger(__name__)

LOOKED_AT = 20
"""So many of the newest moves there are asked."""


def read(reports: Iterable[bytes]) -> Iterator[MoveReport]:
    """Yield the reports that can be read: one that was damaged, or is of another version, hides no other."""
    for encoded in reports:
        try:
            yield msgspec.json.decode(encoded, type=MoveReport)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            log.warning("the report of an ended move cannot be read", error=str(error))


def find(reports: Iterable[bytes], move_id: str) -> Iterator[MoveReport]:
    """Yield the reports of moves whose id begins so; of the others not one is decoded."""
    named = b'"id":"' + msgspec.json.encode(move_id)[1:-1]
    return (report for report in read(one for one in reports if named in one) if report.id.startswith(move_id))


def ended(reports: Iterable[bytes], move_id: str, other: str) -> MoveReport | None:
    """Return how a move with that host ended here: a third one is told nothing of it."""
    for report in find(reports, move_id):
        if report.id == move_id and other in (report.source, report.target):
            return report
    return None


class Shelf:
    """The kept reports as they are listed: each is decoded once, to see that it can be read, and copied from then on.

    A thousand of them are decoded in some 70 ms, in which the agent does nothing else.
    """

    def __init__(self) -> None:
        self._readable: set[int] = set()
        """Hashes of reports."""

    def listed(self, reports: Sequence[bytes]) -> tuple[msgspec.Raw, ...]:
        """Return the ones that can be read, in their order."""
        now = {hash(one): one for one in reports}
        self._readable &= now.keys()
        fresh = [one for key, one in now.items() if key not in self._readable]
        self._readable |= {hash(one) for one in fresh if any(read([one]))}
        return tuple(msgspec.Raw(one) for one in reports if hash(one) in self._readable)


class Experience(Struct, frozen=True, kw_only=True):
    """What the moves to one host came to; None where none of them can tell."""

    throughput_bytes_per_s: float | None = None
    """What the last one without a limit reached."""
    link_bytes_per_s: float | None = None
    """The most that one of them reached: the link can do that, whatever held the others up."""
    fixed_blackout_ms: float | None = None
    """What a blackout takes beyond its memory (core/blackout.py)."""


def experience(encoded: Sequence[bytes], target: str, *, disks: bool, rule: Rule) -> Experience:
    """Return what the newest moves to `target` tell of one under this rule whose disks travel, or do not."""
    found = _reports(encoded, target)
    rates = [rate for rate in map(_rate, reversed(found)) if rate is not None]
    return Experience(
        throughput_bytes_per_s=rates[0] if rates else None,
        link_bytes_per_s=max(rates, default=None),
        fixed_blackout_ms=blackout.fixed_ms(found, disks=disks, performance=rule.performance),
    )


def _reports(encoded: Sequence[bytes], target: str) -> list[MoveReport]:
    """Return the newest moves there, the newest last; what names another target is not even decoded."""
    named = b'"target":' + msgspec.json.encode(target)
    found: list[MoveReport] = []
    for report in read(one for one in reversed(encoded) if named in one):
        if report.target == target:
            found.append(report)
        if len(found) == LOOKED_AT:
            break
    return found[::-1]


def _rate(report: MoveReport) -> float | None:
    seconds = sum(one.seconds for one in report.passes)
    limited = report.plan is not None and report.plan.rule.bandwidth_bytes_per_s
    if report.outcome is not Outcome.DONE or seconds <= 0 or limited:
        return None
    return sum(one.sent_bytes for one in report.passes) / seconds
