"""The journal with a stop watch on it: how long a move waited for its entries."""

import time
from collections.abc import Callable

from kvmhv.ports import Journal


class TimedJournal:
    """Implements ports.Journal over another one; `on_write(durable, seconds)` hears of each write."""

    def __init__(self, journal: Journal, on_write: Callable[[bool, float], None]) -> None:
        self._journal = journal
        self._on_write = on_write

    @property
    def volatile_id(self) -> str:
        """Names the volatile journal; another one after a reboot."""
        return self._journal.volatile_id

    def write(self, move_id: str, role: str, state: bytes, *, durable: bool) -> None:
        """Keep a machine's state, and tell how long it took."""
        begun = time.perf_counter()
        self._journal.write(move_id, role, state, durable=durable)
        self._on_write(durable, time.perf_counter() - begun)

    def load(self) -> tuple[tuple[str, str, bytes], ...]:
        """Return (move id, role, newest state) of every move that has not been ended here."""
        return self._journal.load()

    def end(self, move_id: str, role: str, report: bytes) -> None:
        """Replace a move's states by its final report, and tell how long it took."""
        begun = time.perf_counter()
        self._journal.end(move_id, role, report)
        self._on_write(True, time.perf_counter() - begun)

    def reports(self) -> tuple[bytes, ...]:
        """Return the reports of ended moves, the newest last."""
        return self._journal.reports()
