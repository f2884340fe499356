"""What a move leaves behind beside its record: counts in the metrics, events for people."""

from kvmhv.agent import events
from kvmhv.agent.events import Events
from kvmhv.agent.metrics import Metrics
from kvmhv.model import MoveReport

TOLD_MAX = 1000


class Chronicle:
    """Hears of the moves' ends and troubles, each once."""

    def __init__(self, metrics: Metrics, log: Events) -> None:
        self._metrics = metrics
        self._log = log
        self._told: dict[tuple[str, str], str | None] = {}

    def ended(self, report: MoveReport) -> None:
        """Count a move's end and tell it."""
        self._told.pop((report.id, report.direction), None)
        self._metrics.observe_move(report)
        found = events.move_ended(report)
        if report.direction == "in" and report.network_gap_ms is not None:
            found = (*found, events.network_gap(report))
        self._log.add(*found)

    def network_gap(self, report: MoveReport) -> None:
        """Count and tell a first frame that came when the move had ended."""
        self._metrics.observe_network_gap(report)
        self._log.add(events.network_gap(report))

    def need_operator(self, report: MoveReport) -> None:
        """Tell that a move waits for somebody to decide; the same trouble again is no news."""
        key = (report.id, report.direction)
        if self._told.get(key) == report.reason or len(self._told) >= TOLD_MAX:
            return
        self._told[key] = report.reason
        self._log.add(events.needs_operator(report))
