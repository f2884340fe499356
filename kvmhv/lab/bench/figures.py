"""From measured moves to ratios and targets. Pure."""

from statistics import median
from typing import Any

from kvmhv.lab.bench.cases import Case, Comparison

Measured = dict[str, Any]
"""One move: its round, wall_s, qemu_s, blackout_ms, network_gap_ms, wire_bytes, cpu_s, qemu_cpu_s, and more."""
Rounds = dict[str, list[Measured]]
"""A case's moves by way; those of one round were made one after the other."""


def spread(values: list[float]) -> dict[str, float]:
    """Return median, smallest and largest."""
    return {"median": median(values), "min": min(values), "max": max(values)}


def ratios(rounds: Rounds, comparison: Comparison) -> list[float]:
    """Return the ratio of each round that has both."""
    others = {its["round"]: its for its in rounds.get(comparison.other, ())}
    pairs = [(mine, others[mine["round"]]) for mine in rounds.get(comparison.way, ()) if mine["round"] in others]
    return [mine[comparison.metric] / its[comparison.metric] for mine, its in pairs if its[comparison.metric] > 0]


def compare(case: Case, rounds: Rounds) -> list[dict[str, Any]]:
    """Return the case's comparisons as the JSON has them; those without a round are left out."""
    found = []
    methods = {way.name: way.method for way in case.ways}
    labels = {way.name: way.label for way in case.ways}
    for comparison in case.comparisons:
        values = ratios(rounds, comparison)
        if not values:
            continue
        target = comparison.target
        middle = median(values)
        met = None
        if target is not None:
            met = middle >= target if comparison.at_least else middle <= target
        found.append(
            {
                "name": case.name,
                "metric": comparison.metric,
                "against": methods[comparison.other],
                "ratio_median": round(middle, 3),
                "ratio_min": round(min(values), 3),
                "ratio_max": round(max(values), 3),
                "target": target,
                "met": met,
                "at_least": comparison.at_least,
                "way": labels[comparison.way],
                "other": labels[comparison.other],
                "note": comparison.note,
                "compared": [comparison.way, comparison.other],
                "rounds": len(values),
            }
        )
    return found


def limit(name: str, value: float, unit: str, at_most: float, note: str = "") -> dict[str, Any]:
    """Return one absolute limit and whether it is kept."""
    return {
        "name": name,
        "value": round(value, 4),
        "unit": unit,
        "limit": at_most,
        "met": value <= at_most,
        "note": note,
    }


def limits(all_rounds: dict[str, Rounds]) -> list[dict[str, Any]]:
    """Return the limits that follow from the moves: the agents' CPU time, setup and cleanup."""
    ours = [move for rounds in all_rounds.values() for move in rounds.get("kvmhv", ())]
    raws = [move for rounds in all_rounds.values() for move in rounds.get("raw", ())]
    found = []
    if ours:
        share = median(move["agent_cpu_s"] / move["qemu_cpu_s"] for move in ours if move["qemu_cpu_s"] > 0)
        found.append(limit("the agents' CPU time over a move, as a share of QEMU's", share, "", 0.05))
    if ours and raws:
        start_s = median(move["target_start_s"] for move in raws)
        around_s = median(move["setup_s"] + move["cleanup_s"] for move in ours) - start_s
        note = f"QEMU's own start by hand: {start_s:.3f} s"
        found.append(limit("setup plus cleanup beyond QEMU's own start", around_s, "s", 0.4, note))
    return found
