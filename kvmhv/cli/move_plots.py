"""The plots of a move's page, as SVG: phases on a line, passes over time, the blackout step by step.

Colours come from the page's style sheet by class, so the plots follow light, dark and paper. Each is drawn twice, for a
wide page and for a telephone, and the style sheet shows one of them. Every figure that is drawn stands in a table too.
"""

from collections.abc import Callable, Iterable, Sequence
from html import escape

from kvmhv.cli import output
from kvmhv.model import BlackoutStep, Pass, PhaseTime

WIDE, NARROW = 920, 360
LEFT, RIGHT = 78, 16
PHASE_HEIGHT = 34
PLOT_HEIGHT = 150
UPPER = 36
STEP_HEIGHT = 26
STEP_NAME_WIDTH = 300
STEP_MS_WIDTH = 84
GAPS = ("first-frame", "first-answer")
"""Steps after the blackout's end."""
LABEL_MIN = 66
"""A phase that is narrower than this has its name in the table only."""
TICKS_WIDE, TICKS_NARROW = 5, 3


def phases(done: Sequence[PhaseTime]) -> str:
    """Return the phases as parts of one line, as long as they took."""
    return _both(lambda width: _phases(done, width))


def passes(done: Sequence[Pass]) -> str:
    """Return what remained and how fast it went, over the time of the memory phase."""
    return _both(lambda width: _passes(done, width))


def blackout(steps: Sequence[BlackoutStep], names: dict[str, str]) -> str:
    """Return the blackout as a cascade: each step from where the one before it ended."""
    return _both(lambda width: _blackout(steps, names, width))


def _both(draw: Callable[[int], str]) -> str:
    return f'<div class="plot wide">{draw(WIDE)}</div><div class="plot narrow">{draw(NARROW)}</div>'


def _phases(done: Sequence[PhaseTime], full: int) -> str:
    total_s = sum(one.seconds for one in done) or 1.0
    parts, left = [], 0.0
    for one in done:
        width = full * one.seconds / total_s
        label = f"{one.phase} {output.seconds_text(one.seconds)}"
        parts.append(
            f'<rect class="phase-{one.phase}" x="{left:.1f}" y="0" width="{max(width, 1.5):.1f}" '
            f'height="{PHASE_HEIGHT}"><title>{escape(label)}</title></rect>'
        )
        if width >= max(LABEL_MIN, 8 * len(label)):
            parts.append(f'<text class="on-phase" x="{left + 10:.1f}" y="22">{escape(label)}</text>')
        left += width
    return _svg(full, PHASE_HEIGHT, "The phases of the move, as long as they took", parts)


def _passes(done: Sequence[Pass], full: int) -> str:
    inner = full - LEFT - RIGHT
    total_s = sum(one.seconds for one in done) or 1.0
    remaining, sent, dirty = _curves(done)
    top = _axis_max(value for _, value in remaining)
    fast = _axis_max(value for _, value in (*sent, *dirty))
    lower = UPPER + PLOT_HEIGHT + 52
    parts = [
        '<text class="name" x="0" y="12">remaining</text>',
        *_grid(UPPER, top, inner, output.size_text),
        f'<path class="area" d="{_path(remaining, total_s, top, UPPER, inner)} L{LEFT + inner} {UPPER + PLOT_HEIGHT} '
        f'L{LEFT} {UPPER + PLOT_HEIGHT} Z"/>',
        f'<path class="line-remaining" d="{_path(remaining, total_s, top, UPPER, inner)}"/>',
        *_pass_marks(done, total_s, inner, lower + PLOT_HEIGHT),
        f'<text class="name" x="0" y="{lower - 18}">rate</text>',
        f'<text class="key-sent" x="{LEFT}" y="{lower - 18}">&#9632; sent</text>',
        f'<text class="key-dirty" x="{LEFT + 70}" y="{lower - 18}">&#9632; dirtied by the guest</text>',
        *_grid(lower, fast, inner, output.rate_text),
        f'<path class="line-sent" d="{_path(sent, total_s, fast, lower, inner)}"/>',
        f'<path class="line-dirty" d="{_path(dirty, total_s, fast, lower, inner)}"/>',
        *_times(total_s, inner, lower + PLOT_HEIGHT + 18),
    ]
    return _svg(full, lower + PLOT_HEIGHT + 26, "What remained after each pass, and the rates, over time", parts)


Curve = list[tuple[float, float]]


