"""Post-copy: a guest that dirties faster than the network runs at the target before all its pages are there."""

import json
import os
import signal
from pathlib import Path

import pytest

from kvmhv.lab import processes
from tests.real.moving import MIB, Pair, Report, Side, until
from tests.real.stage import break_tcp

pytestmark = pytest.mark.real

RATE = "20M"
"""So fast may the memory travel: a pass of the guest below takes almost a second."""


def qemu(pair: Pair, side: Side) -> int:
    """Return the machine's id of web01's QEMU on a host."""
    (pid,) = (
        pid
        for pid in processes.in_namespace(side.host.namespace)
        if f"-uuid\0{pair.vm_id}" in Path(f"/proc/{pid}/cmdline").read_text()
    )
    return pid


def pages_come(pair: Pair, *options: str) -> str:
    """Begin a move and return its id once the guest runs at the target and lacks pages."""
    move = pair.a.begin(pair.b, "--post-copy", "--max-passes", "2", "--bandwidth", "4M", *options)
    pair.a.reaches(move, "pages")
    return move


def ended(pair: Pair, move: str) -> Report:
    """Wait for the move's end."""
    until("the end", lambda: pair.a.report(move)["outcome"] not in ("running", "needs-operator"))
    report: Report = pair.a.report(move)
    return report


def test_a_guest_that_dirties_faster_than_the_network_stands_still_for_a_moment_only(pair: Pair) -> None:
    pair.boot_fast(32 * MIB)
    for source, target in ((pair.a, pair.b), (pair.b, pair.a)):
        report = pair.moved(source, target, "--post-copy", "--max-passes", "2", "--bandwidth", RATE)
        assert report["switchover"]["reason"] == "pass-limit", report
        assert report["switchover"]["remaining_bytes"] > 24 * MIB, report
        pages_s = next(one["seconds"] for one in report["phases"] if one["phase"] == "pages")
        assert report["blackout_ms"] < 500, report
        assert pages_s > 0.5, report
        pages = report["pages"]
        assert pages["complete"], report
        assert pages["sent_bytes"] > 16 * MIB, report
        assert pages["requests"] > 0, report
    pair.works(pair.a)


def test_what_comes_under_the_threshold_is_moved_as_ever(pair: Pair) -> None:
    pair.boot(working_set_bytes=MIB, rate_bytes_per_s=0)
    report = pair.moved(pair.a, pair.b, "--post-copy")
    assert report["switchover"]["reason"] == "threshold", report
    assert "pages" not in [one["phase"] for one in report["phases"]], report
    pair.works(pair.b)


def test_a_broken_connection_is_made_anew(pair: Pair) -> None:
    pair.boot_fast(32 * MIB)
    move = pages_come(pair)
    (port, *_) = json.loads(pair.a.file(f"/run/kvmhv/vm/{pair.vm_id}/peer.json").read_text())["ports"]
    assert break_tcp(qemu(pair, pair.a), port) > 0
    report = ended(pair, move)
    assert report["outcome"] == "done", report
    assert report["error"] is None, report
    pair.remember(pair.a)
    pair.works(pair.b)


@pytest.mark.parametrize("killed", ["a", "b"])
def test_an_agent_that_is_killed_meanwhile(pair: Pair, killed: str) -> None:
    pair.boot_fast(32 * MIB)
    move = pages_come(pair)
    side = getattr(pair, killed)
    side.host.agent_kill()
    side.host.agent_start()
    report = ended(pair, move)
    assert report["outcome"] == "done", report
    assert report["error"] is None, report
    pair.remember(pair.a)
    pair.works(pair.b)


@pytest.mark.parametrize("killed", ["a", "b"])
def test_the_guest_is_lost_with_either_qemu_and_starts_again_from_its_disks(pair: Pair, killed: str) -> None:
    pair.boot_fast(32 * MIB)
    move = pages_come(pair)
    os.kill(qemu(pair, getattr(pair, killed)), signal.SIGKILL)
    report = ended(pair, move)
    assert report["error"]["code"] == "post-copy-lost", report
    assert not pair.a.has()
    assert pair.b.show()["state"] in ("stopped", "crashed"), pair.b.show()
    pair.b.kvmhv("vm", "start", "web01")
    until("the guest's heartbeat", lambda: "beat" in pair.b.console())
