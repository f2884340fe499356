"""The storage move's machine and its plan."""

import msgspec
import pytest

from kvmhv.core import facts, storage_move, storage_plan
from kvmhv.core.effects import (
    Effect,
    NeedOperator,
    Redefine,
    ReleaseWrites,
    RemoveImages,
)
from kvmhv.core.storage_state import StorageState, StorageStep, report
from kvmhv.errors import KvmhvError
from kvmhv.model import Disk, DiskFormat, ErrorBody, Layer, Location, Mode, Outcome, StorageMoveRequest, Vm
from tests.storage_world import begun

ERROR = ErrorBody(code="broken", message="it is broken", todo="mend it")


def play(state: StorageState, *news: facts.Fact) -> tuple[StorageState, list[Effect]]:
    effects: list[Effect] = []
    for fact in news:
        state, effects = storage_move.step(state, fact)
    return state, effects


def names(effects: list[Effect]) -> list[str]:
    return [type(effect).__name__ for effect in effects if type(effect).__name__ not in ("SetTimer", "ClearTimer")]


COPIED = (
    facts.Started(at_ms=0.0),
    facts.ImagesMade(at_ms=1.0),
    facts.MirrorProgress(at_ms=2.0, copied_bytes=100, total_bytes=400),
    facts.MirrorsReady(at_ms=3.0, copied_bytes=400),
)
HELD = (*COPIED, facts.WritesHeld(at_ms=4.0, told_ms=3.5))


def test_the_way_forward_in_a_straight_line() -> None:
    state = begun()
    seen = []
    for fact in (
        *HELD,
        facts.Redefined(at_ms=5.0),
        facts.WritesReleased(at_ms=6.0),
        facts.ImagesRemoved(at_ms=7.0, warnings=("one is left",)),
    ):
        state, effects = storage_move.step(state, fact)
        seen.append(names(effects))
    assert seen == [
        ["Journal", "MakeImages"],
        ["Journal", "CopyDisks"],
        [],
        ["Journal", "HoldWrites"],
        ["Journal", "Redefine"],
        ["ReleaseWrites"],
        ["Journal", "RemoveImages"],
        ["Finish"],
    ]
    told = report(state, 8.0)
    assert (told.mode, told.outcome, told.progress, told.disk_bytes) == (Mode.STORAGE, Outcome.DONE, 1.0, 400)
    assert (told.writes_held_ms, told.warnings, told.direction) == (2.5, ("one is left",), "here")
    assert [phase.phase.value for phase in told.phases] == ["setup", "storage", "state", "cleanup"]


def test_a_disk_that_qemu_left_behind_is_put_back_before_anything_is_deleted() -> None:
    state, effects = play(
        begun(), *HELD, facts.Redefined(at_ms=5.0), facts.WritesReleased(at_ms=6.0, stayed=("disk0",))
    )
    assert names(effects) == ["Journal", "Redefine"]
    assert next(effect.vm for effect in effects if isinstance(effect, Redefine)) == begun().vm
    again, more = storage_move.recover(
        state, facts.Restarted(at_ms=6.0, process=True, status="running", migration="", rebooted=False)
    )
    assert names(more) == ["Redefine"]
    state, effects = play(again, facts.Redefined(at_ms=7.0))
    assert effects == [RemoveImages(layers=(begun().copies[0].target_layers,))]
    state, _ = play(state, facts.ImagesRemoved(at_ms=8.0))
    assert state.failure is not None
    assert (state.outcome, state.failure.code) == (Outcome.FAILED, "storage-not-switched")


@pytest.mark.parametrize(
    ("fact", "outcome", "code"),
    [
        (facts.CancelRequested(at_ms=9.0, caller="me"), Outcome.CANCELLED, "cancelled"),
        (facts.TimerFired(at_ms=9.0, name="idle"), Outcome.FAILED, "no-progress"),
        (facts.TimerFired(at_ms=9.0, name="step"), Outcome.FAILED, "timeout"),
        (facts.Failed(at_ms=9.0, effect="CopyDisks", error=ERROR), Outcome.FAILED, "broken"),
        (facts.QemuGone(at_ms=9.0, error=ERROR), Outcome.FAILED, "broken"),
    ],
    ids=["cancel", "idle", "too long", "failed", "gone"],
)
@pytest.mark.parametrize("came", [1, 2, 4])
def test_until_the_change_everything_is_undone(came: int, fact: facts.Fact, outcome: Outcome, code: str) -> None:
    state, effects = play(begun(), *COPIED[:came], fact)
    assert names(effects) == ["Journal", "UndoStorage"]
    state, effects = play(state, facts.Undone(at_ms=10.0))
    assert names(effects) == ["Finish"]
    assert state.failure is not None
    assert (state.outcome, state.failure.code, report(state, 11.0).outcome) == (outcome, code, outcome)


def test_after_the_change_a_cancel_comes_too_late() -> None:
    state, effects = play(begun(), *HELD, facts.CancelRequested(at_ms=5.0, caller="me"))
    assert (state.step, effects) == (StorageStep.SWITCHED, [])


