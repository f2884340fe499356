"""Disks change their location on one host: agents and QEMUs die, disks fill up, and always one image is left, which the
VM's record names and its QEMU writes."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.real.moving import Answer, Pair, Side, until

pytestmark = pytest.mark.real

SMALL = "/var/lib/kvmhv-small"
PHASES = ("setup", "storage", "state", "cleanup")
SLOW = ("--bandwidth", "4M")


def reaches_phase(side: Side, move_id: str, phase: str) -> None:
    """Wait until a move is in this phase or beyond it."""
    beyond = PHASES[PHASES.index(phase) :]

    def there() -> bool:
        report = side.report(move_id)
        return report["phase"] in beyond or report["outcome"] != "running"

    until(f"the move is in {phase}", there)


@pytest.fixture
def changing(pair: Pair) -> Iterator[Pair]:
    """A guest that boots from a disk in `default` and works; it has another one full of what nobody can guess."""
    pair.a.sh("mkdir -p /srv && head -c 16M /dev/urandom > /srv/data.raw")
    pair.boot("--disk", "file=/srv/data.raw,format=raw")
    yield pair
    for side in pair.sides:  # before the VM goes: nothing of it is anywhere else
        if side.has():
            one_image(side)


def one_image(side: Side) -> str:
    """Return where web01's only images are: what the record names, and what QEMU has open for writing."""
    shown = side.show()
    layers = [layer for disk in shown["vm"]["disks"] for layer in disk["layers"]]
    (location,) = {layer["location"] for layer in layers}
    roots = {"default": "/var/lib/kvmhv/disks", "small": SMALL}
    files = sorted(side.sh(f"find {' '.join(roots.values())} -type f 2>/dev/null || true").split())
    assert files == [f"{roots[location]}/{layer['path']}" for layer in layers]
    if shown["pid"] is not None:
        opened = side.sh(f"readlink /proc/{shown['pid']}/fd/* | sort -u || true").split()
        assert [name for name in opened if name.endswith(".raw")] == files
    if side.name == "host1":
        side.sh(f"cmp /srv/data.raw {files[1]}")
    return str(location)


def change(side: Side, location: str, *options: str) -> Answer:
    """Move web01's disk and wait for the end."""
    return side.run("vm", "move-storage", "web01", "--to", location, *options)


def begin(side: Side, location: str, *options: str) -> str:
    return str(side.kvmhv("vm", "move-storage", "web01", "--to", location, "--no-wait", *options)["id"])


@contextmanager
def small_file_system(side: Side, size: str) -> Iterator[None]:
    """Let `small` be a file system of that size."""
    side.sh(f"mount -t tmpfs -o size={size} small {SMALL}")
    try:
        yield
    finally:
        side.sh(f"umount {SMALL}")


def test_there_and_back_and_on_to_the_other_host(changing: Pair) -> None:
    pair = changing
    for location in ("small", "default", "small"):
        done = change(pair.a, location)
        assert (done.status, done.json["outcome"], done.json["mode"]) == (0, "done", "storage"), done
        assert done.json["writes_held_ms"] > 0
        assert [phase["phase"] for phase in done.json["phases"]] == list(PHASES)
        assert one_image(pair.a) == location
        pair.works(pair.a)
    assert change(pair.a, "small").json["error"]["code"] == "disk-there"
    pair.moved(pair.a, pair.b)
    pair.works(pair.b)
    assert one_image(pair.b) == "small"
    assert change(pair.b, "default").status == 0
    pair.moved(pair.b, pair.a)
    pair.works(pair.a)
    pair.a.kvmhv("vm", "stop", "web01", "--force")
    stopped = change(pair.a, "small")
    assert (stopped.status, stopped.json["writes_held_ms"], one_image(pair.a)) == (0, None, "small"), stopped
    assert pair.a.show()["state"] == "stopped"
    pair.a.kvmhv("vm", "start", "web01")
    until("the guest boots from its new place", lambda: "beat" in pair.a.console())
    assert [move["mode"] for move in pair.a.kvmhv("move", "list")][-1] == "storage"
    texts = [event["text"] for event in pair.a.kvmhv("events")]
    assert any(text.startswith("moved web01's disk0 from default to small") for text in texts)


def test_an_agent_that_dies_in_each_phase_leaves_one_image(changing: Pair) -> None:
    pair, ended = changing, []
    for phase in PHASES:
        target = {"default": "small", "small": "default"}[one_image(pair.a)]
        move_id = begin(pair.a, target, *(SLOW if phase in PHASES[:2] else ()))
        reaches_phase(pair.a, move_id, phase)
        pair.a.host.agent_kill()
        pair.a.host.agent_wait()
        until("the move has ended", pair.a.has_no_move)
        outcome = pair.a.report(move_id)["outcome"]
        assert (outcome, one_image(pair.a) == target) in (("done", True), ("failed", False)), phase
        ended.append(outcome)
        pair.works(pair.a)
    assert ended[0] == "failed"
    assert change(pair.a, "small" if one_image(pair.a) == "default" else "default").status == 0


def test_a_qemu_that_dies_keeps_its_old_disk(changing: Pair) -> None:
    side = changing.a
    move_id = begin(side, "small", *SLOW)
    side.reaches(move_id, "storage")
    refused = side.run("vm", "move", "web01", "--to", "host2", "--include-storage")
    assert refused.json["error"]["code"] == "vm-in-move"
    (pid,) = side.pids()
    side.sh(f"kill -9 {pid}")
    assert side.wait(move_id).json["error"]["code"] == "qemu-gone"
    assert one_image(side) == "default"
    until("its end is recorded", lambda: side.show()["state"] == "crashed")
    side.kvmhv("vm", "start", "web01")
    until("the guest boots", lambda: "beat" in side.console())


def test_a_full_disk_and_a_cancel_leave_the_vm_where_it_was(changing: Pair) -> None:
    pair = changing
    with small_file_system(pair.a, "8M"):
        refused = change(pair.a, "small")
        assert refused.json["error"]["code"] == "location-full", refused
    with small_file_system(pair.a, "24M"):
        move_id = begin(pair.a, "small", *SLOW)
        pair.a.reaches(move_id, "storage")
        with pair.a.settings(storage_copies="1"):
            pair.a.kvmhv("vm", "create", "web02", "--memory", "32M", "--disk", "size=1M")
            limited = pair.a.run("vm", "move-storage", "web02", "--to", "small")
            assert limited.json["error"]["code"] == "limit-reached"
            pair.a.kvmhv("vm", "remove", "web02", "--yes")
        cancelled = pair.a.run("move", "cancel", move_id)
        assert cancelled.json["outcome"] == "cancelled", cancelled
        assert one_image(pair.a) == "default"
        move_id = begin(pair.a, "small", *SLOW)
        pair.a.reaches(move_id, "storage")
        pair.a.sh(f"head -c 40M /dev/zero > {SMALL}/full || true")
        failed = pair.a.wait(move_id)
        assert failed.json["error"]["code"] == "mirror-failed", failed
        assert "No space left" in failed.json["error"]["message"]
        pair.a.sh(f"rm {SMALL}/full")
        assert one_image(pair.a) == "default"
    pair.works(pair.a)
