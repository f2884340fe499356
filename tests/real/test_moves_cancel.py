"""A move is cancelled in each phase before the grant: the VM goes on in the same process, and the target is clean."""

import pytest

from tests.real.moving import MIB, Pair, Side

pytestmark = pytest.mark.real


def cancelled(pair: Pair, move_id: str, pid: int) -> None:
    """Cancel a move that is on its way, and see that nothing came of it."""
    answer = pair.a.run("move", "cancel", move_id)
    assert (answer.status, answer.json["outcome"]) == (0, "cancelled"), answer
    watched = pair.a.wait(move_id)
    assert (watched.status, watched.json["outcome"]) == (6, "cancelled"), watched
    assert (watched.json["error"]["code"], watched.json["error"]["host"]) == ("cancelled", "host1")
    shown = pair.a.show()
    assert (shown["state"], shown["pid"], shown["move"]) == ("running", pid, None)
    assert not pair.b.has()


def with_data(side: Side, size: str) -> str:
    """Make a raw disk full of data; returns its --disk."""
    side.sh(f"mkdir -p /srv && head -c {size} /dev/urandom > /srv/data.raw")
    return "file=/srv/data.raw,format=raw"


def test_cancel_while_disks_are_copied(pair: Pair) -> None:
    empty = pair.b.left()
    pair.boot("--disk", with_data(pair.a, "8M"))
    before = pair.a.left()
    pid = pair.a.show()["pid"]
    with pair.a.slow_network("8mbit"):
        move_id = pair.a.begin(pair.b)
        pair.a.reaches(move_id, "storage", lambda report: report["storage_copied_bytes"] > MIB)
        cancelled(pair, move_id, pid)
    pair.b.is_again(empty)
    pair.a.is_again(before)
    pair.works(pair.a)
    pair.moved(pair.a, pair.b)
    pair.works(pair.b)


def test_cancel_while_memory_goes_over(pair: Pair) -> None:
    empty = pair.b.left()
    pair.boot_fast(16 * MIB, "--disk", "size=4M")
    before = pair.a.left()
    pid = pair.a.show()["pid"]
    move_id = pair.a.begin(pair.b, "--bandwidth", "4M")
    pair.a.reaches(move_id, "memory", lambda report: len(report["passes"]) >= 1)
    cancelled(pair, move_id, pid)
    pair.b.is_again(empty)
    pair.a.is_again(before)
    pair.works(pair.a)
    pair.moved(pair.a, pair.b)
    pair.works(pair.b)


def test_cancel_while_the_target_does_not_answer(pair: Pair) -> None:
    empty = pair.b.left()
    pair.boot()
    pid = pair.a.show()["pid"]
    pair.b.host.freeze()
    try:
        move_id = pair.a.begin(pair.b)
        pair.a.reaches(move_id, "setup")
        answer = pair.a.run("move", "cancel", move_id)
        assert (answer.status, answer.json["outcome"]) == (0, "cancelled"), answer
    finally:
        pair.b.host.thaw()
    pair.b.is_again(empty)
    assert pair.a.show()["pid"] == pid
    pair.works(pair.a)


def test_cancel_while_the_kernel_is_sent(pair: Pair) -> None:
    empty = pair.b.left()
    for file in (pair.images.vmlinuz, pair.images.initrd):
        pair.a.file(f"/tmp/{file.name}").write_bytes(file.read_bytes())
    pair.a.kvmhv("image", "import", "linux", "--kernel", "/tmp/vmlinuz", "--initrd", "/tmp/initrd")
    pair.a.sh("rm /tmp/vmlinuz /tmp/initrd")
    pair.create("--image", "linux", memory="256M")
    pid = pair.a.show()["pid"]
    with pair.a.slow_network("4mbit", network="management"):
        move_id = pair.a.begin(pair.b)
        pair.a.reaches(move_id, "setup", lambda _: any("/vms/" in name for name in pair.b.left()["files"]))
        cancelled(pair, move_id, pid)
    pair.b.is_again(empty)


def test_cancel_comes_too_late(pair: Pair) -> None:
    pair.boot()
    report = pair.moved(pair.a, pair.b)
    answer = pair.a.run("move", "cancel", report["id"])
    assert (answer.status, answer.json["error"]["code"]) == (2, "move-ended"), answer
    assert "done" in answer.json["error"]["message"]
    unknown = pair.a.run("move", "cancel", "no-such-move")
    assert (unknown.status, unknown.json["error"]["code"]) == (2, "move-unknown"), unknown
    pair.works(pair.b)
