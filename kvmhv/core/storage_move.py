"""A storage move: a VM's disks go from one location of its host to another while it runs. A table of (step, fact).

    preparing -> copying -> switching -> switched -> cleanup -> ended
        |           |           |           (no way back: the record names the new images)
        `-----------+-----------+-> undoing -> ended

The one moment that matters is between `switching` and `switched`. QEMU holds the guest's requests back, and the old
images and the new ones hold the same, flushed. Whichever the VM's record names then, it names all that was ever
acknowledged. The journal and then the record are on disk before the requests go on, to the new images. So a record
never names an image that lacks a write, whenever agent, QEMU or host die, and no image is deleted that a record names.
"""

from collections.abc import Callable

import msgspec

from kvmhv.core import facts
from kvmhv.core.effects import (
    ClearTimer,
    CopyDisks,
    Effect,
    Finish,
    HoldWrites,
    Journal,
    MakeImages,
    NeedOperator,
    Redefine,
    ReleaseWrites,
    RemoveImages,
    SetTimer,
    UndoStorage,
)
from kvmhv.core.source_state import IDLE_TIMER, STEP_TIMER
from kvmhv.core.storage_state import (
    UNDOABLE,
    StorageState,
    StorageStep,
    begin,
    error_of,
    phase_of,
    report,
    stays,
    update,
)
from kvmhv.model import ErrorBody, Outcome, Phase

UNDO_TRIES = 3
RELEASE_AGAIN_S = 1.0
RELEASE_TRIES = 5
"""After so many the operator is told; it is tried on and on, for the guest's requests wait."""
UNFINISHED_MAX = 0.97
"""What the copies can reach; nothing but the end is 1."""


Result = tuple[StorageState, list[Effect]]
Handler = Callable[[StorageState, facts.Fact], Result]


def step(state: StorageState, fact: facts.Fact) -> Result:
    """Return the next state and what is to be done. A fact that no longer matters changes nothing."""
    handler = ON_FACT.get((state.step, type(fact)))
    return handler(state, fact) if handler else (state, [])


def recover(state: StorageState, found: facts.Restarted) -> Result:
    """Return how a new agent takes it up: what is not switched is undone, the rest is finished."""
    state = update(state, gone=not found.process, redefined=False, tries=0)
    if state.step in UNDOABLE:
        if state.gone and state.running:
            return undo(
                state, Outcome.FAILED, error_of(state, "qemu-gone", "its QEMU was gone when the agent came back")
            )
        text = f"the agent was restarted in the {phase_of(state)} phase"
        return undo(state, Outcome.FAILED, error_of(state, "agent-restarted", text, "move it again"))
    if state.step is StorageStep.SWITCHED:
        return state, [Redefine(vm=state.target_vm)]
    if state.step is StorageStep.CLEANUP:
        return state, _clean(state)
    if state.step is StorageStep.UNDOING:
        return state, _undoing(state)
    return state, [Finish(report=report(state, found.at_ms))]


def undo(state: StorageState, outcome: Outcome, error: ErrorBody) -> Result:
    """Take it back: the VM keeps its old images."""
    assert state.step in UNDOABLE
    state = update(state, step=StorageStep.UNDOING, outcome=outcome, failure=error, tries=0)
    return state, [Journal(), ClearTimer(name=IDLE_TIMER), *_undoing(state)]


# --- the way forward


def _started(state: StorageState, fact: facts.Fact) -> Result:
    state = begin(state, Phase.SETUP, fact.at_ms)
    timer = SetTimer(name=STEP_TIMER, after_s=state.timeouts.prepare_s)
    return state, [Journal(), timer, MakeImages(vm=state.target_vm, disks=state.disks)]


def _made(state: StorageState, fact: facts.Fact) -> Result:
    state = update(begin(state, Phase.STORAGE, fact.at_ms), step=StorageStep.COPYING)
    copying = CopyDisks(
        vm=state.target_vm,
        copies=state.copies,
        bandwidth_bytes_per_s=state.bandwidth_bytes_per_s,
        timeout_s=state.timeouts.storage_s,
    )
    return state, [
        Journal(),
        SetTimer(name=STEP_TIMER, after_s=state.timeouts.storage_s),
        SetTimer(name=IDLE_TIMER, after_s=state.timeouts.storage_idle_s),
        copying,
    ]


def _copied(state: StorageState, fact: facts.Fact) -> Result:
    """Note what was copied; as long as bytes go over it is not idle."""
    assert isinstance(fact, facts.MirrorProgress)
    if fact.copied_bytes <= state.copied_bytes:
        return state, []
    share = UNFINISHED_MAX * min(1.0, fact.copied_bytes / max(1, fact.total_bytes))
    state = update(
        state,
        copied_bytes=fact.copied_bytes,
        total_bytes=fact.total_bytes,
        progress=max(state.progress, share),
    )
    return state, [SetTimer(name=IDLE_TIMER, after_s=state.timeouts.storage_idle_s)]


