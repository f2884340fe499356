"""How a running move looks: a display on a terminal, a line for each phase and pass elsewhere, nothing for scripts."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from kvmhv.cli import output
from kvmhv.model import MoveReport, Outcome, Pass, Phase

if TYPE_CHECKING:
    from rich.console import RenderableType

PHASES = tuple(Phase)
BAR_WIDTH = 40
PACE_WINDOW_S = 10.0


class View(Protocol):
    """Shows the reports of one move as they come."""

    def show(self, report: MoveReport) -> None:
        """Show what is new in it."""
        ...

    def say(self, text: str) -> None:
        """Tell the person something beside the reports."""
        ...


@contextmanager
def view(*, quiet: bool) -> Iterator[View]:
    """Give the view that suits standard output; afterwards the terminal is as it was."""
    if quiet:
        yield Silent()
    elif sys.stdout.isatty():
        with _display() as display:
            yield display
    else:
        yield Lines()


class Silent:
    """For `--json`: what a person has to know goes to stderr."""

    def show(self, report: MoveReport) -> None:
        """Show nothing."""

    def say(self, text: str) -> None:
        """Print on stderr."""
        output.note(text)


class Lines:
    """For logs and pipes."""

    def __init__(self) -> None:
        self._last: MoveReport | None = None

    def show(self, report: MoveReport) -> None:
        """Print a line for each thing that is new."""
        for line in news(self._last, report):
            output.say(line)
        self._last = report

    def say(self, text: str) -> None:
        """Print a line."""
        output.say(text)


def news(old: MoveReport | None, new: MoveReport) -> list[str]:
    """Return what happened between two reports of a move, in the order in which it happened."""
    lines: list[tuple[float, str]] = []
    if old is None:
        lines.append((-1, f"move {new.id}: {new.vm} from {new.source} to {new.target}"))
    reached = -1 if old is None else PHASES.index(old.phase)
    lines += [(PHASES.index(phase), f"phase {phase}") for phase in _begun(new) if PHASES.index(phase) > reached]
    lines += _storage_news(old, new)
    after_memory = PHASES.index(Phase.MEMORY) + 0.5
    for done in new.passes[len(old.passes) if old else 0 :]:
        lines.append((after_memory, pass_text(done)))
    if new.switchover is not None and (old is None or old.switchover is None):
        text = f"switchover after pass {new.switchover.pass_number}: {new.switchover.reason}"
        lines.append((after_memory, text))
    for warning in new.warnings[len(old.warnings) if old else 0 :]:
        lines.append((len(PHASES), f"warning: {warning}"))
    return [text for _, text in sorted(lines, key=lambda line: line[0])]


def _begun(report: MoveReport) -> list[Phase]:
    ended = {done.phase for done in report.phases}
    return [phase for phase in PHASES if phase in ended or phase is report.phase]


def _storage_news(old: MoveReport | None, new: MoveReport) -> list[tuple[float, str]]:
    """A line for each tenth of the disks: their copy is the longest silence of a move."""
    tenth = _tenth(new)
    if tenth == 0 or tenth == _tenth(old):
        return []
    copied, total = output.size_text(new.storage_copied_bytes), output.size_text(new.storage_total_bytes)
    return [(PHASES.index(Phase.STORAGE) + 0.5, f"disks: {copied} of {total} copied ({tenth}0 %)")]


def _tenth(report: MoveReport | None) -> int:
    if report is None or not report.storage_total_bytes:
        return 0
    return min(10, report.storage_copied_bytes * 10 // report.storage_total_bytes)


def pass_text(done: Pass) -> str:
    """Return a complete pass as a line."""
    return (
        f"pass {done.number}: sent {output.size_text(done.sent_bytes)} in {output.seconds_text(done.seconds)}, "
        f"{output.size_text(done.remaining_bytes)} remain, "
        f"the guest dirties {output.rate_text(done.dirty_bytes_per_second)}"
    )


class Pace:
    """Rate and rest of a move, judged by its last seconds."""

    def __init__(self) -> None:
        self._samples: deque[tuple[float, float, int]] = deque(maxlen=1000)
        self._moved_bytes = 0
        self._last: MoveReport | None = None

    def add(self, at_s: float, report: MoveReport) -> None:
        """Take a report that came at `at_s` (any clock that does not go backward)."""
        if self._last is not None:
            copied = report.storage_copied_bytes - self._last.storage_copied_bytes
            sent = self._last.remaining_bytes - report.remaining_bytes
            self._moved_bytes += max(0, copied if report.phase is Phase.STORAGE else sent)
        self._last = report
        self._samples.append((at_s, report.progress, self._moved_bytes))
        while at_s - self._samples[0][0] > PACE_WINDOW_S:
            self._samples.popleft()

    def bytes_per_s(self) -> float | None:
        """Return what travels now, None before there is enough to judge by."""
        (first_s, _, first), (last_s, _, last) = self._samples[0], self._samples[-1]
        return (last - first) / (last_s - first_s) if last_s > first_s else None

    def rest_s(self) -> float | None:
        """Return how long the rest takes if it goes on like this; None when nobody can say."""
        (first_s, first, _), (last_s, last, _) = self._samples[0], self._samples[-1]
        return (1 - last) * (last_s - first_s) / (last - first) if last > first else None


@contextmanager
def _display() -> Iterator[View]:
    from rich.console import Console  # noqa: PLC0415 - only who draws pays for it
    from rich.live import Live  # noqa: PLC0415

    # No thread of its own: the agent's reports come several times a second.
    with Live(console=Console(), auto_refresh=False, transient=True) as live:
        yield Display(lambda drawn: live.update(drawn, refresh=True), live.console.print)


class Display:
    """For a terminal: complete passes scroll by, the line below them moves."""

    def __init__(self, draw: Callable[[RenderableType], None], above: Callable[..., None]) -> None:
        self._draw = draw
        self._above = above
        self._pace = Pace()
        self._last: MoveReport | None = None

    def show(self, report: MoveReport) -> None:
        """Draw the report."""
        self._pace.add(time.monotonic(), report)
        for line in news(self._last, report):
            self.say(line)
        self._last = report
        self._draw(self._bar(report))

    def say(self, text: str) -> None:
        """Print a line above the moving one."""
        self._above(output.printable(text), markup=False, highlight=False)

    def _bar(self, report: MoveReport) -> RenderableType:
        from rich.progress_bar import ProgressBar  # noqa: PLC0415
        from rich.table import Table  # noqa: PLC0415
        from rich.text import Text  # noqa: PLC0415

        if report.outcome is not Outcome.RUNNING:
            return Text("")
        number = f", pass {len(report.passes) + 1}" if report.phase is Phase.MEMORY else ""
        rest = self._pace.rest_s()
        line = Table.grid(padding=(0, 2))
        line.add_row(
            Text(f"{report.phase}{number}", style="bold"),
            ProgressBar(total=1.0, completed=report.progress, width=BAR_WIDTH),
            Text(f"{report.progress * 100:.0f} %"),
            Text(f"{output.size_text(report.remaining_bytes)} remain"),
            Text(output.rate_text(self._pace.bytes_per_s())),
            Text("" if rest is None else f"about {output.seconds_text(rest)}"),
        )
        return line


@contextmanager
def upload_progress(name: str, size_bytes: int, *, quiet: bool) -> Iterator[Callable[[int], None]]:
    """Give a function that takes the number of bytes just sent."""
    if quiet:
        yield lambda _sent: None
        return
    if not sys.stdout.isatty():
        output.say(f"uploading {name} ({output.size_text(size_bytes)})")
        yield lambda _sent: None
        return
    from rich import progress  # noqa: PLC0415 - only who draws pays for it

    columns = (
        progress.TextColumn("{task.description}", markup=False),
        progress.BarColumn(),
        progress.DownloadColumn(binary_units=True),
        progress.TransferSpeedColumn(),
    )
    with progress.Progress(*columns) as bars:
        task = bars.add_task(output.printable(name), total=size_bytes)
        yield lambda sent: bars.advance(task, sent)
