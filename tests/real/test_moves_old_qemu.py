"""Hosts with different QEMUs: 10.0 (Debian 13) at host1, 7.2 (Debian 12) at host2."""

import os
from collections.abc import Iterator

import pytest

from kvmhv.lab.guest_images import GuestImages
from kvmhv.lab.lab import Lab
from tests.real.moving import MIB, Pair, codes_of

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def mixed_lab(_lab_ground: None) -> Iterator[Lab]:
    lab = Lab.up(f"pytest-mixed-{os.getpid()}", suites={"host2": "bookworm"}, hosts=("host1", "host2"), progress=print)
    try:
        yield lab
    finally:
        lab.down()
    assert lab.leftovers() == []


def test_a_guest_moves_to_an_older_qemu_and_is_kept_there_under_tcg(mixed_lab: Lab, images: GuestImages) -> None:
    pair = Pair(mixed_lab, images)
    empty = pair.a.left()
    pair.boot("--disk", "size=8M", "--switch", "lan", rate_bytes_per_s=8 * MIB)
    assert pair.a.show()["qemu_version"].startswith("10.")
    checked = pair.a.run("vm", "check", "web01", "--to", "host2", "--include-storage")
    assert checked.status == 0, checked
    assert codes_of(checked.json["findings"], "warning") == {"qemu-older-at-target"}, checked
    pair.moved(pair.a, pair.b)
    pair.works(pair.b)
    pair.a.is_again(empty)
    shown = pair.b.show()
    assert (shown["qemu_version"].split(".")[0], shown["vm"]["machine"]) == ("7", "pc-q35-7.2")

    back = pair.b.move(pair.a)
    assert (back.status, codes_of(back.json["findings"])) == (3, {"tcg-source-corrupts"}), back
    assert pair.b.show()["pid"] == shown["pid"]
    pair.works(pair.b)
    pair.a.is_again(empty)
