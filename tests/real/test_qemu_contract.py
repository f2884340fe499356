"""Real QEMU does what the core relies on, and what the simulated one does: the scenarios of tests/qemu_contract.py."""

from pathlib import Path

import pytest

from kvmhv.model import MIB
from tests.qemu_contract import SCENARIOS
from tests.real.contract_pair import real_pair
from tests.real.test_qemu_driver import _path, binary, template, tools

pytestmark = pytest.mark.real

__all__ = ["_path", "binary", "template", "tools"]
NO_ROOM = ("the_target_has_no_room",)


@pytest.mark.parametrize("name", SCENARIOS)
async def test_real(name: str, binary: Path, template: Path) -> None:
    async with real_pair(binary, template, room_bytes=MIB if name in NO_ROOM else 0) as both:
        await SCENARIOS[name](both)