def test_a_qemu_that_holds_the_guest_up_is_told_and_tried_again_for_ever() -> None:
    state, _ = play(begun(), *HELD, facts.Redefined(at_ms=5.0))
    told = 0
    for _ in range(20):
        state, effects = play(state, facts.Failed(at_ms=6.0, effect="ReleaseWrites", error=ERROR))
        told += sum(isinstance(effect, NeedOperator) for effect in effects)
        state, effects = play(state, facts.TimerFired(at_ms=7.0, name="step"))
        assert effects == [ReleaseWrites()]
    assert told == 1
    state, effects = play(state, facts.QemuGone(at_ms=8.0, error=ERROR))
    state, effects = play(state, facts.Failed(at_ms=8.0, effect="ReleaseWrites", error=ERROR))
    assert state.step is StorageStep.CLEANUP


def test_copies_that_cannot_be_ended_do_not_bind_the_vm_for_ever() -> None:
    state, _ = play(begun(), *COPIED[:2], facts.CancelRequested(at_ms=9.0, caller="me"))
    for _ in range(3):
        state, _ = play(state, facts.TimerFired(at_ms=10.0, name="step"))
    assert state.step is StorageStep.ENDED
    assert len(state.warnings) == 1


def test_a_qemu_that_is_gone_holds_no_guest_up() -> None:
    failed = facts.Failed(at_ms=9.0, effect="UndoStorage", error=ERROR)
    state, _ = play(begun(), *COPIED, facts.Failed(at_ms=4.0, effect="HoldWrites", error=ERROR))
    assert (state.step, state.holding) == (StorageStep.UNDOING, True)
    held, _ = play(state, *[failed] * 5)
    assert held.step is StorageStep.UNDOING
    gone, _ = play(state, facts.QemuGone(at_ms=8.0, error=ERROR), *[failed] * 5)
    assert gone.step is StorageStep.ENDED


def test_a_new_agent_counts_its_tries_anew() -> None:
    state, _ = play(begun(), *HELD, facts.Redefined(at_ms=5.0))
    state, _ = play(state, facts.Failed(at_ms=6.0, effect="ReleaseWrites", error=ERROR))
    assert state.tries == 1
    after, _ = storage_move.recover(
        state, facts.Restarted(at_ms=0, process=True, status="running", migration="", rebooted=False)
    )
    assert after.tries == 0


def test_each_state_comes_back_from_the_journal_as_it_was() -> None:
    state = begun(running=False)
    for fact in HELD:
        state, _ = storage_move.step(state, fact)
        assert msgspec.msgpack.decode(msgspec.msgpack.encode(state), type=StorageState) == state


# --- the plan

RAW, QCOW2 = DiskFormat.RAW, DiskFormat.QCOW2
PLACES = (
    Location(name="default", free_bytes=1000),
    Location(name="nfs", kind="nfs", free_bytes=1000),
    Location(name="san", kind="iscsi"),
    Location(name="away", kind="smb", silent=True),
)


def vm() -> Vm:
    flat = Layer(location="default", path="web01/disk0.raw", format=RAW)
    top = Layer(location="default", path="web01/disk1.qcow2", format=QCOW2)
    base = Layer(location="nfs", path="golden.raw", format=RAW, size_bytes=256)
    disks = (
        Disk(name="disk0", size_bytes=512, layers=(flat,), pci_slot=8),
        Disk(name="disk1", size_bytes=512, layers=(top, base), pci_slot=9),
    )
    return Vm(id="1", name="web01", memory_bytes=1, cpus=1, disks=disks)


def planned(location: str, *disks: str, lun: int | None = None, used: int = 1) -> list[list[str]]:
    request = StorageMoveRequest(vm="web01", location=location, disks=disks, lun=lun)
    target, copies = storage_plan.make(vm(), request, PLACES, {"disk0": used, "disk1": used})
    assert [copy.target_layers for copy in copies] == [
        disk.layers for disk in target.disks if disk.name in {copy.disk for copy in copies}
    ]
    return [[f"{layer.location}/{layer.path}" for layer in copy.target_layers] for copy in copies]


def test_disks_keep_their_chain_and_become_the_vms_own() -> None:
    assert planned("nfs") == [["nfs/web01/disk0.raw"], ["nfs/web01/disk1.qcow2", "nfs/web01/disk1.base1.raw"]]
    assert planned("nfs", "disk0") == [["nfs/web01/disk0.raw"]]
    assert planned("san", "disk0", lun=4) == [["san/4"]]


@pytest.mark.parametrize(
    ("location", "disks", "lun", "used", "code"),
    [
        ("nowhere", (), None, 1, "location-unknown"),
        ("away", (), None, 1, "location-silent"),
        ("nfs", ("disk7",), None, 1, "disk-unknown"),
        ("default", (), None, 1, "disk-there"),
        ("default", ("disk0",), None, 1, "disk-there"),
        ("nfs", (), None, 501, "location-full"),
        ("nfs", ("disk0",), 3, 1, "disk-spec-invalid"),
        ("san", ("disk0",), None, 1, "disk-spec-invalid"),
        ("san", (), 3, 1, "disk-spec-invalid"),
        ("san", ("disk1",), 3, 1, "disk-chain"),
    ],
)
def test_what_cannot_be_is_refused(
    location: str, disks: tuple[str, ...], lun: int | None, used: int, code: str
) -> None:
    with pytest.raises(KvmhvError) as refused:
        planned(location, *disks, lun=lun, used=used)
    assert refused.value.code == code


def test_a_vm_without_disks_has_nothing_to_move() -> None:
    with pytest.raises(KvmhvError) as refused:
        bare = msgspec.structs.replace(vm(), disks=())
        storage_plan.make(bare, StorageMoveRequest(vm="web01", location="nfs"), PLACES, {})
    assert refused.value.code == "disk-unknown"
