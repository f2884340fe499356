"""Figures of the benchmark's page: what each move took, and where kvmhv's time goes. Pure."""

from html import escape
from typing import Any

from kvmhv.lab.bench.effects import REST
from kvmhv.lab.bench.figures import Measured, spread

PHASES = ("setup", "storage", "memory", "state", "cleanup")
AROUND = "command around it"
SEEN_MS = 0.05
"""Less is not worth a line."""


def shown(value: float) -> str:
    """Return a figure with three digits that count, and all before its point."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def plot(values: dict[str, list[float]], labels: dict[str, str], unit: str) -> str:
    """Return a figure with one row a way: its moves as dots, their median as a bar."""
    most = max(max(many) for many in values.values()) or 1.0
    rows = []
    for way, many in values.items():
        middle = spread(many)["median"]
        told = f"{labels[way]}: median {shown(middle)} {unit}, {shown(min(many))} to {shown(max(many))}"
        dots = "".join(f'<i style="left:{one / most:.2%}" title="{shown(one)} {unit}"></i>' for one in many)
        rows.append(
            f"<div class=way>{escape(labels[way])}</div>"
            f'<div class="track {way.partition("-")[0]}" role=img aria-label="{escape(told)}">'
            f'<b style="width:{middle / most:.2%}"></b>{dots}</div><div class=n>{shown(middle)} {unit}</div>'
        )
    return f"<div class=plot>{''.join(rows)}</div>"


def steps_s(moves: list[Measured]) -> dict[str, float]:
    """Return where the time of a way goes: medians of kvmhv's own record, of the steps by hand, of libvirt's figure."""
    if "phases" in moves[0]:
        found = {name: _median([move["phases"].get(name, 0.0) for move in moves]) for name in PHASES}
        found[AROUND] = _median([move["around_s"] for move in moves])
        return {name: seconds for name, seconds in found.items() if seconds}
    if "steps" in moves[0]:
        return {name: _median([move["steps"][name] for move in moves]) for name in moves[0]["steps"]}
    job_s = _median([move["qemu_s"] for move in moves])
    return {"libvirt's job": job_s, AROUND: _median([move["wall_s"] for move in moves]) - job_s}


def blackout_steps_ms(moves: list[Measured]) -> dict[str, float]:
    """Return the moments of the blackout, from the order to stop, by kvmhv's own record: medians, in their order."""
    steps: dict[str, list[float]] = {}
    for move in moves:
        for step in move.get("blackout_steps", ()):
            steps.setdefault(step["name"], []).append(step["at_ms"])
    return dict(sorted(((name, _median(many)) for name, many in steps.items()), key=lambda one: one[1]))


def breakdown(moves: list[Measured], label: str) -> str:
    """Return where the time of a way goes as a table, with its blackout's moments."""
    if not moves:
        return ""
    seconds = steps_s(moves)
    head = "".join(f"<th>{escape(name)}" for name in seconds)
    row = "".join(f"<td class=n>{one:.3f} s" for one in seconds.values())
    told = ", ".join(f"{escape(name)} {at:.0f} ms" for name, at in blackout_steps_ms(moves).items())
    blackout = f"<p><small>Blackout, from the order to stop: {told}</small></p>" if told else ""
    return (
        f"<p><small>{escape(label)}, medians:</small></p>"
        f"<div class=wide><table><tr>{head}<tr>{row}</table></div>{blackout}"
    )


def by_effect(mine: dict[str, float], theirs: dict[str, float], ways: tuple[str, str], number: int) -> str:
    """Return the parts of two moves, in ms, beside each other: kvmhv's in their order, the other's, the rest.

    The difference is told where both are known by the same parts.
    """
    most = max([*mine.values(), 1.0])
    alike = len(mine.keys() & theirs.keys() - {REST}) > 1
    rows = []
    for part in sorted(dict.fromkeys([*mine, *theirs]), key=lambda part: part == REST):
        if max(abs(parts.get(part, 0.0)) for parts in (mine, theirs)) < SEEN_MS:
            continue
        cells = [_ms(parts.get(part)) for parts in (mine, theirs)]
        more = _ms(mine.get(part, 0.0) - theirs.get(part, 0.0), sign="+") if alike else ""
        bar = f'<div class="track kvmhv"><b style="width:{max(0.0, mine.get(part, 0.0)) / most:.2%}"></b></div>'
        rows.append(f"<tr><td>{escape(part)}<td class=n>{cells[0]}<td class=n>{cells[1]}<td class=n>{more}<td>{bar}")
    whole, other = sum(mine.values()), sum(theirs.values()) if theirs else None
    more = "" if other is None else _ms(whole - other, sign="+")
    rows.append(f"<tr><th>all of it<th class=n>{_ms(whole)}<th class=n>{_ms(other)}<th class=n>{more}<th>")
    head = "".join(f"<th class=n>{escape(way)}, ms" for way in ways)
    return (
        f"<p>By effect, the round with the middle ratio (round {number}):</p><div class=wide><table class=effects>"
        f"<tr><th>what{head}<th class=n>more, ms<th>{''.join(rows)}</table></div>"
    )


def limited_moves(moves: list[dict[str, Any]]) -> str:
    """Return the moves with a limit to the blackout, each with what it said and what became of it."""
    rows = []
    for number, one in enumerate(moves, 1):
        report = one["report"]
        code = (report["error"] or {}).get("code") or report["outcome"]
        switchover = report["switchover"] or {}
        slowed = f"{report['throttle_percent']} %" if report["throttle_percent"] else ""
        ended = "moved" if report["outcome"] == "done" else code
        rows.append(
            f"<tr><td class=n>{number}<td class=n>{one['dirty_mib_per_s']} MiB/s<td>{escape(one['rate'])}"
            f"<td>{escape(one['on_overrun'])}<td>{escape(ended)}<td class=n>{slowed}"
            f"<td class=n>{_ms(switchover.get('predicted_ms'))}<td class=n>{_ms(report['blackout_ms'])}"
            f"<td class=n>{_ms(one['seen_ms'])}"
        )
    head = "<tr><th>move<th>dirtied<th>link<th>if too long<th>ended<th>slowed by<th>expected, ms<th>blackout, ms"
    title = "<h2>Moves with a limit to the blackout</h2>"
    table = f"{head}<th>longest gap in the guest's heartbeats, ms{''.join(rows)}"
    return f"{title}<div class=wide><table>{table}</table></div>" if rows else ""


def _ms(value: float | None, sign: str = "") -> str:
    return "" if value is None else f"{value:{sign}.0f}"


def _median(values: list[Any]) -> float:
    return spread(values)["median"]
