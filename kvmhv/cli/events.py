"""`kvmhv events`: what happened to a host's moves, who asked for it, and Hyper-V's number for it."""

import time
from collections.abc import Iterable

import click

from kvmhv.cli import output
from kvmhv.cli.connection import Agent, AgentGone
from kvmhv.cli.session import Session, json_option
from kvmhv.model import Event

IDLE_S = 20.0
RETRY_S = 1.0
LOST_S = 60.0
"""An agent that is away for so long is given up."""


@click.command()
@click.option("--follow", is_flag=True, help="Go on with what happens from now on, until Ctrl-C.")
@click.option("--after", type=click.IntRange(0, 2**53), metavar="NUMBER", help="Only events after this one.")
@click.option("--limit", type=click.IntRange(0, 2000), default=50, show_default=True, help="At most so many old ones.")
@json_option
@click.pass_obj
def events(session: Session, follow: bool, after: int | None, limit: int) -> None:
    """Show what happened to the host's moves, the newest last.

    With --json: a list; with --follow a line of JSON for each event.
    """
    agent = session.agent()
    # At least one is asked for: its number is where following begins.
    path = f"events?limit={max(1, limit)}" + (f"&after={after}" if after is not None else "")
    newest = agent.call("GET", path, list[Event])
    kept = newest if limit else []
    if not follow:
        session.answer(kept, lambda: _draw(kept))
        return
    for event in kept:
        _tell(session, event)
    _follow(session, agent, newest[-1].number if newest else after or 0)


def _follow(session: Session, agent: Agent, reached: int) -> None:
    away_since_s: float | None = None
    while True:
        begun_s = time.monotonic()
        try:
            for event in agent.events(f"events/stream?after={reached}", Event, IDLE_S):
                reached, away_since_s = event.number, None
                _tell(session, event)
        except AgentGone:
            now_s = time.monotonic()
            if away_since_s is None or now_s - begun_s > IDLE_S * 2:  # it was there all the time, and said nothing
                away_since_s = now_s
            if now_s - away_since_s > LOST_S:
                raise
        time.sleep(RETRY_S)


def _tell(session: Session, event: Event) -> None:
    session.answer(event, lambda: output.say("  ".join(_cells(event))))


def _cells(event: Event) -> list[str]:
    number = "-" if event.hyperv is None else str(event.hyperv)
    return [str(event.number), output.time_text(event.at), event.kind, number, event.text]


def _draw(kept: Iterable[Event]) -> None:
    output.table(("number", "time", "event", "hyper-v", "what"), [_cells(event) for event in kept])
