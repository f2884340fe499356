"""`kvmhv vm check`, `kvmhv vm move` and `kvmhv move`: what a move would do, does and did."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from kvmhv.cli import move_html, output
from kvmhv.cli.address import segment
from kvmhv.cli.connection import Agent
from kvmhv.cli.move_report import draw_check, draw_report, ends_of
from kvmhv.cli.parameters import HOST, MOVE, VM, Rate, Size
from kvmhv.cli.progress import view
from kvmhv.cli.session import Session, json_option
from kvmhv.cli.watch import error_of, exit_status, request_cancel, until_end
from kvmhv.config import ON_OVERRUN, PERFORMANCE_OPTIONS
from kvmhv.errors import CallerError, Incompatible, Refused
from kvmhv.model import WAIT_MAX_S, ErrorBody, Finding, MoveReport, MoveRequest, Outcome, Plan, Severity, Struct

Command = TypeVar("Command", bound=Callable[..., Any])

CHECK_TIMEOUT_S = 120.0
QUEUE_MAX_MINUTES = int(WAIT_MAX_S / 60)


class Check(Struct, frozen=True, kw_only=True):
    """What the check of a move answers; no plan where an error stands in its way."""

    findings: tuple[Finding, ...]
    plan: Plan | None = None
    refused: bool = False
    """A limit or a setting of a host forbids it."""


def _destination(command: Command) -> Command:
    """Give a command the options that say where a VM goes, and what of it."""
    for option in (
        click.option("--storage", metavar="LOCATION", help="Where its disks go; default: locations of the same name."),
        click.option("--include-storage", is_flag=True, help="Move its disks too."),
        click.option("--to", "target", type=HOST, required=True, metavar="HOST", help="The target."),
    ):
        command = option(command)
    return command


@click.command()
@click.argument("name", type=VM)
@_destination
@json_option
@click.pass_obj
def check(session: Session, name: str, target: str, include_storage: bool, storage: str | None) -> int:
    """Find everything that keeps a VM from moving to HOST; copies nothing.

    Exit status 3 if there is an error among the findings, 4 if a limit or a setting of a host forbids it, as the move
    itself would have; warnings do not keep it.
    """
    request = MoveRequest(vm=name, target=target, include_storage=include_storage, storage=storage)
    return _check(session, request, with_plan=False)


def _check(session: Session, request: MoveRequest, *, with_plan: bool) -> int:
    path = f"vms/{segment(request.vm)}/check"
    found = session.agent().call("POST", path, Check, body=request, timeout_s=CHECK_TIMEOUT_S)
    errors = any(finding.severity is Severity.ERROR for finding in found.findings)
    plan = None if errors else found.plan
    session.answer(found, lambda: draw_check(request, found.findings, plan, with_plan=with_plan))
    if found.refused:
        return Refused.exit_status
    return Incompatible.exit_status if errors else 0


@click.command("move")
@click.argument("name", type=VM)
@_destination
@click.option("--max-passes", type=click.IntRange(1, 1000), metavar="N", help="Switch over after N complete passes.")
@click.option("--threshold", type=Size(), metavar="SIZE", help="Switch over when no more than this remains.")
@click.option("--bandwidth", type=Rate(), metavar="RATE", help="At most so fast: 100M (bytes per second) or 800mbit.")
@click.option(
    "--performance",
    type=click.Choice(PERFORMANCE_OPTIONS),
    help="How memory travels: plainly, compressed where that pays, over all networks; default: the host's setting.",
)
@click.option(
    "--blackout-limit", type=click.IntRange(0, 3_600_000), metavar="MS", help="How long the VM may stand still; 0: any."
)
@click.option(
    "--on-overrun",
    type=click.Choice(ON_OVERRUN),
    help="When it would be longer: cancel the move, slow the guest's CPUs down until it fits, or go on all the same.",
)
@click.option(
    "--post-copy",
    is_flag=True,
    help="Instead of a long blackout: run the VM there before all its memory has arrived. Until it has, the loss of "
    "either host or QEMU loses what the VM had in memory; its disks lose nothing.",
)
@click.option(
    "--queue",
    type=click.IntRange(1, QUEUE_MAX_MINUTES),
    metavar="MINUTES",
    help="Wait so long for a free slot, in the order of asking, instead of being refused by a limit.",
)
@click.option("--no-wait", is_flag=True, help="Only start the move.")
@click.option("--dry-run", is_flag=True, help="Show findings, plan and estimate; change nothing.")
@json_option
@click.pass_obj
def move_vm(
    session: Session,
    name: str,
    target: str,
    include_storage: bool,
    storage: str | None,
    max_passes: int | None,
    threshold: int | None,
    bandwidth: int | None,
    performance: str | None,
    blackout_limit: int | None,
    on_overrun: str | None,
    post_copy: bool,
    queue: int | None,
    no_wait: bool,
    dry_run: bool,
) -> int:
    """Move a running VM to HOST. Its users notice nothing.

    Ctrl-C cancels the move and waits for the answer; a second Ctrl-C leaves the move as it is.
    """
    request = MoveRequest(
        vm=name,
        target=target,
        include_storage=include_storage,
        storage=storage,
        max_passes=max_passes,
        threshold_bytes=threshold,
        bandwidth_bytes_per_s=bandwidth,
        performance=performance,
        blackout_limit_ms=blackout_limit,
        on_overrun=on_overrun,
        post_copy=post_copy,
        queue_s=None if queue is None else queue * 60.0,
    )
    if dry_run:
        return _check(session, request, with_plan=True)
    agent = session.agent()
    path = f"vms/{segment(name)}/move"
    return begun_or_waited(
        session,
        agent,
        lambda: agent.call("POST", path, MoveReport, body=request, timeout_s=CHECK_TIMEOUT_S),
        no_wait=no_wait,
    )


def begun_or_waited(session: Session, agent: Agent, begin: Callable[[], MoveReport], *, no_wait: bool) -> int:
    """Begin a move, and wait for its end unless that is not wanted; returns the exit status."""
    try:
        begun = begin()
    except KeyboardInterrupt:
        output.note("whether the move has begun is not known; see: kvmhv move list")
        raise
    if no_wait:
        how = "waits for a slot" if begun.queue else "has begun"
        session.answer(begun, lambda: output.say(f"move {begun.id} {how}; see it with: kvmhv move watch {begun.id}"))
        return 0
    return _wait(session, agent, begun.id, cancel_on_interrupt=True)


def _wait(session: Session, agent: Agent, move_id: str, *, cancel_on_interrupt: bool) -> int:
    with view(quiet=session.json) as shown:
        report = until_end(agent, move_id, shown, cancel_on_interrupt=cancel_on_interrupt)
    session.answer(report, lambda: draw_report(report, with_reason=False))
    if report.outcome is not Outcome.DONE or report.error is not None:
        output.error(error_of(report), as_json=False)
    return exit_status(report)


# --- kvmhv move ---------------------------------------------------------------------------------------------------


@click.group()
def move() -> None:
    """Moves that run or have ended. ID may be shortened as long as it means one move."""


@move.command("list")
@json_option
@click.pass_obj
def list_moves(session: Session) -> None:
    """List moves, out of and into the host."""
    moves = _moves(session.agent())
    session.answer(moves, lambda: _draw_moves(moves))


def _moves(agent: Agent) -> list[MoveReport]:
    return agent.call("GET", "moves", list[MoveReport])


def _draw_moves(moves: Sequence[MoveReport]) -> None:
    columns = ("id", "vm", "source", "target", "outcome", "phase", "progress", "blackout", "started")
    rows = [
        (
            it.id,
            it.vm,
            *ends_of(it),
            "queued" if it.queue else it.outcome,
            it.phase if it.outcome is Outcome.RUNNING and it.queue is None else None,
            f"{it.progress * 100:.0f} %",
            None if it.blackout_ms is None else f"{it.blackout_ms:.0f} ms",
            output.time_text(it.started_at),
        )
        for it in moves
    ]
    output.table(columns, rows)


def _find(agent: Agent, prefix: str) -> MoveReport:
    """Return the one move whose id begins so. Raises CallerError `move-unknown` or `move-ambiguous`."""
    moves = _moves(agent)
    found = [it for it in moves if it.id == prefix] or [it for it in moves if it.id.startswith(prefix)]
    if not found:
        raise CallerError("move-unknown", f"there is no move {prefix!r}", "see: kvmhv move list", http_status=404)
    if len({it.id for it in found}) > 1:
        text = f"{prefix!r} may mean {', '.join(it.id for it in found[:5])}"
        raise CallerError("move-ambiguous", text, "write more of the move's id")
    return found[0]


@move.command()
@click.argument("move_id", metavar="ID", type=MOVE)
@json_option
@click.pass_obj
def show(session: Session, move_id: str) -> None:
    """Show a move's report."""
    report = _find(session.agent(), move_id)
    session.answer(report, lambda: draw_report(report))


