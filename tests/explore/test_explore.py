"""The handover explored: every interleaving of messages, effects, faults within bounds; mutants that it must find."""

import os

import pytest

from tests.explore.explorer import Explorer, Found
from tests.explore.mutants import MUTANTS, planted
from tests.explore.transitions import Bounds

QUICK = int(os.environ.get("KVMHV_SIM_MOVES", "50000")) < 1000
"""`script/test quick`: one small exploration, and the mistakes that it finds at once."""

BOUNDS = (
    Bounds(faults=1, slow=0, disks=0),
    Bounds(faults=1, slow=0, disks=1),
    Bounds(faults=2, slow=0, disks=0, kinds=frozenset({"kill", "host"})),
    Bounds(faults=3, slow=0, disks=0, kinds=frozenset({"cut", "host"})),
    Bounds(faults=1, slow=1, disks=0, kinds=frozenset({"cut"})),
    Bounds(faults=1, slow=0, disks=0, moves=2, kinds=frozenset({"kill", "cut", "dup"})),
)


def _name(bounds: Bounds) -> str:
    kinds = "all" if bounds.kinds == Bounds().kinds else "-".join(sorted(bounds.kinds))
    return f"{bounds.faults}-faults-{kinds}-{bounds.slow}-slow-{bounds.disks}-disks-{bounds.moves}-moves"


SLOW_TO_FIND = (
    "a source without a copy",
    "any failed effect",
    "an abort is obeyed",
    "a target that ended the move well",
)

HUNTS = (
    Bounds(faults=1, slow=0, disks=0),
    Bounds(faults=1, slow=0, disks=1),
    Bounds(faults=2, slow=0, disks=0, kinds=frozenset({"qemu", "host"})),
    Bounds(faults=0, slow=1, disks=0),
    Bounds(faults=1, slow=1, disks=0, kinds=frozenset({"cut"})),
    Bounds(faults=2, slow=0, disks=1, kinds=frozenset({"host"})),
)


@pytest.mark.parametrize("bounds", BOUNDS[:1] if QUICK else BOUNDS, ids=_name)
def test_every_interleaving_is_safe_and_ends(bounds: Bounds) -> None:
    explorer = Explorer(bounds)
    assert explorer.explore() > 10_000
    assert explorer.ends["done"]
    assert explorer.ends["failed"]


def test_there_are_mistakes_to_find() -> None:
    assert len(MUTANTS) >= 20


@pytest.mark.parametrize("name", [one for one in MUTANTS if not (QUICK and one.startswith(SLOW_TO_FIND))])
def test_the_exploration_finds(name: str) -> None:
    assert hunt(name) is not None, f"nobody noticed: {name}"


def hunt(name: str) -> str | None:
    """Return the shortest trace of a planted mistake."""
    with planted(name):
        for bounds in HUNTS:
            try:
                Explorer(bounds).explore()
            except Found as trace:
                return str(trace)
    return None
