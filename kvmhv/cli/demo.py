"""`kvmhv demo`: the lab's scenario on the terminal, and its report."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kvmhv.cli import output
from kvmhv.cli.session import Session, json_option
from kvmhv.config import parse_size
from kvmhv.model import HostReport

if TYPE_CHECKING:
    from kvmhv.lab.demo import DemoReport, MoveSeen


@click.command()
@click.option("--rate", default="400mbit", show_default=True, help="Speed of the migration network.")
@click.option("--dirty", default="20M", show_default=True, help="Memory that the guest dirties each second.")
@click.option("--memory", default="256M", show_default=True, help="The guest's memory.")
@click.option("--disk", default="64M", show_default=True, help="The guest's disk.")
@click.option("--rounds", default=1, show_default=True, type=click.IntRange(1, 100), help="Times there and back.")
@click.option(
    "--storage",
    type=click.Choice(["smb", "nfs", "iscsi"]),
    help="Its disk lies on a server that both hosts reach: only memory moves.",
)
@click.option(
    "--format", "disk_format", type=click.Choice(["qcow2", "raw"]), default="qcow2", help="With --storage: the disk's."
)
@click.option("--to", "target", metavar="HOST", help="Between this host and that one, no lab: what a user would type.")
@click.option("--location", default="", metavar="NAME", help="With --to: the disk lies there, only memory moves.")
@click.option("--guest", type=click.Path(path_type=Path), help="With --to: the boot-sector guest's disk.")
@json_option
@click.pass_obj
def demo(
    session: Session,
    rate: str,
    dirty: str,
    memory: str,
    disk: str,
    rounds: int,
    storage: str | None,
    disk_format: str,
    target: str | None,
    location: str,
    guest: Path | None,
) -> None:
    """Move a busy VM between two hosts on this machine, and back, with its disk; watched from a third host.

    Makes what it needs (lab, guest) and leaves nothing running. Needs root. With --to it runs between real hosts.
    """
    if target is not None:
        _between_hosts(session, target, location, guest)
        return
    from kvmhv.lab.demo import Demo, Work  # noqa: PLC0415 - the lab is imported only when it is needed

    started = time.monotonic()

    def progress(text: str) -> None:
        output.note(f"[{time.monotonic() - started:6.1f} s] {text}")

    work = Work(memory=memory, disk=disk, dirty=dirty, rate=rate)
    report = Demo("demo", work, progress, rounds, (storage, disk_format) if storage else None).run()
    if session.json:
        output.emit(_as_json(report))
    else:
        _show(report, work.dirty, time.monotonic() - started)
    if report.problems():
        raise click.exceptions.Exit(1)


def _between_hosts(session: Session, target: str, location: str, guest: Path | None) -> None:
    from kvmhv.lab.host_demo import GUEST, HostDemo  # noqa: PLC0415 - as above

    reports = HostDemo(target, location, guest or GUEST, output.note).run()
    if session.json:
        output.emit(reports)
    blackouts = ", ".join(f"{one['blackout_ms']:.0f} ms" for one in reports if one["blackout_ms"] is not None)
    if any(one["outcome"] != "done" for one in reports):
        raise click.exceptions.Exit(1)
    output.note(f"there and back; blackouts: {blackouts}")
    address = session.agent().call("GET", "host", HostReport).address
    output.note(f"where to look: https://{address}/ (live page), https://{address}/metrics")


def _show(report: "DemoReport", dirty: str, seconds: float) -> None:
    output.say("\nWhat the guest's users saw, measured on the client:")
    columns = ("move", "blackout", "longest silence", "pings lost", "longest TCP stall", "writes acknowledged")
    output.table(columns, [_outside(number, move) for number, move in enumerate(report.moves, 1)])
    sent = sum(move.window["pings"]["sent"] for move in report.moves)
    lost = sum(move.window["pings"]["lost"] for move in report.moves)
    rows: list[tuple[str, object]] = [
        ("TCP connection", _connection(report.watch)),
        ("boot id", _boot(report.watch)),
        ("pings during the moves", f"{sent} sent, {lost} lost"),
        ("dirtied all the time", output.rate_text(parse_size(dirty))),
    ]
    if report.disk is not None:
        missing = sum(report.disk[kind] for kind in ("lost", "stale", "torn", "misplaced"))
        rows.append(("acknowledged writes", f"{report.disk['acked_records']} acknowledged, {missing} missing"))
    rows.append(("left behind", f"{len(report.leftovers)} things"))
    output.say("")
    output.pairs(rows)
    problems = report.problems()
    for problem in problems:
        output.say(f"PROBLEM: {problem}")
    end = "not as promised" if problems else "as promised: nothing lost, nothing left"
    output.say(f"\nThe demo took {output.seconds_text(seconds)}; {end}.")


def _outside(number: int, move: "MoveSeen") -> tuple[object, ...]:
    window, report = move.window, move.report
    blackout_ms = report["blackout_ms"]
    return (
        f"{number}: {report['source']} to {report['target']}",
        "-" if blackout_ms is None else f"{blackout_ms:.0f} ms",
        f"{window['beats']['longest_gap_ms']:.0f} ms",
        f"{window['pings']['lost']} of {window['pings']['sent']}",
        f"{window['echo']['longest_stall_ms']:.0f} ms",
        window["acks"]["received"],
    )


def _connection(watch: dict[str, Any]) -> str:
    trips = watch["total"]["echo"]["round_trips"]
    if watch["echo_broken"]:
        return f"broken after {trips} round trips: {watch['echo_broken']['reason']}"
    return f"the same one all the time, {trips} round trips"


def _boot(watch: dict[str, Any]) -> str:
    boots = watch["boot_ids"]
    return f"{boots[0]}, the same all the time" if len(boots) == 1 else f"changed: {', '.join(boots)}"


def _as_json(report: "DemoReport") -> dict[str, object]:
    return {
        "moves": [{"report": move.report, "outside": move.window} for move in report.moves],
        "watch": report.watch,
        "disk": report.disk,
        "leftovers": report.leftovers,
        "problems": report.problems(),
    }
