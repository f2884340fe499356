"""The benchmark's result as one self-contained page, and as lines for a terminal. Pure."""

from html import escape
from typing import Any

from kvmhv.lab.bench.figures import spread

WIDTH, ROW, LABEL, RIGHT = 860, 26, 330, 120
METRICS = (
    ("wall_s", "whole command", "s", 1.0),
    ("blackout_ms", "blackout seen by the guest", "ms", 1.0),
    ("wire_bytes", "bytes on the wire", "MiB", 1 / 1048576),
    ("cpu_s", "CPU of everything but QEMU", "s", 1.0),
)
COLOURS = {"kvmhv": "#2b6cb0", "raw": "#718096", "virsh": "#c05621"}
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1a202c; max-width: 1000px; margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.5em; } h2 { font-size: 1.2em; margin-top: 2em; } h3 { font-size: 1em; margin-bottom: 0; }
table { border-collapse: collapse; margin: .6em 0; } td, th { padding: .2em .7em; text-align: left; }
th { border-bottom: 2px solid #cbd5e0; } td { border-bottom: 1px solid #e2e8f0; } .n { text-align: right; }
.yes { color: #276749; } .no { color: #c53030; font-weight: 600; } small { color: #4a5568; }
"""
READING = """
<p>Every round moves each guest once by each way, one way after the other, while the others' guests stand still. Each
way has its own guest: the same kernel, memory, CPU model, devices and work, the same QEMU binary, the same shaped link.
The blackout is the longest gap in heartbeats that the guest sends every 2 ms, stamped by the kernel of a third host.
After each move the guest is asked for damage in its memory and on its disks; one that had any would end the case.</p>
<p><b>What counts as the whole command.</b> By hand: from the start of the target's QEMU to the end of the source's, in
a program that runs already; taps, keys and images are there. virsh: the command, its images made before. kvmhv: the
command with the start of its interpreter, and all that belongs to a move (check, trust, taps, images, the VM's kernel
files, records on both hosts).</p>
<p>Dots are single moves, the bar is the median. A target that is missed is shown in red.</p>
"""


def text(result: dict[str, Any]) -> str:
    """Return the comparisons and limits as lines."""
    lines = []
    for one in result["comparisons"]:
        verdict = "" if one["met"] is None else ("met" if one["met"] else "MISSED")
        sign = ">=" if one["at_least"] else "<="
        target = "" if one["target"] is None else f"{sign} {one['target']:.2f}"
        ratio = f"{one['ratio_median']:.2f} ({one['ratio_min']:.2f} to {one['ratio_max']:.2f})"
        lines.append(f"{one['name']:<15} {one['metric']:<12} {one['way']} / {one['other']}: {ratio} {target} {verdict}")
    for one in result["limits"]:
        verdict = "met" if one["met"] else "MISSED"
        lines.append(f"{one['name']}: {one['value']:.3f} {one['unit']} <= {one['limit']} {verdict}")
    lines += [f"{one['case']} broke: {one['error']}" for one in result["failures"]]
    return "\n".join(lines) + "\n"


def page(result: dict[str, Any]) -> str:
    """Return the whole page."""
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><title>kvmhv: benchmark</title>",
        f"<style>{STYLE}</style><h1>kvmhv beside virsh and QMP by hand</h1>",
        _run_of(result),
        READING,
        "<h2>Ratios and targets</h2>",
        _comparisons(result["comparisons"]),
        _limits(result["limits"]),
        *(f"<p class=no>{escape(one['case'])} broke: {escape(one['error'])}</p>" for one in result["failures"]),
        *(_case(case) for case in result["cases"]),
    ]
    return "\n".join(parts) + "\n"


def _run_of(result: dict[str, Any]) -> str:
    versions = ", ".join(f"{escape(name)} {escape(value)}" for name, value in result["versions"].items())
    loads = [move["load"] for case in result["cases"] for moves in case["moves"].values() for move in moves]
    during = f"; during the run {min(loads):.1f} to {max(loads):.1f}, the guests' own work included" if loads else ""
    machine = result["machine"]
    return (
        f"<p>{escape(result['started'])}, {result['seconds']} s, {result['rounds']} rounds; "
        f"kvmhv {escape(result['kvmhv'])}, {versions}; {machine['cpus']} CPU cores, guests under TCG. "
        f"Load of the machine before the run: {machine['load_before']:.1f}{during}.</p>"
    )


def _comparisons(comparisons: list[dict[str, Any]]) -> str:
    rows = []
    for one in comparisons:
        verdict = (
            ""
            if one["met"] is None
            else ("<span class=yes>met</span>" if one["met"] else "<span class=no>missed</span>")
        )
        sign = "&ge;" if one["at_least"] else "&le;"
        target = "" if one["target"] is None else f"{sign} {one['target']:.2f}"
        rows.append(
            f"<tr><td>{escape(one['name'])}<td>{escape(one['metric'])}"
            f"<td>{escape(one['way'])} / {escape(one['other'])}<br><small>{escape(one['note'])}</small>"
            f"<td class=n>{one['ratio_median']:.2f}<td class=n>{one['ratio_min']:.2f} to {one['ratio_max']:.2f}"
            f"<td class=n>{target}<td>{verdict}"
        )
    head = "<tr><th>case<th>figure<th>ratio of<th>median<th>range<th>target<th>"
    return f"<table>{head}{''.join(rows)}</table>"


def _limits(limits: list[dict[str, Any]]) -> str:
    rows = [
        f"<tr><td>{escape(one['name'])}<br><small>{escape(one['note'])}</small><td class=n>{one['value']:.3f} "
        f"{one['unit']}"
        f"<td class=n>&le; {one['limit']} {one['unit']}<td class={'yes' if one['met'] else 'no'}>"
        f"{'met' if one['met'] else 'missed'}"
        for one in limits
    ]
    return f"<table><tr><th>limit<th>value<th>target<th>{''.join(rows)}</table>"


def _case(case: dict[str, Any]) -> str:
    parts = [f"<h2>{escape(case['title'])}</h2>"]
    for metric, title, unit, factor in METRICS:
        values = {way: [move[metric] * factor for move in moves] for way, moves in case["moves"].items() if moves}
        if values:
            parts.append(f"<h3>{title} ({unit})</h3>{plot(values, case['ways'], unit)}")
    parts.append(breakdown(case["moves"].get("kvmhv", [])))
    return "".join(parts)


def plot(values: dict[str, list[float]], labels: dict[str, str], unit: str) -> str:
    """Return a figure with one row a way: its moves as dots, their median as a bar."""
    most = max(max(many) for many in values.values()) or 1.0
    scale = (WIDTH - LABEL - RIGHT) / most
    rows = []
    for number, (way, many) in enumerate(values.items()):
        y = number * ROW + ROW // 2
        colour = COLOURS[way.partition("-")[0]]
        middle = spread(many)["median"]
        rows.append(
            f'<text x="{LABEL - 8}" y="{y + 4}" text-anchor="end" font-size="12">{escape(labels[way])}</text>'
            f'<rect x="{LABEL}" y="{y - 7}" width="{middle * scale:.1f}" height="14" fill="{colour}" opacity=".35"/>'
            f'<text x="{WIDTH - RIGHT + 8}" y="{y + 4}" font-size="12">{middle:.3g} {unit}</text>'
        )
        rows += [
            f'<circle cx="{LABEL + one * scale:.1f}" cy="{y}" r="3" fill="{colour}"><title>{one:.4g}</title></circle>'
            for one in many
        ]
    height = len(values) * ROW
    return f'<svg viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" role="img">{"".join(rows)}</svg>'


def breakdown(moves: list[dict[str, Any]]) -> str:
    """Return where kvmhv's time goes, by the moves' own records: medians of the phases and of the blackout's steps."""
    if not moves:
        return ""
    phases = [name for name in ("setup", "storage", "memory", "state", "cleanup") if name in moves[0]["phases"]]
    cells = [(name, spread([move["phases"].get(name, 0.0) for move in moves])["median"]) for name in phases]
    cells.append(("command around it", spread([move["around_s"] for move in moves])["median"]))
    head = "".join(f"<th>{escape(name)}" for name, _ in cells)
    row = "".join(f"<td class=n>{seconds:.3f} s" for _, seconds in cells)
    steps: dict[str, list[float]] = {}
    for move in moves:
        for step in move["blackout_steps"]:
            steps.setdefault(step["name"], []).append(step["at_ms"])
    told = ", ".join(f"{escape(name)} {spread(many)['median']:.0f} ms" for name, many in steps.items())
    return (
        f"<h3>Where kvmhv's time goes (its own record, medians)</h3><table><tr>{head}<tr>{row}</table>"
        f"<p><small>Blackout, from the order to stop: {told}</small></p>"
    )
