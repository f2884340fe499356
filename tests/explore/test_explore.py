"""The handover explored: every interleaving of messages, effects, faults within bounds; mutants that it must find."""

import gc
import os
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any

import numpy as np
import pytest

from tests.explore.explorer import Explorer, Found, NeverEnds, check_that_it_ends
from tests.explore.mutants import MUTANTS, PAGES, planted
from tests.explore.transitions import KINDS, MEMORY_LINK, Bounds

QUICK = int(os.environ.get("KVMHV_SIM_MOVES", "50000")) < 1000
"""`script/test quick`: one small exploration, and the mistakes that it finds at once."""

WITH_SLOW = KINDS | {"slow"}
BOUNDS = (
    Bounds(faults=3, disks=1, move=0),
    Bounds(faults=3, disks=1, move=1),
    Bounds(faults=2, disks=1, kinds=WITH_SLOW),
    Bounds(faults=3, disks=0, move=0),
    Bounds(faults=3, disks=0, move=1),
    Bounds(faults=3, disks=0, kinds=frozenset({"cut", "slow"})),
    Bounds(faults=1, disks=1, kinds=WITH_SLOW | {MEMORY_LINK}, post_copy=True),
    Bounds(faults=2, disks=0, kinds=frozenset({"slow", MEMORY_LINK}), post_copy=True),
    Bounds(faults=2, disks=0, kinds=frozenset({"kill", MEMORY_LINK}), post_copy=True),
    Bounds(faults=2, disks=0, kinds=frozenset({"qemu", "host", MEMORY_LINK}), post_copy=True),
)
SMALL = Bounds(faults=1, disks=0)


def _name(bounds: Bounds) -> str:
    kinds = (
        "all" if bounds.kinds == KINDS else "all-and-slow" if bounds.kinds > KINDS else "-".join(sorted(bounds.kinds))
    )
    name = f"{bounds.faults}-faults-{kinds}-{bounds.disks}-disks-{('there', 'back')[bounds.move]}"
    return f"{name}-post-copy" if bounds.post_copy else name


SLOW_TO_FIND = (
    "a source without a copy",
    "any failed effect",
    "an abort is obeyed",
    "a target that ended the move well",
)

HUNTS = (
    Bounds(faults=1, disks=0),
    Bounds(faults=1, disks=1),
    Bounds(faults=2, disks=1, kinds=frozenset({"qemu", "host"})),
    Bounds(faults=2, disks=0, kinds=frozenset({"cut", "slow"})),
)

PAGES_HUNTS = (
    Bounds(faults=1, disks=0, kinds=frozenset({"qemu", "host", MEMORY_LINK}), post_copy=True),
    Bounds(faults=1, disks=1, kinds=KINDS, post_copy=True),
)


@pytest.fixture(scope="module")
def found(request: pytest.FixtureRequest) -> Iterator[dict[str, Future[Any]]]:
    """What comes of each of the chosen tests, by its name: worked at on every core at once."""
    chosen = [item for item in request.session.items if isinstance(item, pytest.Function) and item.path == request.path]
    with ProcessPoolExecutor(os.cpu_count(), initializer=gc.disable) as pool:
        futures: dict[str, Future[Any]] = {}
        for item in chosen:
            parameters = item.callspec.params if hasattr(item, "callspec") else {}
            if "bounds" in parameters:
                futures[item.name] = pool.submit(explored, parameters["bounds"])
            elif "name" in parameters:
                futures[item.name] = pool.submit(hunt, parameters["name"])
        yield futures
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("bounds", [SMALL] if QUICK else BOUNDS, ids=_name)
def test_every_interleaving_is_safe_and_ends(
    bounds: Bounds, found: dict[str, Future[Any]], request: pytest.FixtureRequest
) -> None:
    worlds, ends, ways_back = found[request.node.name].result()
    assert worlds > 10_000
    assert ends["done"]
    assert ends["failed"]
    assert ways_back == 1, "what the first move went through must not matter to the way back, which is explored alone"


def test_there_are_mistakes_to_find() -> None:
    assert len(MUTANTS) >= 20


@pytest.mark.parametrize("name", [one for one in MUTANTS if not (QUICK and one.startswith(SLOW_TO_FIND))])
def test_the_exploration_finds(name: str, found: dict[str, Future[Any]], request: pytest.FixtureRequest) -> None:
    assert found[request.node.name].result(), f"nobody noticed: {name}"


def test_what_is_found_is_told_with_the_steps_that_led_there() -> None:
    with planted("the grant is not journalled"), pytest.raises(Found) as found:
        Explorer(SMALL).explore()
    told = str(found.value).splitlines()
    assert told[-1] == "Violation: a grant that is not journalled"
    assert [line.strip() for line in told[1:-1:2]] == [
        "host1 notices PassStarted",
        "QEMU waits before the device state",
        "host1 notices PreSwitchover",
        "host1 did ContinueSwitchover",
        "all is loaded at the target",
        "all is sent",
    ]


def test_a_circle_never_ends_and_is_told() -> None:
    level = np.arange(10, 16)
    ends = [(np.array([10, 11, 12]), np.array([11, 12, 13])), (np.array([10, 14]), np.array([12, 13]))]
    check_that_it_ends(level, ends)
    with pytest.raises(NeverEnds) as found:
        check_that_it_ends(level, [*ends, (np.array([13]), np.array([11]))])
    *run, again = found.value.run
    assert again in run
    assert {11, 12, 13} <= set(run)


def explored(bounds: Bounds) -> tuple[int, dict[str, int], int]:
    """Return how many worlds there are, how moves end in them, and in how many worlds a way back begins."""
    explorer = Explorer(bounds)
    try:
        return explorer.explore(), explorer.ends, len(explorer.ways_back)
    except Found as found:
        raise AssertionError(str(found)) from None  # Found does not travel between processes


def hunt(name: str) -> bool:
    """Return whether a planted mistake is noticed."""
    with planted(name):
        for bounds in PAGES_HUNTS if name.startswith(PAGES) else HUNTS:
            try:
                Explorer(bounds).explore()
            except Found:
                return True
    return False
