"""How a running move looks: a display on a terminal, a line for each phase and pass elsewhere, nothing for scripts."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from kvmhv.cli import output
from kvmhv.cli.move_report import ends_of, queue_text
from kvmhv.model import Estimate, MoveReport, Outcome, Pass, Phase

if TYPE_CHECKING:
    from rich.console import RenderableType

PHASES = tuple(Phase)
BAR_WIDTH = 40
PASS_LIMIT = "pass-limit"  # noqa: S105 - a reason, not a password


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
        source, target = ends_of(new)
        lines.append((-1, f"move {new.id}: {new.vm} from {source} to {target}"))
    if new.queue is not None:
        waited_before = old is not None and old.queue is not None and queue_text(old.queue) == queue_text(new.queue)
        return [text for _, text in lines] + ([] if waited_before else [queue_text(new.queue)])
    reached = -1 if old is None or old.queue is not None else PHASES.index(old.phase)
    lines += [(PHASES.index(phase), f"phase {phase}") for phase in _begun(new) if PHASES.index(phase) > reached]
    lines += _storage_news(old, new)
    after_memory = PHASES.index(Phase.MEMORY) + 0.5
    for done in new.passes[len(old.passes) if old else 0 :]:
        lines.append((after_memory, pass_text(done)))
    ended = bool(new.passes) and (old is None or len(new.passes) > len(old.passes))
    if new.estimate is not None and (ended or (_limit_in_sight(new) and not _limit_in_sight(old))):
        lines.append((after_memory if ended else PHASES.index(new.phase) + 0.4, expectation(new.estimate)))
    if new.switchover is not None and (old is None or old.switchover is None):
        text = f"switchover after pass {new.switchover.pass_number}: {new.switchover.reason}"
        lines.append((after_memory, text))
    if new.phase is Phase.PAGES and (old is None or old.phase is not Phase.PAGES):
        text = f"the guest runs on {new.target}, and lacks pages that are still on {new.source}"
        lines.append((PHASES.index(Phase.PAGES) + 0.5, text))
    if new.pages is not None and new.pages.complete and not (old is not None and old.pages and old.pages.complete):
        text = f"the last page is on {new.target}, {output.seconds_text(new.pages.seconds)} later"
        lines.append((PHASES.index(Phase.PAGES) + 0.6, text))
    for warning in new.warnings[len(old.warnings) if old else 0 :]:
        lines.append((len(PHASES), f"warning: {warning}"))
    return [text for _, text in sorted(lines, key=lambda line: line[0])]


def _limit_in_sight(report: MoveReport | None) -> bool:
    """Whether a move will end by the pass limit as it goes now: said as soon as it is known, not after a long pass."""
    return report is not None and report.estimate is not None and report.estimate.switchover == PASS_LIMIT


def _begun(report: MoveReport) -> list[Phase]:
    ended = {done.phase for done in report.phases}
    return [phase for phase in PHASES if phase in ended or phase is report.phase]


def _storage_news(old: MoveReport | None, new: MoveReport) -> list[tuple[float, str]]:
    """A line for each tenth of the disks: their copy is the longest silence of a move."""
    tenth = _tenth(new)
    if tenth == 0 or tenth == _tenth(old):
        return []
    copied, total = output.size_text(new.storage_copied_bytes), output.size_text(new.storage_total_bytes)
    left = "" if new.estimate is None else f", {left_text(new.estimate)}"
    return [(PHASES.index(Phase.STORAGE) + 0.5, f"disks: {copied} of {total} copied ({tenth}0 %){left}")]


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


def left_text(seen: Estimate) -> str:
    """Return how long a move will still take, and between what."""
    low, high = output.seconds_text(seen.seconds_low), output.seconds_text(seen.seconds_high)
    return f"about {output.seconds_text(seen.seconds_likely)} left ({low} to {high})"


def expectation(seen: Estimate) -> str:
    """Return how the move will go on, as a line."""
    blackout = output.seconds_text(seen.blackout_ms / 1000)
    why = "the pass limit" if seen.switchover == PASS_LIMIT else "the threshold"
    return f"{left_text(seen)}; {why} will end the passes after pass {seen.passes}, with a blackout of about {blackout}"


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
        self._last: MoveReport | None = None

    def show(self, report: MoveReport) -> None:
        """Draw the report."""
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
        if report.queue is not None:
            return Text("queued", style="bold")
        number = f", pass {len(report.passes) + 1}" if report.phase is Phase.MEMORY else ""
        seen = report.estimate
        line = Table.grid(padding=(0, 2))
        line.add_row(
            Text(f"{report.phase}{number}", style="bold"),
            ProgressBar(total=1.0, completed=report.progress, width=BAR_WIDTH),
            Text(f"{report.progress * 100:.0f} %"),
            Text(f"{output.size_text(_remaining_bytes(report))} remain"),
            Text(output.rate_text(report.throughput_bytes_per_s or None)),
            Text("" if seen is None else f"about {output.seconds_text(seen.seconds_likely)} left"),
        )
        return line


def _remaining_bytes(report: MoveReport) -> int:
    """Return what the running phase has still to send, of disks or of memory."""
    if report.phase is Phase.STORAGE:
        return max(0, report.storage_total_bytes - report.storage_copied_bytes)
    return report.remaining_bytes


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