def _ready(state: StorageState, fact: facts.Fact) -> Result:
    """All is copied: let the guest's requests wait for a moment."""
    assert isinstance(fact, facts.MirrorsReady)
    state = update(begin(state, Phase.STATE, fact.at_ms), step=StorageStep.SWITCHING, progress=UNFINISHED_MAX)
    state = update(state, copied_bytes=max(fact.copied_bytes, state.copied_bytes), holding=True)
    return state, [
        Journal(),
        ClearTimer(name=IDLE_TIMER),
        SetTimer(name=STEP_TIMER, after_s=state.timeouts.switchover_s),
        HoldWrites(timeout_s=state.timeouts.switchover_s / 2),
    ]


def _held(state: StorageState, fact: facts.Fact) -> Result:
    """From here on it is finished, whatever happens."""
    assert isinstance(fact, facts.WritesHeld)
    state = update(state, step=StorageStep.SWITCHED, held_ms=fact.told_ms)
    return state, [Journal(), ClearTimer(name=STEP_TIMER), Redefine(vm=state.target_vm)]


def _redefined(state: StorageState, fact: facts.Fact) -> Result:
    """The record names the new images: the guest may write to them."""
    state = update(state, redefined=True)
    return _clean_up(state, fact.at_ms) if state.gone else (state, [ReleaseWrites()])


def _released(state: StorageState, fact: facts.Fact) -> Result:
    assert isinstance(fact, facts.WritesReleased)
    state = update(state, released_ms=fact.at_ms, stayed=fact.stayed)
    if fact.stayed:
        names = ", ".join(fact.stayed)
        error = error_of(state, "storage-not-switched", f"QEMU did not take the new image of {names}", "move it again")
        state = update(state, failure=error)
    return _clean_up(state, fact.at_ms)


def _clean_up(state: StorageState, at_ms: float) -> Result:
    state = update(begin(state, Phase.CLEANUP, at_ms), step=StorageStep.CLEANUP)
    return state, [Journal(), ClearTimer(name=STEP_TIMER), *_clean(state)]


def _clean(state: StorageState) -> list[Effect]:
    return [Redefine(vm=state.final_vm())] if state.stayed else [_removal(state)]


def _removal(state: StorageState) -> Effect:
    """Return what deletes the images that the VM does not use: the old ones, but for disks that stayed on them."""
    layers = (copy.target_layers if copy.disk in state.stayed else copy.source_layers for copy in state.copies)
    return RemoveImages(layers=tuple(layers))


def _put_back(state: StorageState, fact: facts.Fact) -> Result:
    """The record names the images of disks that stayed."""
    return state, [_removal(state)]


def _removed(state: StorageState, fact: facts.Fact) -> Result:
    assert isinstance(fact, facts.ImagesRemoved)
    outcome = Outcome.FAILED if state.stayed else Outcome.DONE
    state = update(state, warnings=(*state.warnings, *fact.warnings))
    return _end(state, outcome, fact.at_ms)


def _end(state: StorageState, outcome: Outcome, at_ms: float) -> Result:
    state = update(state, step=StorageStep.ENDED, outcome=outcome, ended_ms=at_ms)
    return state, [Finish(report=report(state, at_ms))]


# --- what goes wrong


def _failed(state: StorageState, fact: facts.Fact) -> Result:
    assert isinstance(fact, facts.Failed)
    text = f"{fact.error.message}; {stays(state)}"
    return undo(state, Outcome.FAILED, msgspec.structs.replace(fact.error, message=text, exit_status=1))


def _cancel(state: StorageState, fact: facts.Fact) -> Result:
    assert isinstance(fact, facts.CancelRequested)
    error = error_of(state, "cancelled", f"cancelled by {fact.caller}")
    return undo(state, Outcome.CANCELLED, msgspec.structs.replace(error, exit_status=6))


def _too_long(state: StorageState, fact: facts.Fact) -> Result:
    assert isinstance(fact, facts.TimerFired)
    todo = "see that both locations answer and have room (kvmhv storage check)"
    if fact.name == IDLE_TIMER:
        return undo(state, Outcome.FAILED, error_of(state, "no-progress", "no byte was copied for too long", todo))
    text = f"the {phase_of(state)} phase did not end in time"
    return undo(state, Outcome.FAILED, error_of(state, "timeout", text, todo))


def _gone(state: StorageState, fact: facts.Fact) -> Result:
    assert isinstance(fact, facts.QemuGone)
    state = update(state, gone=True)
    if state.step is StorageStep.SWITCHED:
        return _clean_up(state, fact.at_ms) if state.redefined else (state, [])
    text = f"{fact.error.message}; its disks stay where they were"
    return undo(state, Outcome.FAILED, msgspec.structs.replace(fact.error, message=text))


