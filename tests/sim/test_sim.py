"""Whole moves simulated: swarms of faults from many seeds, and every single fault at every boundary."""

import os
from collections.abc import Iterator

import pytest

from tests.sim.machine import Broken
from tests.sim.run import many
from tests.sim.world import HOSTS, Single, World

MOVES = int(os.environ.get("KVMHV_SIM_MOVES", "50000" if os.environ.get("CI") else "2000"))
FIRST_SEED = int(os.environ.get("KVMHV_SIM_SEED", "0"))
SINGLE_SEEDS = (1, 2, 4)


def test_swarms_of_faults_break_no_promise() -> None:
    total = many(FIRST_SEED, MOVES)
    assert total.outcomes["done"] > total.moves / 10
    assert total.outcomes["failed"] > total.moves / 10
    assert total.outcomes["cancelled"] > 0
    assert total.stood_still < total.moves / 20


def test_the_same_seed_gives_the_same_run() -> None:
    runs = []
    for _ in range(2):
        world = World(7, verbose=True)
        world.run()
        runs.append(world.kernel.lines)
    assert runs[0] == runs[1]
    assert len(runs[0]) > 50


def test_without_faults_the_vm_goes_there_and_back() -> None:
    for seed in range(50):
        ledger = World(seed, faultless=True).run()
        assert ledger.outcomes == {"done": 2}


@pytest.mark.parametrize("kind", ["agent", "host", "qemu", "cut", "hang", "cancel", "fail"])
@pytest.mark.parametrize("seed", SINGLE_SEEDS)
def test_every_single_fault_at_every_boundary(seed: int, kind: str) -> None:
    last = World(seed, single=Single(boundary=0, kind=kind, host="")).run().boundaries
    assert last > 100
    for single in singles(kind, last):
        world = World(seed, single=single, verbose=True)
        try:
            world.run()
        except Broken as broken:
            pytest.fail("\n".join([*world.kernel.lines, str(broken), f"single fault: {single}"]))


def singles(kind: str, last: int) -> Iterator[Single]:
    """Yield the fault at each boundary on each host that it can hit."""
    for host in HOSTS if kind not in ("cut", "cancel", "fail") else HOSTS[:1]:
        for boundary in range(1, last + 1):
            yield Single(boundary=boundary, kind=kind, host=host)
