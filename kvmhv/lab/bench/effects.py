"""Where the time of one whole command goes, by effect, from the record that the move keeps of itself. Pure."""

from collections.abc import Iterable
from itertools import pairwise
from statistics import median

from kvmhv.lab.bench.figures import Measured, Rounds

INTERPRETER = "start of the command, as of kvmhv --help"
REQUEST = "request, admission"
CONNECTION = "connection to the other agent"
CHECK = "check by both hosts"
OFFER = "offer and its acceptance"
FILES = "kernel files to the target"
TARGET_QEMU = "start of the target's QEMU, taps, settings"
DISKS = "copy of the disks"
BEFOREHAND = "settings, key and connection of the source's QEMU"
FIRST = "first pass"
FURTHER = "further passes"
SWITCHOVER = "switchover, from the order to stop to run at the target"
SOURCE_QEMU = "end of the source's QEMU"
RECORDS = "records of both hosts"
JOURNAL = "journal on disk"
ANSWER = "last answer, end of the command"
JOB = "libvirt's job: preparations, memory, switchover"
AROUND = "virsh and libvirt around it"
REST = "rest"

SOURCE = {
    "Journal": JOURNAL,
    "connect": CONNECTION,
    "SendFiles": FILES,
    "MirrorDisks": DISKS,
    "EndCopy": SOURCE_QEMU,
    "RemoveCopy": RECORDS,
}
TARGET = {"Prepare": ("await Ready", TARGET_QEMU), "Adopt": ("await Owned", RECORDS)}
"""Effects of the target, each with what the source waits for meanwhile, and which ends with it."""
WAITED = {"await Answer": CHECK, "await Ready": OFFER, "await Owned": RECORDS}
"""What lasts longer than what is in it: it has only what nothing else has."""

Span = tuple[str, float, float]
"""A part, and from when to when it lasted, in ms since the command was given."""


def of_command(move: Measured, cli_start_s: float) -> dict[str, float]:
    """Return the parts of kvmhv's whole command in ms: their sum is its time, and what none of them has is the rest."""
    wall_ms, begun_ms = move["wall_s"] * 1000, move["before_s"] * 1000
    outside: list[Span] = [
        (INTERPRETER, 0.0, min(cli_start_s * 1000, begun_ms)),
        (REQUEST, 0.0, begun_ms),
        (ANSWER, wall_ms - move["after_s"] * 1000, wall_ms),
    ]
    phases = {"state": SWITCHOVER, "memory": BEFOREHAND}
    inside = [(phases[phase], begun, end) for phase, begun, end in _phases(move, begun_ms) if phase in phases]
    known = [*_passes(move, begun_ms), *_effects(move, begun_ms), *inside, *outside]
    return _partition(known, wall_ms)


def of_other(move: Measured) -> dict[str, float]:
    """Return what is known of the same by hand, in the same words; of virsh, what libvirt says of its job."""
    wall_ms = move["wall_s"] * 1000
    if "steps" not in move:
        return {JOB: move["qemu_s"] * 1000, AROUND: wall_ms - move["qemu_s"] * 1000}
    found = {part: seconds * 1000 for part, seconds in move["steps"].items()}
    return {**found, REST: wall_ms - sum(found.values())}


def of_blackout(move: Measured) -> dict[str, float]:
    """Return the parts of the blackout that the guest saw, in ms: kvmhv's own moments, and what lies beyond them."""
    found: dict[str, float] = {}
    before_ms = 0.0
    for step in move["blackout_steps"]:
        if step["at_ms"] <= move["reported_blackout_ms"] + 0.01:
            found[f"until {step['name']}"] = step["at_ms"] - before_ms
            before_ms = step["at_ms"]
    found["before the order and until its frames are seen again"] = move["blackout_ms"] - before_ms
    return found


def middle_round(rounds: Rounds, way: str, other: str, metric: str) -> tuple[Measured, Measured] | None:
    """Return the two moves of the round whose ratio is the median, or the next one to it; None without a round."""
    others = {its["round"]: its for its in rounds.get(other, ())}
    pairs = [(mine, others[mine["round"]]) for mine in rounds.get(way, ()) if mine["round"] in others]
    ratios = [mine[metric] / its[metric] if its[metric] else 0.0 for mine, its in pairs]
    if not pairs:
        return None
    middle = median(ratios)
    return min(zip(ratios, pairs, strict=True), key=lambda one: abs(one[0] - middle))[1]


def _phases(move: Measured, begun_ms: float) -> Iterable[Span]:
    at_ms = begun_ms
    for phase, seconds in move["phases"].items():
        yield phase, at_ms, at_ms + seconds * 1000
        at_ms += seconds * 1000


def _passes(move: Measured, begun_ms: float) -> Iterable[Span]:
    """Return the passes: the last one ends with the phase."""
    for phase, _, end_ms in _phases(move, begun_ms):
        if phase == "memory":
            for number in reversed(range(len(move["passes_s"]))):
                pass_begun_ms = end_ms - sum(move["passes_s"][number:]) * 1000
                yield (FURTHER if number else FIRST), pass_begun_ms, pass_begun_ms + move["passes_s"][number] * 1000


def _effects(move: Measured, begun_ms: float) -> Iterable[Span]:
    """Return what was under way by the record of the source, and in it what the target's says."""
    spans = [(one["effect"], begun_ms + one["at_ms"], one["took_ms"]) for one in move["effects"]]
    for name, at_ms, took_ms in spans:
        if name in SOURCE:
            yield SOURCE[name], at_ms, at_ms + took_ms
    ends = {name: at_ms + took_ms for name, at_ms, took_ms in spans}
    for one in move.get("target_effects", ()):
        wait, part = TARGET.get(one["effect"], (None, ""))
        if wait in ends:
            yield part, ends[wait] - one["took_ms"], ends[wait]
    for name, at_ms, took_ms in spans:
        if name in WAITED:
            yield WAITED[name], at_ms, at_ms + took_ms


def _partition(spans: Iterable[Span], wall_ms: float) -> dict[str, float]:
    """Return how much each part has of the whole: what several cover is the first one's."""
    known = [(part, max(0.0, begun), min(end, wall_ms)) for part, begun, end in spans]
    cuts = sorted({0.0, wall_ms, *(at for _, begun, end in known for at in (begun, end) if 0.0 <= at <= wall_ms)})
    found: dict[str, float] = {}
    rest_ms = 0.0
    for begun, end in pairwise(cuts):
        part = next((part for part, since, until in known if since <= begun and end <= until), None)
        if part is None:
            rest_ms += end - begun
        else:
            found[part] = found.get(part, 0.0) + end - begun
    return {**found, REST: rest_ms}
