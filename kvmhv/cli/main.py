"""`kvmhv`: the root command, and the one place where an error becomes a message and an exit status."""

import importlib
import io
import os
import sys
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

import click

from kvmhv import __version__
from kvmhv.cli.session import Session, json_option

if TYPE_CHECKING:
    from kvmhv.model import ErrorBody

INTERRUPTED = 130

COMMANDS = {
    "agent": ("kvmhv.cli.agent", "Run the agent of this host (systemd does)."),
    "completion": ("kvmhv.cli.completion", "Print the completion script of a shell."),
    "demo": ("kvmhv.cli.demo", "Move a busy VM between two hosts on this machine."),
    "doctor": ("kvmhv.cli.doctor", "What on a host would keep VMs from running or moving."),
    "events": ("kvmhv.cli.events", "What happened to a host's moves, and who asked."),
    "host": ("kvmhv.cli.host", "A host, its settings and whom it trusts."),
    "image": ("kvmhv.cli.image", "Kernels, initrds and disks for new VMs."),
    "lab": ("kvmhv.cli.lab", "Hosts in network namespaces on this machine."),
    "move": ("kvmhv.cli.move", "Moves that run or have ended."),
    "storage": ("kvmhv.cli.storage", "Locations: places for disks, on hosts and on servers."),
    "vm": ("kvmhv.cli.vm", "VMs: create, start, stop, move."),
}
"""Each command's module and its line in --help; the module's attribute is called like the command."""


class LazyGroup(click.Group):
    """Knows its commands by name and imports one when it is run."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return all names."""
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the command; None if there is none of that name."""
        if cmd_name not in COMMANDS:
            return None
        command = getattr(importlib.import_module(COMMANDS[cmd_name][0]), cmd_name)
        if not isinstance(command, click.Command):
            raise TypeError(f"{cmd_name} is not a command")
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, COMMANDS[name][1]) for name in self.list_commands(ctx)])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option(
    "--host",
    metavar="NAME|URL",
    envvar="KVMHV_HOST",
    help="Whose agent to ask: a trusted host, a lab's host, or https://NAME:6600 with KVMHV_TOKEN and "
    "KVMHV_FINGERPRINT. Default: this host's.  [env: KVMHV_HOST]",
)
@json_option
@click.version_option(__version__, message="%(version)s")
@click.pass_context
def kvmhv(context: click.Context, host: str | None) -> None:
    """Hyper-V's live migration for QEMU/KVM: a running VM moves between two Linux hosts, every phase measured.

    Exit status: 0 done, 1 failed (the VM runs at the source), 2 the request is wrong, 3 incompatible (findings),
    4 refused, 5 needs the operator, 6 cancelled.
    """
    context.ensure_object(Session).host = host or None


def main(arguments: Sequence[str]) -> int:
    """Run one command and return its exit status; every error is printed here, none is raised."""
    session = Session()
    try:
        status = kvmhv.main(list(arguments), prog_name="kvmhv", standalone_mode=False, obj=session)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return 2
    except (click.Abort, KeyboardInterrupt):
        return INTERRUPTED
    except Exception as error:
        return _tell(error, as_json=session.json or _wants_json(arguments))
    return status if isinstance(status, int) else 0


def run() -> NoReturn:
    """Entry point of the program."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names come from elsewhere, terminals know less than Unicode
    sys.exit(main(sys.argv[1:]))


def _wants_json(arguments: Sequence[str]) -> bool:
    """Whether --json was given on a command line that could not be parsed."""
    options = arguments[: arguments.index("--")] if "--" in arguments else arguments
    return "--json" in options


def _tell(error: Exception, *, as_json: bool) -> int:
    from kvmhv.cli import output  # noqa: PLC0415 - a command that went well may not need them
    from kvmhv.errors import KvmhvError  # noqa: PLC0415
    from kvmhv.model import ErrorBody  # noqa: PLC0415

    if isinstance(error, KvmhvError):
        body = error.body()
    elif isinstance(error, click.ClickException):
        context = getattr(error, "ctx", None)
        command = context.command_path if isinstance(context, click.Context) else "kvmhv"
        text = error.format_message()
        body = ErrorBody(code="usage", message=text, todo=f"see: {command} --help", exit_status=2)
    else:
        body = _unexpected(error)
    output.error(body, as_json=as_json)
    return body.exit_status


def _unexpected(error: Exception) -> "ErrorBody":
    from kvmhv.model import ErrorBody  # noqa: PLC0415

    if os.environ.get("KVMHV_DEBUG"):
        traceback.print_exception(error)
    place = traceback.extract_tb(error.__traceback__)[-1]
    text = (
        f"kvmhv itself failed: {type(error).__name__}: {error} ({place.name}, line {place.lineno} of {place.filename})"
    )
    todo = "report it, with what KVMHV_DEBUG=1 prints when you run the same again"
    return ErrorBody(code="internal", message=text, todo=todo)
