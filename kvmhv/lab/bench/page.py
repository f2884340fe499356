"""The benchmark's result as one self-contained page, and as lines for a terminal. Pure."""

from html import escape
from typing import Any

from kvmhv.lab.bench import effects
from kvmhv.lab.bench.figures import spread
from kvmhv.lab.bench.page_style import STYLE
from kvmhv.lab.bench.plots import breakdown, by_effect, limited_moves, plot, shown

MIB = 1 / 1048576
METRICS = {
    "wall_s": ("whole command", "s", 1.0),
    "qemu_s": ("QEMU's part (disks, memory, state)", "s", 1.0),
    "blackout_ms": ("blackout seen by the guest", "ms", 1.0),
    "network_gap_ms": ("network gap: without an answer to pings", "ms", 1.0),
    "wire_bytes": ("bytes on the wire", "MiB", MIB),
    "cpu_s": ("CPU of everything but QEMU", "s", 1.0),
    "agent_bytes": ("memory of the larger agent", "MiB", MIB),
}
READING = """
<p>Every round moves each guest once by each way, one way after the other, while the others' guests stand still. Each
way has its own guest: the same kernel, memory, CPU model, devices and work, the same QEMU binary, the same shaped link.
The blackout is the longest gap in heartbeats that the guest sends every 2 ms, stamped by the kernel of a third host.
The network gap is the longest time in which that host's pings, one each 10 ms, were not answered. After each move the
guest is asked for damage in its memory and on its disks; one that had any would end the case.</p>
<p><b>What counts as the whole command.</b> By hand: from the start of the target's QEMU to the end of the source's, in
a program that runs already; taps, keys and images are there. virsh: the command, its images made before. kvmhv: the
command with the start of its interpreter, and all that belongs to a move (check, trust, taps, images, the VM's kernel
files, records on both hosts). QEMU's part of virsh is what libvirt says of its job, its own preparations included.</p>
<p>A ratio is that of two moves of the same round; the median of the rounds decides. Dots are single moves, the bar is
their median. What no target depends on is moved in every other round.</p>
"""


def text(result: dict[str, Any]) -> str:
    """Return the comparisons and limits as lines."""
    lines = []
    for one in (*result["comparisons"], *result["own_comparisons"]):
        verdict = "" if one["met"] is None else ("met" if one["met"] else f"MISSED by {_missed_by(one)}")
        sign = ">=" if one["at_least"] else "<="
        target = "" if one["target"] is None else f"{sign} {one['target']:.2f}"
        ratio = f"{one['ratio_median']:.2f} ({one['ratio_min']:.2f} to {one['ratio_max']:.2f})"
        lines.append(f"{one['name']:<15} {one['metric']:<14} {one['way']} / {one['other']}: {ratio} {target} {verdict}")
    for one in result["limits"]:
        verdict = "met" if one["met"] else "MISSED"
        lines.append(
            f"{one['name']}: {one['value']:.3f} {one['unit']} <= {one['limit']} {verdict} {one['note']}".strip()
        )
    lines += [f"{one['case']} BROKE: {one['error']}" for one in result["failures"]]
    return "\n".join(lines) + "\n"


def page(result: dict[str, Any]) -> str:
    """Return the whole page."""
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8>",
        '<meta name=viewport content="width=device-width,initial-scale=1"><title>kvmhv: benchmark</title>',
        f"<style>{STYLE}</style><main><h1>kvmhv beside virsh and QMP by hand</h1>",
        _run_of(result),
        *(f"<p class=no>{escape(one['case'])} broke: {escape(one['error'])}</p>" for one in result["failures"]),
        _told(result),
        "<h2>Ratios and targets</h2>",
        _comparisons(result["comparisons"]),
        "<h2>kvmhv beside itself</h2>" + _comparisons(result["own_comparisons"]) if result["own_comparisons"] else "",
        "<h2>Limits</h2>",
        _limits(result["limits"]),
        _missed(result),
        "<h2>How to read this</h2>",
        READING,
        *(_case(case) for case in result["cases"]),
        limited_moves(result["extras"].get("blackout-limit", [])),
        "</main>",
    ]
    return "\n".join(parts) + "\n"


def _run_of(result: dict[str, Any]) -> str:
    versions = ", ".join(f"{escape(name)} {escape(value)}" for name, value in result["versions"].items())
    loads = [move["load"] for case in result["cases"] for moves in case["moves"].values() for move in moves]
    during = f"; during the run {min(loads):.1f} to {max(loads):.1f}, the guests' own work included" if loads else ""
    machine = result["machine"]
    return (
        f"<p>{escape(result['started'])}, {result['seconds']} s, {result['rounds']} rounds"
        f"{' (quick)' if result['quick'] else ''}; "
        f"kvmhv {escape(result['kvmhv'])}, {versions}; {machine['cpus']} CPU cores, guests under TCG. "
        f"Load of the machine before the run: {machine['load_before']:.1f}{during}.</p>"
    )


def _told(result: dict[str, Any]) -> str:
    """Return how many of the targets are met."""
    every = (*result["comparisons"], *result["own_comparisons"], *result["limits"])
    wanted = [one["met"] for one in every if one["met"] is not None]
    return f"<p><b>{sum(wanted)} of {len(wanted)} targets are met.</b></p>"