def _curves(done: Sequence[Pass]) -> tuple[Curve, Curve, Curve]:
    """(time, value): what remains falls during a pass and jumps to what was dirtied meanwhile; rates are steps."""
    remaining: Curve = []
    sent: Curve = []
    dirty: Curve = []
    at_s, to_send = 0.0, float(done[0].sent_bytes) if done else 0.0
    for one in done:
        end_s = at_s + one.seconds
        remaining += [(at_s, to_send), (end_s, 0.0)]
        sent += [(at_s, one.bytes_per_second), (end_s, one.bytes_per_second)]
        dirty += [(at_s, one.dirty_bytes_per_second), (end_s, one.dirty_bytes_per_second)]
        at_s, to_send = end_s, float(one.remaining_bytes)
    remaining.append((at_s, to_send))
    return remaining, sent, dirty


def _path(curve: Curve, total_s: float, top: float, y: float, inner: float) -> str:
    points = (
        f"{LEFT + inner * at_s / total_s:.1f} {y + PLOT_HEIGHT * (1 - min(1.0, value / top)):.1f}"
        for at_s, value in curve
    )
    return "M" + " L".join(points)


def _grid(y: float, top: float, inner: float, text: Callable[[float], str]) -> list[str]:
    parts = []
    for step in range(3):
        at = y + PLOT_HEIGHT * step / 2
        value = top * (1 - step / 2)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{LEFT + inner}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text class="axis" x="{LEFT - 8}" y="{at + 4:.1f}">{escape(text(value))}</text>')
    return parts


def _pass_marks(done: Sequence[Pass], total_s: float, inner: float, bottom: float) -> list[str]:
    parts, at_s, last_x = [], 0.0, -100.0
    for one in done:
        middle = LEFT + inner * (at_s + one.seconds / 2) / total_s
        at_s += one.seconds
        x = LEFT + inner * at_s / total_s
        parts.append(f'<line class="pass" x1="{x:.1f}" x2="{x:.1f}" y1="{UPPER}" y2="{bottom}"/>')
        if middle - last_x > 16:
            parts.append(f'<text class="pass-number" x="{middle:.1f}" y="{UPPER - 8}">{one.number}</text>')
            last_x = middle
    return parts


def _times(total_s: float, inner: float, y: float) -> list[str]:
    parts, ticks = [], TICKS_WIDE if inner > NARROW else TICKS_NARROW
    for step in range(ticks + 1):
        anchor = "start" if step == 0 else "end" if step == ticks else "middle"
        x = LEFT + inner * step / ticks
        text = output.seconds_text(total_s * step / ticks)
        parts.append(f'<text class="time" x="{x:.1f}" y="{y}" text-anchor="{anchor}">{escape(text)}</text>')
    return parts


def _blackout(steps: Sequence[BlackoutStep], names: dict[str, str], full: int) -> str:
    """A narrow page has the names above the bars."""
    total_ms = max((one.at_ms for one in steps), default=1.0) or 1.0
    above = full <= NARROW
    left, height = (0, STEP_HEIGHT + 18) if above else (STEP_NAME_WIDTH, STEP_HEIGHT)
    inner = full - left - (0 if above else STEP_MS_WIDTH)
    parts, before_ms = [], 0.0
    for row, one in enumerate(steps):
        y = row * height
        x = left + inner * before_ms / total_ms
        width = max(inner * (one.at_ms - before_ms) / total_ms, 2.0)
        kind = "gap" if one.name in GAPS else "step"
        bar_y = y + 24 if above else y + 5
        parts.append(f'<text class="row" x="0" y="{y + 17}">{escape(names.get(one.name, one.name))}</text>')
        parts.append(
            f'<line class="grid" x1="{left}" x2="{left + inner}" y1="{y + height - 0.5}" y2="{y + height - 0.5}"/>'
        )
        parts.append(f'<rect class="{kind}" x="{x:.1f}" y="{bar_y}" width="{width:.1f}" height="15" rx="2"/>')
        parts.append(f'<text class="ms" x="{full}" y="{y + 17}">{one.at_ms:.1f} ms</text>')
        before_ms = one.at_ms
    return _svg(full, len(steps) * height, "The steps of the blackout, from the order to stop", parts)


def _axis_max(values: Iterable[float]) -> float:
    """Return a round number of bytes at or above all values."""
    top = max([*values, 1.0])
    unit = 1.0
    while top / unit >= 1024:
        unit *= 1024
    for step in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1024):
        if top <= step * unit:
            return step * unit
    return top


def _svg(width: int, height: float, title: str, parts: Iterable[str]) -> str:
    return (
        f'<svg viewBox="0 0 {width} {height:.0f}" role="img"><title>{escape(title)}</title>' + "".join(parts) + "</svg>"
    )
