"""A host's clock that is set back or forward by a day in the middle of a move: nothing is decided by the wall clock."""

import itertools
from typing import Any

import pytest

from tests.real.moving import MIB, Pair, Side
from tests.real.test_versions import make, replaced

pytestmark = pytest.mark.real

SHIFT = "/run/wall-shift"
DAY_S = 86_400.0
CLOCK = (
    (
        "__main__.py",
        "from kvmhv",
        f"import time\n\nnow = time.time\ntime.time = lambda: now() + float(open('{SHIFT}').read())\n\nfrom kvmhv",
    ),
)
"""The agent's clock; a lab's hosts share the machine's own."""


def set_clock(side: Side, shift_s: float) -> None:
    side.sh(f"echo {shift_s} > {SHIFT}.new && mv {SHIFT}.new {SHIFT}")


def test_a_clock_jumps_in_the_middle_of_a_move(pair: Pair) -> None:
    """Back while a VM arrives, with a new agent after it; forward while it leaves again."""
    set_clock(pair.b, 0.0)
    pair.boot_fast(8 * MIB, "--disk", "size=4M")
    make(pair.b, CLOCK)
    with replaced(pair.b):
        for source, target, shift_s in ((pair.a, pair.b, -DAY_S), (pair.b, pair.a, DAY_S)):
            set_clock(pair.b, 0.0)
            move = source.begin(target, "--bandwidth", "6M")
            source.reaches(move, "memory", lambda report: report["remaining_bytes"] > 0)
            set_clock(pair.b, shift_s)
            if target is pair.b:
                pair.b.host.agent_kill()
                pair.b.host.agent_wait()
            answer = source.wait(move)
            assert (answer.status, answer.json["outcome"]) == (0, "done"), answer
            pair.remember(source)
            pair.works(target)
            assert not source.has()
            report = answer.json
            assert 0 < report["blackout_ms"] < DAY_S and all(0 <= one["seconds"] < DAY_S for one in report["phases"]), (
                report
            )
            for side in pair.sides:
                assert side.kvmhv("move", "list")[-1]["id"] == move
                numbers = [event["number"] for event in side.agent.call("GET", "events", list[dict[str, Any]])]
                assert all(later > earlier for earlier, later in itertools.pairwise(numbers))
    pair.b.sh(f"rm {SHIFT}")
