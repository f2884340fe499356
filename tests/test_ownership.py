"""Who may start a VM whose disks other hosts see."""

import msgspec
import pytest

from kvmhv.core import ownership
from kvmhv.core.ownership import Owner
from kvmhv.drivers.storage.volumes import RECORD_BYTES_MAX
from kvmhv.model import Vm

VM = Vm(id="11111111-2222-3333-4444-555555555555", name="web01", memory_bytes=1 << 27, cpus=1, epoch=3)
MOVED = msgspec.structs.replace(VM, epoch=4)
OTHER = msgspec.structs.replace(VM, id="99999999-2222-3333-4444-555555555555", name="db01", epoch=0)
A, B = ("host1", "id-1", "boot-1"), ("host2", "id-2", "boot-2")
HELD = ownership.claimed(VM, *A)
MOVING = msgspec.structs.replace(HELD, moving_to="host2")
FREE = msgspec.structs.replace(HELD, held=False)


def code(found: Owner | None, vm: Vm, host_id: str) -> str | None:
    refusal = ownership.may_claim(found, vm, host_id, "share/disk")
    return None if refusal is None else refusal.code


@pytest.mark.parametrize(
    ("found", "vm", "host_id", "refused"),
    [
        (None, VM, "id-1", None),
        (HELD, VM, "id-1", None),
        (msgspec.structs.replace(HELD, boot_id="earlier"), VM, "id-1", None),
        (HELD, VM, "id-2", "vm-owned-elsewhere"),
        (FREE, VM, "id-2", None),
        (MOVING, VM, "id-1", "vm-moving"),
        (MOVING, MOVED, "id-2", "vm-moving"),
        (ownership.claimed(MOVED, *B), VM, "id-1", "vm-owned-elsewhere"),
        (msgspec.structs.replace(FREE, epoch=4), VM, "id-1", "vm-copy-stale"),
        (HELD, OTHER, "id-1", "disk-owned"),
        (FREE, OTHER, "id-2", None),
    ],
)
def test_a_vm_is_started_by_its_owner_only(found: Owner | None, vm: Vm, host_id: str, refused: str | None) -> None:
    assert code(found, vm, host_id) == refused


def test_a_refusal_says_who_owns_it() -> None:
    refusal = ownership.may_claim(HELD, VM, "id-2", "share/disk")
    assert refusal is not None
    assert "host1" in refusal.text
    assert "epoch 3" in refusal.text


def test_a_stop_lets_go_of_what_is_this_hosts_only() -> None:
    assert ownership.let_go(HELD, VM, *A) == FREE
    for found in (None, ownership.claimed(VM, *B), ownership.claimed(MOVED, *B), ownership.claimed(OTHER, *A)):
        assert ownership.let_go(found, VM, *A) is None


def test_a_stop_right_after_a_move_lets_go_although_the_record_still_says_moving() -> None:
    assert ownership.let_go(MOVING, VM, *A) == FREE, "it was taken back"
    free = msgspec.structs.replace(ownership.claimed(MOVED, *B), held=False)
    assert ownership.let_go(MOVING, MOVED, *B) == free, "it has come here"
    assert ownership.let_go(MOVING, MOVED, "host3", "id-3", "boot-3") is None


def test_a_move_is_written_by_the_owner_and_seen_by_the_target() -> None:
    assert ownership.moving(HELD, VM, *A, target="host2") == MOVING
    assert ownership.moving(None, VM, *A, target="host2") == MOVING
    assert ownership.moving(MOVING, VM, *A, target="host2") == MOVING
    assert ownership.moving(ownership.claimed(VM, *B), VM, *A, target="host2") is None
    assert ownership.moving(ownership.claimed(OTHER, *A), VM, *A, target="host2") is None
    assert ownership.expects(MOVING, MOVED, "host1", "host2") is None
    wrong = (None, HELD, msgspec.structs.replace(MOVING, epoch=2), msgspec.structs.replace(MOVING, moving_to="host3"))
    for found in (*wrong, *(msgspec.structs.replace(MOVING, **{one: "other"}) for one in ("vm_id", "host"))):
        assert ownership.expects(found, MOVED, "host1", "host2")


def test_both_hosts_refuse_a_start_from_the_offer_to_the_clean_up() -> None:
    for host_id, vm in (("id-1", VM), ("id-2", MOVED)):
        assert code(MOVING, vm, host_id) == "vm-moving"
    after = ownership.settled(MOVING, MOVED, *B)
    assert after == ownership.claimed(MOVED, *B)
    assert code(after, VM, "id-1") == "vm-owned-elsewhere"
    assert code(after, MOVED, "id-2") is None


def test_a_move_that_is_taken_back_leaves_the_vm_its_owner() -> None:
    assert ownership.settled(MOVING, VM, *A) == HELD
    assert ownership.settled(HELD, VM, *A) is None
    assert ownership.settled(None, VM, *A) == HELD
    assert ownership.settled(ownership.claimed(MOVED, *B), VM, *A) is None, "it has moved on since"
    assert ownership.settled(ownership.claimed(OTHER, *A), VM, *A) is None


def test_a_record_fits_a_block_of_a_lun_and_what_is_none_is_told() -> None:
    longest = msgspec.structs.replace(
        MOVING, vm="v" * 63, host="h" * 63, moving_to="t" * 63, host_id="i" * 36, boot_id="b" * 36, epoch=10**9
    )
    assert len(ownership.encode(longest)) <= RECORD_BYTES_MAX
    assert ownership.decode(ownership.encode(longest)) == longest
    assert ownership.decode(b"somebody's file") is None
