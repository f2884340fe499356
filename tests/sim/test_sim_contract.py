"""The simulated QEMU does what the real one does: the scenarios of tests/qemu_contract.py."""

import pytest

from tests.qemu_contract import SCENARIOS
from tests.sim.simulated_pair import SimulatedPair


@pytest.mark.parametrize("name", SCENARIOS)
async def test_simulated(name: str) -> None:
    for seed in range(20):
        await SCENARIOS[name](SimulatedPair(seed))