@move.command("report")
@click.argument("move_id", metavar="ID", type=MOVE)
@click.option("--html", "file", type=click.Path(dir_okay=False, path_type=Path), required=True, metavar="FILE")
@json_option
@click.pass_obj
def write_report(session: Session, move_id: str, file: Path) -> None:
    """Write a move's report as one HTML page that needs nothing else; `-` writes it to standard output."""
    found = _find(session.agent(), move_id)
    text = move_html.page(found)
    if str(file) == "-":
        click.echo(text, nl=False)
        return
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise CallerError("file-unwritable", f"{file}: {error.strerror}", "name another file") from error
    session.answer({"file": str(file), "move": found.id}, lambda: output.say(f"{file}: the move {found.id}"))


@move.command()
@click.argument("move_id", metavar="ID", type=MOVE)
@json_option
@click.pass_obj
def watch(session: Session, move_id: str) -> int:
    """Show a move's progress until it has ended. Ctrl-C only ends the watching."""
    agent = session.agent()
    return _wait(session, agent, _find(agent, move_id).id, cancel_on_interrupt=False)


@move.command()
@click.argument("move_id", metavar="ID", type=MOVE)
@json_option
@click.pass_obj
def cancel(session: Session, move_id: str) -> int:
    """End a move and say how it ended: cancelled (the VM runs on at the source), or too late."""
    agent = session.agent()
    ended = request_cancel(agent, _find(agent, move_id).id)
    session.answer(ended, lambda: output.say(f"move {ended.id}: {_CANCEL_TEXT.get(ended.outcome, ended.outcome)}"))
    if ended.outcome in _CANCEL_TEXT:
        return 0
    late = ErrorBody(
        code="cancel-late",
        message=f"it was too late to cancel the move: it is {ended.outcome}",
        todo=f"see: kvmhv move show {ended.id}",
        host=ended.source,
        exit_status=exit_status(ended) or 1,
    )
    output.error(late, as_json=False)
    return late.exit_status


