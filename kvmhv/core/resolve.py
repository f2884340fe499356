"""The operator's way out of a move that stands still.

Only what the other side can prove ends such a move by itself. Where that side will never speak again, the operator
speaks in its place: a decision is turned into the very words that the silent side would have said, so the handover's
rule stays one rule. If the operator is wrong about the other side, the consequence stands in the choice's text.
"""

import enum

from kvmhv.core import facts
from kvmhv.core.source_state import SourceState, SourceStep
from kvmhv.core.target_state import TargetState, TargetStep
from kvmhv.messages import Abort, Grant, MirrorsEnded, Owned, Refused, Running, Unknown
from kvmhv.model import ErrorBody, Outcome, Struct


class RunAt(enum.StrEnum):
    """Where the VM shall run."""

    SOURCE = "source"
    TARGET = "target"
    RESTART = "restart"
    """From its disks on the host that is asked: the memory is given up."""


class Choice(Struct, frozen=True, kw_only=True):
    """One way out, with all that follows from it."""

    run_at: RunAt
    consequences: str


def choices(state: SourceState | TargetState) -> tuple[Choice, ...]:
    """Return what an operator can decide on this host now; empty while the move needs no operator."""
    if state.outcome is not Outcome.NEEDS_OPERATOR:
        return ()
    found = _of_source(state) if isinstance(state, SourceState) else _of_target(state)
    return tuple(Choice(run_at=run_at, consequences=text) for run_at, text in found.items())


def _of_source(state: SourceState) -> dict[RunAt, str]:
    here, there, vm = state.source, state.target, state.vm.name
    if state.step is SourceStep.GRANTED:
        ended = "" if state.hold.copy_lost else f"the copy of {vm} on {here} is ended with its memory; "
        disks = f"its disks on {here} stay until {there} confirms that the VM is its own"
        found = {
            RunAt.TARGET: f"{ended}{disks}. Right if {vm} is seen to run on {there}, or if {there} was the last to "
            f"run it; {there} then has it, stopped if it lost it.",
            RunAt.RESTART: f"{ended}{vm} is stopped here on {here} and can be started from its disks as they were at "
            f"the switchover. If it ran on {there}, what it wrote there is lost; if it runs there still, it then runs "
            f"twice.",
        }
        if not state.hold.copy_lost:
            found[RunAt.SOURCE] = (
                f"{vm} goes on here on {here} from the moment at which it was stopped. If it ran on {there}, what it "
                f"did there is lost; if it runs there still, it runs twice and both write: be sure that {there} is off."
            )
        return found
    if state.step is SourceStep.CLEANUP and not state.target_owns:
        return {
            RunAt.TARGET: f"what is left of {vm} on {here}, its disks included, is deleted. Right only if {vm} is seen "
            f"to run on {there} and survives a restart of the agent there.",
        }
    return {}


def _of_target(state: TargetState) -> dict[RunAt, str]:
    here, there, vm = state.target, state.source, state.vm.name
    if state.step is TargetStep.WAITING and state.transferred:
        return {
            RunAt.TARGET: f"{vm} goes on here on {here}. If it runs on {there}, it then runs twice: be sure that "
            f"{there} is off.",
            RunAt.SOURCE: f"the copy on {here} is ended and its disks here are deleted; if {there} is lost, so is "
            f"{vm}'s memory, and its disks if they moved.",
        }
    if state.step is TargetStep.STANDING:
        return {
            RunAt.RESTART: f"{vm} is this host's own and stopped; it can be started from its disks here. If it goes on "
            f"on {there}, it then runs twice.",
            RunAt.SOURCE: f"what is left of {vm} on {here} is deleted; if it ran here before the reboot, what it "
            "wrote is lost.",
        }
    return {}


def words(state: SourceState | TargetState, run_at: RunAt, at_ms: float, caller: str) -> tuple[facts.Fact, ...]:
    """Return what the silent side would have said for that choice. `choices(state)` must offer it."""
    assert run_at in {choice.run_at for choice in choices(state)}, "a choice that was not offered"
    error = ErrorBody(
        code="resolved",
        message=f"{caller} decided that {state.vm.name} runs at the {run_at}",
        todo="",
        host=state.source if isinstance(state, SourceState) else state.target,
    )
    if isinstance(state, SourceState):
        return _words_of_target(state, run_at, at_ms, error)
    return _words_of_source(state, run_at, at_ms, error)


def _words_of_target(state: SourceState, run_at: RunAt, at_ms: float, error: ErrorBody) -> tuple[facts.Fact, ...]:
    epoch = state.hold.epoch
    if run_at is RunAt.TARGET and state.step is SourceStep.CLEANUP:
        return (facts.Received(at_ms=at_ms, message=Owned(epoch=epoch)),)
    if run_at is RunAt.TARGET:
        # A target that rebooted stands still until it is told that it ran: it is, as if it had asked.
        running = facts.Received(at_ms=at_ms, message=Running(epoch=epoch, resumed_ms=at_ms))
        return running, facts.Received(at_ms=at_ms, message=Unknown(epoch=epoch, error=error))
    refused = facts.Received(at_ms=at_ms, message=Refused(epoch=epoch, error=error))
    if run_at is RunAt.RESTART:
        return (facts.QemuGone(at_ms=at_ms, error=error), refused)
    return (refused,)


def _words_of_source(state: TargetState, run_at: RunAt, at_ms: float, error: ErrorBody) -> tuple[facts.Fact, ...]:
    epoch = state.hold.epoch
    if run_at is RunAt.SOURCE:
        return (facts.Received(at_ms=at_ms, message=Abort(epoch=epoch, error=error)),)
    if state.step is TargetStep.STANDING:
        return (facts.Received(at_ms=at_ms, message=Grant(epoch=epoch, sent=True, ran=True)),)
    return (
        facts.Received(at_ms=at_ms, message=MirrorsEnded(epoch=epoch)),
        facts.Received(at_ms=at_ms, message=Grant(epoch=epoch, sent=True)),
    )


def ends_copy(state: SourceState | TargetState, run_at: RunAt) -> bool:
    """Whether the VM's QEMU on this host is to be ended before the words are said."""
    return isinstance(state, SourceState) and run_at is RunAt.RESTART
