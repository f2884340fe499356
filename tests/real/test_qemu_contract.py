"""Real QEMU does what the core relies on, and what the simulated one does: the scenarios of tests/qemu_contract.py."""

from pathlib import Path

import pytest

from kvmhv.model import MIB
from tests.qemu_contract import POST_COPY, SCENARIOS
from tests.real.contract_pair import real_pair
from tests.real.test_qemu_driver import _path, binary, template, tools

pytestmark = pytest.mark.real

__all__ = ["_path", "binary", "template", "tools"]
NO_ROOM = ("the_target_has_no_room",)


@pytest.mark.parametrize("name", SCENARIOS)
async def test_real(name: str, binary: Path, template: Path) -> None:
    room_bytes, post_copy = MIB if name in NO_ROOM else 0, name.startswith(POST_COPY)
    async with real_pair(binary, template, room_bytes=room_bytes, post_copy=post_copy) as both:
        await SCENARIOS[name](both)
