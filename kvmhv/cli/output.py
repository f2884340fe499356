"""What people read and scripts parse: tables on a terminal, aligned lines elsewhere, JSON for `--json`."""

import sys
import time
from collections.abc import Iterable, Sequence
from typing import TextIO

import msgspec

from kvmhv.model import ErrorBody, Finding

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
_UNPRINTABLE = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}


def printable(value: object) -> str:
    """Return a value's text without control characters: names and messages come from elsewhere."""
    return str(value).translate(_UNPRINTABLE)


def say(text: str) -> None:
    """Print a line for people, at once also into a pipe."""
    print(printable(text), flush=True)


def note(text: str) -> None:
    """Print a line beside the output proper."""
    print(printable(text), file=sys.stderr, flush=True)


def emit(value: object) -> None:
    """Print one JSON value: one line, or indented where a person looks at it."""
    data = msgspec.json.encode(value)
    text = msgspec.json.format(data, indent=2) if sys.stdout.isatty() else data
    print(text.decode(), flush=True)


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], file: TextIO | None = None) -> None:
    """Print rows under headings."""
    out = file or sys.stdout
    cells = [[printable("-" if cell is None else cell) for cell in row] for row in rows]
    if out.isatty():
        _draw(columns, cells, out)
        return
    for line in aligned([[column.upper() for column in columns], *cells]):
        print(line, file=out, flush=True)


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows as lines with columns of equal width, two spaces apart; nothing is cut."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return [line.rstrip() for line in lines]


def _draw(columns: Sequence[str], cells: list[list[str]], out: TextIO) -> None:
    from rich import box  # noqa: PLC0415 - only who draws pays for it
    from rich.console import Console  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for column in columns:
        drawn.add_column(Text(column), overflow="fold")
    for row in cells:
        drawn.add_row(*(Text(cell) for cell in row))
    Console(file=out, highlight=False).print(drawn)


def pairs(rows: Iterable[tuple[str, object]]) -> None:
    """Print `name  value` lines."""
    for line in aligned([[name, printable("-" if value is None else value)] for name, value in rows]):
        print(line, flush=True)


def error(body: ErrorBody, *, as_json: bool) -> None:
    """Print an error on stderr, its findings with it; as JSON on stdout too."""
    if as_json:
        emit({"error": body})
    where = f" ({body.host})" if body.host else ""
    note(f"error: {body.message} [{body.code}]{where}")
    if body.findings:
        findings(body.findings, sys.stderr)
    if body.todo:
        note(f"what to do: {body.todo}")


def findings(found: Sequence[Finding], file: TextIO | None = None) -> None:
    """Print a check's findings, errors first."""
    ordered = sorted(found, key=lambda finding: finding.severity != "error")
    rows = [(item.severity, item.id, item.object, item.host, item.text, item.todo) for item in ordered]
    table(("severity", "finding", "object", "host", "what", "what to do"), rows, file)


# --- quantities ---------------------------------------------------------------------------------------------------


def size_text(size_bytes: float | None) -> str:
    """Return `1.5 GiB`; `-` for what is not known."""
    if size_bytes is None:
        return "-"
    value, unit = float(size_bytes), 0
    while abs(value) >= 1024 and unit < len(_UNITS) - 1:
        value, unit = value / 1024, unit + 1
    return f"{value:.0f} {_UNITS[unit]}" if value == int(value) else f"{value:.1f} {_UNITS[unit]}"


def rate_text(bytes_per_s: float | None) -> str:
    """Return `12.0 MiB/s`; `-` for what is not known."""
    return "-" if bytes_per_s is None else f"{size_text(bytes_per_s)}/s"


def seconds_text(seconds: float | None) -> str:
    """Return `0.42 s`, `1 min 05 s` or `2 h 03 min`; `-` for what is not known."""
    if seconds is None:
        return "-"
    if seconds < 60:
        return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


def time_text(unix_s: float | None) -> str:
    """Return a moment in this machine's time zone; `-` for what is not known."""
    return "-" if unix_s is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(unix_s))
