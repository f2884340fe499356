"""Waits for the end of a move: through restarts of the agent, and through Ctrl-C with a truthful answer."""

import time
from collections.abc import Callable, Iterator

from kvmhv.cli.address import segment
from kvmhv.cli.connection import Agent, AgentGone
from kvmhv.cli.progress import View
from kvmhv.errors import KvmhvError
from kvmhv.model import ErrorBody, MoveReport, Outcome

IDLE_S = 20.0
"""An agent that says nothing for so long is asked again."""
RECONNECT_S = 60.0
"""An agent that cannot be reached for so long is given up; the move goes on without us."""
RETRY_S = 0.5
CANCEL_TIMEOUT_S = 180.0
"""The agent answers when the move has ended: everything it made has to be taken back."""


def follow(
    agent: Agent,
    move_id: str,
    *,
    now: Callable[[], float] = time.monotonic,
    wait: Callable[[float], None] = time.sleep,
) -> Iterator[MoveReport]:
    """Yield the move's reports until it has ended; the last one has an outcome.

    Raises AgentGone when the agent was away for RECONNECT_S, and what it answers otherwise.
    """
    path = f"moves/{segment(move_id)}"
    heard_s = now()
    while True:
        gone: AgentGone | None = None
        try:
            for report in agent.events(f"{path}/events", MoveReport, IDLE_S):
                heard_s = now()
                yield report
                if report.outcome is not Outcome.RUNNING:
                    return
        except AgentGone as error:
            gone = error
        if now() - heard_s > RECONNECT_S:
            text = f"lost sight of move {move_id}: " + (gone.message if gone else "the agent does not tell its end")
            todo = f"the move goes on without this command; once the agent runs: kvmhv move watch {move_id}"
            raise AgentGone("agent-lost", text, todo, host=agent.address.host)
        wait(RETRY_S)


def until_end(agent: Agent, move_id: str, view: View, *, cancel_on_interrupt: bool) -> MoveReport:
    """Show the move until it has ended, and return its last report.

    The first Ctrl-C cancels the move, if that is wanted, and goes on waiting: only the end says whether it came in
    time. The next one leaves the move alone and raises KeyboardInterrupt.
    """
    presses = 0
    while True:
        try:
            if presses:
                _cancel(agent, move_id, view)
            for report in follow(agent, move_id):
                view.show(report)
                if report.outcome is not Outcome.RUNNING:
                    return report
        except KeyboardInterrupt:
            presses += 1
            if presses > 1 or not cancel_on_interrupt:
                view.say(f"move {move_id} goes on; see it with: kvmhv move watch {move_id}")
                raise


def request_cancel(agent: Agent, move_id: str) -> MoveReport:
    """Ask for the move's end and return how it ended, if it did within the agent's patience."""
    return agent.call("POST", f"moves/{segment(move_id)}/cancel", MoveReport, timeout_s=CANCEL_TIMEOUT_S)


def _cancel(agent: Agent, move_id: str, view: View) -> None:
    view.say("cancelling the move; press Ctrl-C again to leave it as it is")
    try:
        request_cancel(agent, move_id)
    except KvmhvError as error:
        view.say(f"{error.message} [{error.code}]")


OUTCOME_STATUS = {
    Outcome.RUNNING: 0,
    Outcome.DONE: 0,
    Outcome.FAILED: 1,
    Outcome.NEEDS_OPERATOR: 5,
    Outcome.CANCELLED: 6,
}


def exit_status(report: MoveReport) -> int:
    """Return the exit status of a command that waited for the move: its refusal's own, if it was refused.

    Also of a move that is done and whose guest is lost (post-copy).
    """
    if report.outcome in (Outcome.FAILED, Outcome.DONE) and report.error is not None and report.error.exit_status:
        return report.error.exit_status
    return OUTCOME_STATUS[report.outcome]


def error_of(report: MoveReport) -> ErrorBody:
    """Return why a move that was not done was not done."""
    if report.error is not None:
        return report.error
    text = report.reason or f"the move of {report.vm} from {report.source} to {report.target} ended: {report.outcome}"
    return ErrorBody(code="move-not-done", message=text, todo=f"see: kvmhv move show {report.id}", host=report.source)
