"""Moves there and back, again and again: the guest finds no damage, and nothing is left on either host."""

import pytest

from tests.real.moving import MIB, Pair

pytestmark = pytest.mark.real

ROUNDS = 10


def test_there_and_back_again_and_again(pair: Pair) -> None:
    """A qcow2 and a raw disk go with it; the host that it leaves is each time as if it had never been there."""
    empty = {side.name: side.left() for side in pair.sides}
    pair.boot("--disk", "size=8M", "--disk", "size=5M,format=raw", "--switch", "lan", rate_bytes_per_s=8 * MIB)
    full = pair.a.left()
    assert (len(full["processes"]), len(full["records"]), len(full["links"])) == (
        1,
        1,
        len(empty["host1"]["links"]) + 1,
    )
    opened = []
    for _ in range(ROUNDS):
        for source, target in ((pair.a, pair.b), (pair.b, pair.a)):
            pair.moved(source, target)
            source.is_again(empty[source.name])
        opened.append((pair.a.agent_files(), pair.b.agent_files()))
    pair.works(pair.a)
    marks = {f"/run/kvmhv/vm/{pair.vm_id}/{mark}" for mark in ("incoming", "cont-sent")}
    assert set(pair.a.left()["files"]) == {*full["files"], *marks}
    assert max(opened[1:]) <= max(opened[:2]), f"the open files of the agents grow: {opened}"
