"""`kvmhv lab`: hosts on this machine, each with its own agent. The lab itself is imported only when it is needed."""

from __future__ import annotations

import os
import sys
from typing import Any

import click

from kvmhv.cli import output
from kvmhv.cli.session import Session, json_option

_RATE_HELP = "Speed of the migration network, e.g. 400mbit; unlimited when not given."

lab_option = click.option(
    "--lab",
    "lab_name",
    envvar="KVMHV_LAB",
    default="lab",
    show_default=True,
    metavar="NAME",
    help="Which lab: several can be up at once without touching each other (also by KVMHV_LAB).",
)


@click.group()
def lab() -> None:
    """Hosts on this machine: host1 and host2 with an agent each, and a client.

    They are joined by a management, a migration and a guest network (the switch `lan`); the machine itself is left as
    it is. Needs root.
    """


def _suites(_context: click.Context, _parameter: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    suites: dict[str, str] = {}
    for value in values:
        host, equals, suite = value.partition("=")
        if not (host and equals and suite):
            raise click.BadParameter(f"{value!r} is not HOST=SUITE, e.g. host2=bookworm")
        suites[host] = suite
    return suites


@lab.command()
@click.option("--rate", metavar="RATE", help=_RATE_HELP)
@click.option(
    "--suite",
    "suites",
    multiple=True,
    metavar="HOST=SUITE",
    callback=_suites,
    help="Debian of one host: trixie (default) or bookworm.",
)
@click.option("--agents/--no-agents", default=True, show_default=True, help="Run an agent on host1 and host2.")
@click.option("--storage", is_flag=True, help="With a file server: SMB, NFS and iSCSI (host `storage`).")
@lab_option
@json_option
@click.pass_obj
def up(session: Session, rate: str | None, suites: dict[str, str], agents: bool, storage: bool, lab_name: str) -> None:
    """Bring a lab up. The first time builds its Debian tree, which takes a minute or two."""
    from kvmhv.lab.lab import Lab  # noqa: PLC0415

    made = Lab.up(lab_name, rate=rate, suites=suites, agents=agents, storage=storage, progress=output.note)
    session.answer(made.status(), lambda: None)


@lab.command()
@lab_option
@json_option
@click.pass_obj
def down(session: Session, lab_name: str) -> None:
    """End a lab, whole or half-made, and remove all of it."""
    from kvmhv.lab.lab import down as end  # noqa: PLC0415

    removed = end(lab_name)
    text = f"lab {lab_name!r} is down" if removed else f"lab {lab_name!r} was not up"
    session.answer({"name": lab_name, "state": "down", "removed": removed}, lambda: output.say(text))


@lab.command()
@lab_option
@json_option
@click.pass_obj
def status(session: Session, lab_name: str) -> None:
    """Show a lab's hosts, their addresses, and its networks."""
    from kvmhv.lab.lab import status as find  # noqa: PLC0415

    found = find(lab_name)
    session.answer(found, lambda: _draw(found))


def _draw(found: dict[str, Any]) -> None:
    output.say(f"lab {found['name']!r} is {found['state']}")
    if found["state"] != "up":
        output.say("start it with: kvmhv lab up")
        return
    networks = found["networks"]
    rows = [
        (host["name"], host["state"], host["suite"], *(host["addresses"][network] for network in networks))
        for host in found["hosts"]
    ]
    output.table(("host", "state", "debian", *networks), rows)
    output.say("")
    output.table(("network", "subnet", "rate"), [(name, net["subnet"], net["rate"]) for name, net in networks.items()])


@lab.command(
    "exec",
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
    options_metavar="[--lab NAME]",
)
@lab_option
@click.argument("host")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED, metavar="-- CMD...")
def exec_(lab_name: str, host: str, command: tuple[str, ...]) -> None:
    """Run a command on a host, with this terminal; its exit status is the command's."""
    from kvmhv.lab.lab import Lab  # noqa: PLC0415

    argv = Lab.open(lab_name).host(host).argv(command[1:] if command[0] == "--" else command)
    sys.stdout.flush()
    os.execvp(argv[0], argv)  # noqa: S606  (no shell is meant)
