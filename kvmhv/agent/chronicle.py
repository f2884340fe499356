"""What a move leaves behind beside its record: counts in the metrics, events for people, the last moves at hand."""

from collections import deque
from collections.abc import Iterable

from kvmhv.agent import events, past_moves
from kvmhv.agent.events import Events
from kvmhv.agent.metrics import Metrics
from kvmhv.errors import KvmhvError
from kvmhv.model import Event, MoveReport

TOLD_MAX = 1000
RECENT = 20


class Chronicle:
    """Hears of the moves' ends and troubles, each once."""

    def __init__(self, metrics: Metrics, log: Events, records: Iterable[bytes] = ()) -> None:
        """`records`: the reports that are kept, the newest last."""
        newest = deque(records, RECENT)
        self._recent = deque(past_moves.read(newest), RECENT)
        self._metrics = metrics
        self._log = log
        self._told: dict[tuple[str, str], str | None] = {}

    def recent(self) -> tuple[MoveReport, ...]:
        """Return the last moves that ended, the newest first; reads no disk."""
        return tuple(reversed(self._recent))

    def tell(self, event: Event) -> None:
        """Tell what is not counted."""
        self._log.add(event)

    def refused(self, direction: str, error: KvmhvError, event: Event) -> None:
        """Count and tell a move that was not admitted here; there is no report of it."""
        self._metrics.move_refused(direction, error.code)
        self._log.add(event)

    def ended(self, report: MoveReport) -> None:
        """Count a move's end and tell it."""
        self._recent.append(report)
        self._told.pop((report.id, report.direction), None)
        self._metrics.observe_move(report)
        found = events.move_ended(report)
        if report.direction == "in" and report.network_gap_ms is not None:
            found = (*found, events.network_gap(report))
        if report.direction == "out" and report.answer_gap_ms is not None:
            found = (*found, events.answer_gap(report))
        self._log.add(*found)

    def answer_gap(self, report: MoveReport) -> None:
        """Count and tell an answer to the probe that came when the move had ended."""
        self._amend(report)
        self._metrics.observe_answer_gap(report)
        self._log.add(events.answer_gap(report))

    def network_gap(self, report: MoveReport) -> None:
        """Count and tell a first frame that came when the move had ended."""
        self._amend(report)
        self._metrics.observe_network_gap(report)
        self._log.add(events.network_gap(report))

    def _amend(self, report: MoveReport) -> None:
        for place, known in enumerate(self._recent):
            if (known.id, known.direction) == (report.id, report.direction):
                self._recent[place] = report

    def need_operator(self, report: MoveReport) -> None:
        """Tell that a move waits for somebody to decide; the same trouble again is no news."""
        key = (report.id, report.direction)
        if self._told.get(key) == report.reason or len(self._told) >= TOLD_MAX:
            return
        self._told[key] = report.reason
        self._log.add(events.needs_operator(report))