class _Choice(Struct, frozen=True, kw_only=True):
    run_at: str
    consequences: str


@move.command()
@click.argument("move_id", metavar="ID", type=MOVE)
@click.option("--run-at", type=click.Choice(["source", "target", "restart"]), help="Where the VM shall run.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@json_option
@click.pass_obj
def resolve(session: Session, move_id: str, run_at: str | None, yes: bool) -> int:
    """Decide a move that needs the operator. Without --run-at: the choices and what follows from each.

    Ask the host whose copy shall go on or be given up; the other host keeps its own word.
    """
    agent = session.agent()
    found = _find(agent, move_id)
    offered = agent.call("GET", f"moves/{found.id}/choices", list[_Choice])
    chosen = next((choice for choice in offered if choice.run_at == run_at), None)
    if run_at is None:
        session.answer(offered, lambda: output.pairs([(f"--run-at {it.run_at}", it.consequences) for it in offered]))
        return 0
    if chosen is not None and not yes:
        output.note(chosen.consequences)
        if not sys.stdin.isatty():
            raise CallerError("confirm-needed", "this decision wants a confirmation", "add --yes")
        click.confirm("Is that what you want?", abort=True, err=True)
    body = {"run_at": run_at}
    decided = agent.call("POST", f"moves/{found.id}/resolve", MoveReport, body=body, timeout_s=CHECK_TIMEOUT_S)
    session.answer(decided, lambda: draw_report(decided))
    return 0 if decided.error is None or decided.error.code == "resolved" else exit_status(decided)


_CANCEL_TEXT = {
    Outcome.CANCELLED: "cancelled, the VM runs on at the source",
    Outcome.RUNNING: "is being cancelled; see its end with: kvmhv move watch",
}
