"""Something breaks before the grant: the VM goes on at the source in the same process, the target is clean once its
agent is there, the message says which side failed and why, and the next move works."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.real.moving import MIB, Answer, Pair, Report

pytestmark = pytest.mark.real

SLOW = ("--bandwidth", "8M")


@pytest.fixture
def busy(pair: Pair) -> Pair:
    """web01 runs at host1, with a disk of its own and one full of data."""
    pair.a.sh("mkdir -p /srv && head -c 5M /dev/urandom > /srv/data.raw")
    disks = ("--disk", "size=4M", "--disk", "file=/srv/data.raw,format=raw")
    pair.boot_fast(8 * MIB, *disks, "--switch", "lan")
    return pair


@contextmanager
def comes_to_nothing(pair: Pair) -> Iterator[None]:
    """What happens meanwhile must leave the VM where it is, as it is, and nothing elsewhere; then it moves."""
    here, there, pid = pair.a.left(), pair.b.left(), pair.a.show()["pid"]
    data = pair.a.sh("sha256sum /var/lib/kvmhv/disks/web01/disk2.raw")
    yield
    shown = pair.a.show()
    assert (shown["state"], shown["pid"], shown["move"]) == ("running", pid, None)
    pair.works(pair.a)
    pair.b.is_again(there)
    pair.a.is_again(here)
    pair.moved(pair.a, pair.b)
    pair.works(pair.b)
    assert pair.b.sh("sha256sum /var/lib/kvmhv/disks/web01/disk2.raw") == data


def failed(answer: Answer, code: str, *words: str) -> Report:
    """Assert that a move failed with this code, and that what it says has these words."""
    report: Report = answer.json
    assert (answer.status, report["outcome"], report["error"]["code"]) == (1, "failed", code), answer
    assert all(word in f"{report['reason']} {report['error']['host']}" for word in words), answer
    return report


def in_memory(pair: Pair) -> str:
    move_id = pair.a.begin(pair.b, *SLOW)
    pair.a.reaches(move_id, "memory", lambda report: report["remaining_bytes"] > 0)
    return move_id


def test_the_targets_agent_goes_away_for_good(busy: Pair) -> None:
    with comes_to_nothing(busy):
        move_id = in_memory(busy)
        busy.b.host.agent_stop()
        failed(busy.a.wait(move_id), "peer-lost", "host2", "the VM runs on host1")
        assert busy.a.show()["state"] == "running"
        busy.b.host.agent_start()


def test_the_targets_disk_becomes_full(busy: Pair) -> None:
    busy.b.sh("mount -t tmpfs -o size=16M small /var/lib/kvmhv-small")
    try:
        with comes_to_nothing(busy), busy.a.slow_network("8mbit"):
            move_id = busy.a.begin(busy.b, "--storage", "small")
            busy.a.reaches(move_id, "storage", lambda report: report["storage_copied_bytes"] > MIB)
            busy.b.sh("head -c 20M /dev/zero > /var/lib/kvmhv-small/full || true")
            failed(busy.a.wait(move_id), "mirror-failed", "disk2", "No space left")
            busy.b.sh('rm /var/lib/kvmhv-small/full; test -z "$(find /var/lib/kvmhv-small -type f)"')
    finally:
        busy.b.sh("umount /var/lib/kvmhv-small")


def test_a_disk_that_does_not_fit_is_found_before_anything_is_copied(busy: Pair) -> None:
    busy.b.sh("mount -t tmpfs -o size=4M small /var/lib/kvmhv-small")
    try:
        with comes_to_nothing(busy):
            answer = busy.a.move(busy.b, "--storage", "small")
            assert (answer.status, [one["id"] for one in answer.json["findings"]]) == (3, ["disk-space-short"]), answer
    finally:
        busy.b.sh("umount /var/lib/kvmhv-small")


def test_the_target_is_down(pair: Pair) -> None:
    pair.boot()
    pair.b.host.agent_stop()
    for command in ("check", "move"):
        answer = pair.a.run("vm", command, "web01", "--to", "host2", "--include-storage")
        assert (answer.status, answer.json["error"]["code"]) == (1, "peer-unreachable"), answer
        assert "host2" in answer.said
    pair.b.host.agent_start()
    pair.works(pair.a)
    pair.moved(pair.a, pair.b)


def test_somebody_elses_file_is_in_the_place_of_a_disk(busy: Pair) -> None:
    busy.b.sh("mkdir -p /var/lib/kvmhv/disks/web01 && echo precious > /var/lib/kvmhv/disks/web01/disk1.qcow2")
    there, pid = busy.b.left(), busy.a.show()["pid"]
    failed(busy.a.move(busy.b), "file-exists", "host2", "disk1.qcow2")
    assert busy.a.show()["pid"] == pid
    busy.b.is_again(there)
    assert busy.b.sh("cat /var/lib/kvmhv/disks/web01/disk1.qcow2") == "precious\n"
    busy.b.sh("rm -r /var/lib/kvmhv/disks/web01")
    busy.moved(busy.a, busy.b)
    busy.works(busy.b)