def _not_released(state: StorageState, fact: facts.Fact) -> Result:
    """The guest's requests wait until the record is written and QEMU goes on: try again, and tell after some tries.

    There is no way back: an agent before this one may have let the guest go on already.
    """
    assert isinstance(fact, facts.Failed)
    if fact.effect not in (Redefine.__name__, ReleaseWrites.__name__):
        return state, []
    if state.gone and state.redefined:
        return _clean_up(state, fact.at_ms)
    state = update(state, tries=state.tries + 1)
    again = SetTimer(name=STEP_TIMER, after_s=RELEASE_AGAIN_S)
    return state, [again, *_told(state, fact.error.message, RELEASE_TRIES)]


def _release_again(state: StorageState, fact: facts.Fact) -> Result:
    return state, [ReleaseWrites() if state.redefined else Redefine(vm=state.target_vm)]


def _clean_again(state: StorageState, fact: facts.Fact) -> Result:
    return state, _clean(state)


def _not_cleaned(state: StorageState, fact: facts.Fact) -> Result:
    return state, [SetTimer(name=STEP_TIMER, after_s=state.timeouts.undo_s / 10)]


def _undoing(state: StorageState) -> list[Effect]:
    timer = SetTimer(name=STEP_TIMER, after_s=state.timeouts.undo_s)
    return [timer, UndoStorage(vm=state.vm, timeout_s=state.timeouts.undo_s / 2)]


def _undone(state: StorageState, fact: facts.Fact) -> Result:
    assert isinstance(fact, facts.Undone)
    return _end(update(state, warnings=(*state.warnings, *fact.warnings)), state.outcome, fact.at_ms)


def _not_undone(state: StorageState, fact: facts.Fact) -> Result:
    """A storage that hangs lets no copy end: the VM must not be bound by that for ever."""
    if isinstance(fact, facts.Failed) and fact.effect != UndoStorage.__name__:
        return state, []  # what was under way
    state = update(state, tries=state.tries + 1)
    why = fact.error.message if isinstance(fact, facts.Failed) else "QEMU did not end the copies in time"
    effects: list[Effect] = [SetTimer(name=STEP_TIMER, after_s=state.timeouts.undo_s / 10)]
    if isinstance(fact, facts.TimerFired):
        effects = _undoing(state)
    if state.tries < UNDO_TRIES:
        return state, effects
    if state.holding and not state.gone:  # the guest's requests may wait for it
        return state, [*effects, *_told(state, why, UNDO_TRIES)]
    warning = f"not all of the copies is taken back: {why}; the next storage move or start of the agent does it"
    return _end(update(state, warnings=(*state.warnings, warning)), state.outcome, fact.at_ms)


def _gone_undoing(state: StorageState, fact: facts.Fact) -> Result:
    return update(state, gone=True), []


def _told(state: StorageState, why: str, tries: int) -> list[Effect]:
    """Return what tells the operator, once, that the guest's requests wait."""
    if state.tries != tries:
        return []
    text = f"the disks of {state.vm.name} stand still at the end of a storage move: {why}"
    todo = "it is tried again and again; if QEMU hangs for good, end its process and start the VM: no write is lost"
    error = ErrorBody(code="storage-held", message=text, todo=todo, host=state.host, exit_status=5)
    return [NeedOperator(error=error)]


S = StorageStep

ON_FACT: dict[tuple[StorageStep, type], Handler] = {
    (S.PREPARING, facts.Started): _started,
    (S.PREPARING, facts.ImagesMade): _made,
    (S.COPYING, facts.MirrorProgress): _copied,
    (S.COPYING, facts.MirrorsReady): _ready,
    (S.SWITCHING, facts.WritesHeld): _held,
    (S.SWITCHED, facts.Redefined): _redefined,
    (S.SWITCHED, facts.WritesReleased): _released,
    (S.SWITCHED, facts.Failed): _not_released,
    (S.SWITCHED, facts.TimerFired): _release_again,
    (S.CLEANUP, facts.Redefined): _put_back,
    (S.CLEANUP, facts.ImagesRemoved): _removed,
    (S.CLEANUP, facts.Failed): _not_cleaned,
    (S.CLEANUP, facts.TimerFired): _clean_again,
    (S.UNDOING, facts.Undone): _undone,
    (S.UNDOING, facts.Failed): _not_undone,
    (S.UNDOING, facts.TimerFired): _not_undone,
    (S.UNDOING, facts.QemuGone): _gone_undoing,
    **{(at, facts.Failed): _failed for at in UNDOABLE},
    **{(at, facts.CancelRequested): _cancel for at in UNDOABLE},
    **{(at, facts.TimerFired): _too_long for at in UNDOABLE},
    **{(at, facts.QemuGone): _gone for at in (*UNDOABLE, S.SWITCHED)},
}
