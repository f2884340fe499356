"""What a storage move knows: the state that storage_move.py steps, the journal keeps and report() shows."""

import enum

import msgspec

from kvmhv.core import progress
from kvmhv.core.phases import PhaseMark, phase_times
from kvmhv.model import (
    Asked,
    Disk,
    DiskCopy,
    ErrorBody,
    Mode,
    MoveReport,
    Outcome,
    Phase,
    Struct,
    Timeouts,
    Vm,
)


class StorageStep(enum.StrEnum):
    """Where a storage move is."""

    PREPARING = "preparing"
    COPYING = "copying"
    SWITCHING = "switching"
    SWITCHED = "switched"
    CLEANUP = "cleanup"
    UNDOING = "undoing"
    ENDED = "ended"


UNDOABLE = (StorageStep.PREPARING, StorageStep.COPYING, StorageStep.SWITCHING)


class StorageState(Struct, frozen=True, kw_only=True):
    """Immutable; step makes the next one. Journalled whole."""

    move_id: str
    host: str
    vm: Vm
    """As it was."""
    target_vm: Vm
    """As it will be defined."""
    copies: tuple[DiskCopy, ...]
    running: bool
    """It has a QEMU; else one is started that runs no guest, for the copies alone."""
    bandwidth_bytes_per_s: int
    timeouts: Timeouts
    started_wall_s: float
    volatile_id: str
    asked: Asked | None = None

    step: StorageStep = StorageStep.PREPARING
    outcome: Outcome = Outcome.RUNNING
    failure: ErrorBody | None = None
    warnings: tuple[str, ...] = ()
    marks: tuple[PhaseMark, ...] = ()
    ended_ms: float | None = None
    copied_bytes: int = 0
    total_bytes: int = 0
    progress: float = 0.0
    held_ms: float | None = None
    released_ms: float | None = None
    redefined: bool = False
    holding: bool = False
    """QEMU may hold the guest's requests back."""
    gone: bool = False
    """There is no QEMU any more."""
    stayed: tuple[str, ...] = ()
    """Disks that QEMU did not change to their new images."""
    tries: int = 0

    @property
    def source(self) -> str:
        """The host."""
        return self.host

    @property
    def target(self) -> str:
        """The host."""
        return self.host

    @property
    def disks(self) -> tuple[str, ...]:
        """The disks that go."""
        return tuple(copy.disk for copy in self.copies)

    def final_vm(self) -> Vm:
        """The VM as it is in the end: disks that stayed are where they were."""
        old = {disk.name: disk for disk in self.vm.disks}
        disks: tuple[Disk, ...] = tuple(
            old[disk.name] if disk.name in self.stayed else disk for disk in self.target_vm.disks
        )
        return msgspec.structs.replace(self.target_vm, disks=disks)


def update(state: StorageState, **changes: object) -> StorageState:
    """Return the state with some of its fields changed."""
    return msgspec.structs.replace(state, **changes)


def begin(state: StorageState, phase: Phase, at_ms: float) -> StorageState:
    """Note when a phase begins."""
    return update(state, marks=(*state.marks, PhaseMark(phase=phase, at_ms=at_ms)))


def phase_of(state: StorageState) -> Phase:
    """Return the phase that runs, or the last one that did."""
    return state.marks[-1].phase if state.marks else Phase.SETUP


def stays(state: StorageState) -> str:
    """Say what has not changed for the VM."""
    how = "runs on with" if state.running else "keeps"
    return f"{state.vm.name} {how} its disks where they were"


def error_of(state: StorageState, code: str, text: str, todo: str = "") -> ErrorBody:
    """Return an error that says where the VM's disks are."""
    return ErrorBody(code=code, message=f"{text}; {stays(state)}", todo=todo, host=state.host, exit_status=1)


def report(state: StorageState, now_ms: float) -> MoveReport:
    """Return the move as people see it."""
    held = None
    if state.held_ms is not None and state.released_ms is not None and state.running:
        held = max(0.0, state.released_ms - state.held_ms)
    copying = state.step is StorageStep.COPYING
    seconds = max(0.0, now_ms - state.marks[-1].at_ms) / 1000 if copying else 0.0
    return MoveReport(
        id=state.move_id,
        vm=state.vm.name,
        vm_id=state.vm.id,
        source=state.host,
        target=state.host,
        direction="here",
        mode=Mode.STORAGE,
        outcome=Outcome.RUNNING if state.step is not StorageStep.ENDED else state.outcome,
        reason=state.failure.message if state.failure else None,
        error=state.failure,
        phase=phase_of(state),
        phases=phase_times(state, now_ms),
        passes=(),
        switchover=None,
        blackout_ms=None,
        blackout_uncertainty_ms=None,
        memory_bytes=0,
        disk_bytes=state.copied_bytes,
        findings=(),
        progress=1.0 if state.outcome is Outcome.DONE else state.progress,
        remaining_bytes=0,
        storage_total_bytes=state.total_bytes,
        storage_copied_bytes=state.copied_bytes,
        warnings=state.warnings,
        started_at=state.started_wall_s,
        ended_at=None,
        estimate=progress.storage_estimate(state.total_bytes, state.copied_bytes, seconds) if copying else None,
        throughput_bytes_per_s=state.copied_bytes / seconds if seconds > 0 else 0.0,
        asked=state.asked,
        disks=state.copies,
        writes_held_ms=held,
    )
