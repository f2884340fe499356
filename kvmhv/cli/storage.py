"""`kvmhv storage`: locations, the named places for disks of a host."""

import sys
from pathlib import Path

import click

from kvmhv.cli import output
from kvmhv.cli.address import segment
from kvmhv.cli.parameters import LOCATION, NEW
from kvmhv.cli.session import Session, json_option
from kvmhv.errors import CallerError
from kvmhv.model import Access, LocationKind, LocationReport, LocationSpec

ADD_TIMEOUT_S = 90.0
SECRET_FILE_MAX = 4096


@click.group()
def storage() -> None:
    """Locations: named places for disks, on this host or on servers that other hosts reach too."""


@storage.command()
@click.argument("name", type=NEW)
@click.option("--kind", type=click.Choice([str(it) for it in LocationKind]), required=True, help="What it is.")
@click.option("--path", default="", metavar="DIR", help="dir: the directory; nfs, smb: where you have mounted it.")
@click.option("--server", default="", metavar="HOST[:PORT]", help="nfs, smb: the server; iscsi: the portal.")
@click.option("--share", default="", metavar="NAME", help="nfs: the export; smb: the share; iscsi: the target's IQN.")
@click.option("--user", default="", metavar="USER", help="smb: the user; iscsi: the CHAP user.")
@click.option(
    "--password-file",
    type=click.Path(path_type=Path, allow_dash=True),
    metavar="FILE",
    help="Where the password or CHAP secret is read from, `-` for standard input; else it is asked for.",
)
@click.option(
    "--access",
    type=click.Choice([str(it) for it in (Access.AUTO, Access.KERNEL, Access.USER)]),
    default=str(Access.AUTO),
    show_default=True,
    help="nfs, smb: by the kernel's client or in user space.",
)
@click.option("--shared", is_flag=True, help="dir: other hosts see this directory too.")
@click.option(
    "--records-lun",
    type=click.IntRange(0, 16383),
    default=1,
    show_default=True,
    help="iscsi: a small LUN for kvmhv's own records (4 MiB).",
)
@json_option
@click.pass_obj
def add(
    session: Session,
    name: str,
    kind: str,
    path: str,
    server: str,
    share: str,
    user: str,
    password_file: Path | None,
    access: str,
    shared: bool,
    records_lun: int,
) -> None:
    """Add a location; it is reached, written and read before it is kept."""
    spec = LocationSpec(
        name=name,
        kind=LocationKind(kind),
        path=path,
        server=server,
        share=share,
        user=user,
        access=Access(access),
        shared=shared,
        records_lun=records_lun,
    )
    body = {"spec": spec, "secret": _secret(password_file) if user or password_file else None}
    report = session.agent().call("POST", "storage", LocationReport, body=body, timeout_s=ADD_TIMEOUT_S)
    session.answer(report, lambda: output.say(f"location {name} added: {report.location.path}"))


def _secret(file: Path | None) -> str:
    """Read a secret from where no other process sees it. Raises CallerError `password-missing`."""
    if file is None:
        if not sys.stdin.isatty():
            raise CallerError("password-missing", "there is no terminal to ask for the password", "use --password-file")
        return str(click.prompt("Password", hide_input=True, err=True))
    try:
        text = sys.stdin.read(SECRET_FILE_MAX) if str(file) == "-" else file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise CallerError("password-missing", f"{file}: {error}", "give a file with the password in it") from error
    if not text.strip("\r\n"):
        raise CallerError("password-missing", f"{file} is empty", "give a file with the password in it")
    return text.strip("\r\n")


@storage.command("list")
@json_option
@click.pass_obj
def list_locations(session: Session) -> None:
    """List locations."""
    found = session.agent().call("GET", "storage", list[LocationReport])
    rows = [
        (
            it.spec.name,
            it.location.kind,
            it.location.access,
            it.location.path,
            "-" if it.location.silent else output.size_text(it.location.free_bytes),
            "-" if it.location.silent else output.size_text(it.location.total_bytes),
            ", ".join(it.vms) or None,
            ", ".join(problem.id for problem in it.problems) or None,
        )
        for it in found
    ]
    columns = ("name", "kind", "access", "place", "free", "total", "vms", "problems")
    session.answer(found, lambda: output.table(columns, rows))


@storage.command()
@click.argument("name", type=LOCATION)
@json_option
@click.pass_obj
def show(session: Session, name: str) -> None:
    """Show a location."""
    report = session.agent().call("GET", f"storage/{segment(name)}", LocationReport)
    session.answer(report, lambda: _draw(report))


@storage.command()
@click.argument("name", type=LOCATION)
@json_option
@click.pass_obj
def check(session: Session, name: str) -> None:
    """Write to, read and clear a location now. Exit status 1 when something is wrong with it."""
    agent = session.agent()
    report = agent.call("POST", f"storage/{segment(name)}/check", LocationReport, timeout_s=ADD_TIMEOUT_S)
    session.answer(report, lambda: _draw(report))
    if report.problems:
        raise click.exceptions.Exit(1)


def _draw(report: LocationReport) -> None:
    spec, place = report.spec, report.location
    output.pairs(
        [
            ("name", spec.name),
            ("kind", f"{place.kind}, {place.access}"),
            ("place", place.path),
            ("user", f"{spec.user} (secret kept)" if report.has_secret else spec.user or None),
            ("shared", place.shared_id or "no"),
            ("space", "-" if place.silent else f"{output.size_text(place.free_bytes)} free"),
            ("vms", ", ".join(report.vms) or None),
            ("from", "agent.toml" if report.configured else "kvmhv storage add"),
        ]
    )
    if report.problems:
        output.say("")
        rows = [(problem.severity, problem.id, problem.text, problem.todo) for problem in report.problems]
        output.table(("severity", "problem", "what", "what to do"), rows)


@storage.command()
@click.argument("name", type=LOCATION)
@json_option
@click.pass_obj
def remove(session: Session, name: str) -> None:
    """Remove a location; what lies on it stays there."""
    session.agent().call("DELETE", f"storage/{segment(name)}", object)
    session.answer({"name": name, "removed": True}, lambda: output.say(f"location {name} removed"))
