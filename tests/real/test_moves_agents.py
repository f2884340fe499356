"""No agent's death is noticed by a VM that stays where it is. Agents that die while moves run: test_matrix.py."""

import pytest

from tests.real.moving import Pair

pytestmark = pytest.mark.real


def test_vms_do_not_notice_their_agents_death(pair: Pair) -> None:
    pair.boot("--disk", "size=4M", "--switch", "lan")
    pair.moved(pair.a, pair.b)
    before = (pair.b.show(), pair.b.left(), pair.b.kvmhv("move", "list"), pair.b.kvmhv("host", "show")["settings"])
    for _ in range(2):
        pair.b.host.agent_kill()
        pair.b.host.agent_wait()
        after = (pair.b.show(), pair.b.left(), pair.b.kvmhv("move", "list"), pair.b.kvmhv("host", "show")["settings"])
        assert after == before
    pair.works(pair.b)
    pair.moved(pair.b, pair.a)
    pair.works(pair.a)
