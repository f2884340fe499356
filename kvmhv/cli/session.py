"""What the commands of one call share: which agent, and whether a person or a script reads the answer."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import click

from kvmhv.cli import address, output
from kvmhv.cli.connection import Agent

Command = TypeVar("Command", bound=Callable[..., Any])


@dataclass
class Session:
    """One call of `kvmhv`."""

    host: str | None = None
    json: bool = False

    def agent(self) -> Agent:
        """Return the agent that --host names. Raises CallerError for a URL that is none."""
        return Agent(address.find(self.host))

    def answer(self, value: object, draw: Callable[[], None]) -> None:
        """Print a result: as JSON if that was asked for, else by `draw`."""
        if self.json:
            output.emit(value)
        else:
            draw()


def _set_json(context: click.Context, _parameter: click.Parameter, value: bool) -> None:
    if value:
        context.ensure_object(Session).json = True


def json_option(command: Command) -> Command:
    """Give a command `--json`, which means the same before and after the command's name."""
    option = click.option(
        "--json", is_flag=True, expose_value=False, callback=_set_json, help="Print JSON, nothing else."
    )
    return option(command)