def _title(metric: str) -> str:
    return METRICS[metric][0] if metric in METRICS else metric


def _missed_by(one: dict[str, Any]) -> str:
    """Return by how much a target is missed, as a difference of ratios and as a share of the target."""
    by = abs(one["ratio_median"] - one["target"])
    return f"{by:.2f} ({by / one['target']:.0%})"


def _comparisons(comparisons: list[dict[str, Any]]) -> str:
    rows = []
    for one in comparisons:
        verdict = "" if one["met"] is None else "<span class=yes>met</span>"
        if one["met"] is False:
            verdict = f"<span class=no>missed by {_missed_by(one)}</span>"
        sign = "&ge;" if one["at_least"] else "&le;"
        target = "" if one["target"] is None else f"{sign} {one['target']:.2f}"
        rows.append(
            f"<tr><td>{escape(one['name'])}<td class=figure>{escape(_title(one['metric']))}"
            f"<td class=of>{escape(one['way'])} / {escape(one['other'])}<br><small>{escape(one['note'])}</small>"
            f"<td class=n>{one['ratio_median']:.2f}<br><small>{one['ratio_min']:.2f} to {one['ratio_max']:.2f}</small>"
            f"<td class=n>{target}<td>{verdict}"
        )
    head = "<tr><th>case<th>figure<th>ratio of<th class=n>median, range<th class=n>target<th>"
    return f"<div class=wide><table class=comparisons>{head}{''.join(rows)}</table></div>"


def _limits(limits: list[dict[str, Any]]) -> str:
    rows = [
        f"<tr><td>{escape(one['name'])}<br><small>{escape(one['note'])}</small><td class=n>{one['value']:.3f} "
        f"{one['unit']}"
        f"<td class=n>&le; {one['limit']} {one['unit']}<td class={'yes' if one['met'] else 'no'}>"
        f"{'met' if one['met'] else 'missed'}"
        for one in limits
    ]
    return f"<div class=wide><table><tr><th>limit<th class=n>value<th class=n>target<th>{''.join(rows)}</table></div>"


def _missed(result: dict[str, Any]) -> str:
    """Return what was missed, by how much, and where the time goes in both ways."""
    cases = {case["name"]: case for case in result["cases"]}
    every = (*result["comparisons"], *result["own_comparisons"])
    start_s = result["cli_start_s"]
    parts = [_missed_ratio(one, cases[one["name"]], start_s) for one in every if one["met"] is False]
    for one in result["limits"]:
        if not one["met"]:
            over = one["value"] - one["limit"]
            parts.append(
                f"<div class=missed><p><b>{escape(one['name'])}</b>: {one['value']:.3f} {one['unit']}, "
                f"{over:.3f} {one['unit']} over its limit. {escape(one['note'])}</p></div>"
            )
    return "<h2>What is missed, and where the time goes</h2>" + "".join(parts) if parts else ""


def _missed_ratio(one: dict[str, Any], case: dict[str, Any], cli_start_s: float) -> str:
    metric = one["metric"]
    title, unit, factor = METRICS[metric]
    told, tables = [], []
    for way in one["compared"]:
        moves = case["moves"][way]
        middle = spread([move[metric] * factor for move in moves])["median"]
        told.append(f"{escape(case['ways'][way])} {shown(middle)} {unit}")
        tables.append(breakdown(moves, case["ways"][way]))
    effects_of_both = _by_effect(one, case, cli_start_s)
    return (
        f"<div class=missed><p><b>{escape(one['name'])}, {escape(title)}</b>: ratio {one['ratio_median']:.2f}, missed "
        f"by {_missed_by(one)}. Medians: {'; '.join(told)}.</p>{effects_of_both}{''.join(tables)}</div>"
    )


def _by_effect(one: dict[str, Any], case: dict[str, Any], cli_start_s: float) -> str:
    """Return what the two moves of the middle round did with their time; nothing for other figures."""
    way, other = one["compared"]
    pair = effects.middle_round(case["moves"], way, other, one["metric"])
    if pair is None or "effects" not in pair[0]:
        return ""
    mine, its = pair
    ways = case["ways"][way], case["ways"][other]
    if one["metric"] == "wall_s":
        theirs = effects.of_command(its, cli_start_s) if "effects" in its else effects.of_other(its)
        return by_effect(effects.of_command(mine, cli_start_s), theirs, ways, mine["round"] + 1)
    if one["metric"] == "blackout_ms":
        theirs = effects.of_blackout(its) if "effects" in its else {}
        return by_effect(effects.of_blackout(mine), theirs, ways, mine["round"] + 1)
    return ""


def _case(case: dict[str, Any]) -> str:
    parts = [f"<h2>{escape(case['title'])}</h2>"]
    for metric, (title, unit, factor) in METRICS.items():
        moved = {
            way: [move[metric] * factor for move in moves if metric in move] for way, moves in case["moves"].items()
        }
        values = {way: many for way, many in moved.items() if many}
        if values:
            parts.append(f"<h3>{title} ({unit})</h3>{plot(values, case['ways'], unit)}")
    parts.append("<h3>Where the time goes</h3>")
    parts += [breakdown(moves, case["ways"][way]) for way, moves in case["moves"].items()]
    return "".join(parts)
