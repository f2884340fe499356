"""`kvmhv lab`: hosts on this machine, each with its own agent. The lab itself is imported only when it is needed."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import click

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
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


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


def _say(message: str) -> None:
    click.echo(message, err=True)


def _print_json(value: Any) -> None:
    click.echo(json.dumps(value))


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
@lab_option
@json_option
def up(rate: str | None, suites: dict[str, str], agents: bool, lab_name: str, as_json: bool) -> None:
    """Bring a lab up. The first time builds its Debian tree, which takes a minute or two."""
    from kvmhv.lab.lab import Lab  # noqa: PLC0415

    made = Lab.up(lab_name, rate=rate, suites=suites, agents=agents, progress=_say)
    if as_json:
        _print_json(made.status())


@lab.command()
@lab_option
@json_option
def down(lab_name: str, as_json: bool) -> None:
    """End a lab, whole or half-made, and remove all of it."""
    from kvmhv.lab.lab import down as end  # noqa: PLC0415

    removed = end(lab_name)
    if as_json:
        _print_json({"name": lab_name, "state": "down", "removed": removed})
    else:
        _say(f"lab {lab_name!r} is down" if removed else f"lab {lab_name!r} was not up")


@lab.command()
@lab_option
@json_option
def status(lab_name: str, as_json: bool) -> None:
    """Show a lab's hosts, their addresses, and its networks."""
    from kvmhv.lab.lab import status as find  # noqa: PLC0415

    found = find(lab_name)
    if as_json:
        _print_json(found)
        return
    if found["state"] != "up":
        click.echo(f"lab {lab_name!r} is {found['state']}; start it with: kvmhv lab up")
        return
    for host in found["hosts"]:
        addresses = "  ".join(f"{network} {address}" for network, address in host["addresses"].items())
        click.echo(f"{host['name']:<10} {host['state']:<8} {host['suite']:<9} {addresses}")
    for name, network in found["networks"].items():
        click.echo(f"network {name:<11} {network['subnet']:<15} {network['rate'] or 'no limit'}")


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
