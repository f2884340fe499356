"""`kvmhv vm`: VMs from their creation to their end; their moves stand in move.py."""

import sys
from contextlib import closing
from pathlib import Path
from urllib.parse import urlencode

import click
import msgspec

from kvmhv.cli import output
from kvmhv.cli.address import segment
from kvmhv.cli.connection import Agent
from kvmhv.cli.move import check, move_vm
from kvmhv.cli.parameters import IMAGE, NEW, VM, DiskText, Size
from kvmhv.cli.session import Session, json_option
from kvmhv.cli.storage_move import move_storage
from kvmhv.model import CPUS_MAX, OUTSIDE, Disk, DiskSpec, IoStall, Nic, VmDetails, VmSpec, VmSummary

CREATE_TIMEOUT_S = 3600.0
"""Disks made of images are copied before the answer comes."""
START_TIMEOUT_S = 180.0
STOP_GRACE_S = 60.0
"""The agent's own default for the guest to shut down (config: stop_grace_s)."""


@click.group()
def vm() -> None:
    """VMs: create, start, stop, move."""


vm.add_command(check)
vm.add_command(move_vm)
vm.add_command(move_storage)


def _details(agent: Agent, name: str) -> VmDetails:
    return agent.call("GET", f"vms/{segment(name)}", VmDetails)


@vm.command()
@click.argument("name", type=NEW)
@click.option("--memory", type=Size(), required=True, metavar="SIZE", help="The guest's memory, e.g. 256M.")
@click.option("--cpus", type=click.IntRange(1, CPUS_MAX), default=1, show_default=True, help="Virtual CPUs.")
@click.option(
    "--disk",
    "disks",
    type=DiskText(),
    multiple=True,
    metavar="SPEC",
    help="size=4G | file=PATH | image=NAME, with format=qcow2|raw, backing=..., location=...; may be repeated.",
)
@click.option("--image", type=IMAGE, help="Made of this image: its kernel, its disk as disk0, or both.")
@click.option("--append", metavar="TEXT", help="The kernel's command line, instead of the image's.")
@click.option("--switch", "switches", multiple=True, metavar="NAME", help="A card on this switch; may be repeated.")
@click.option("--mac", "macs", multiple=True, metavar="MAC", help="The card's address, in the order of --switch.")
@click.option("--cpu", metavar="MODEL", help="CPU model; default: one that every host has.")
@click.option("--machine", metavar="TYPE", help="Versioned machine type; default: one that every host has.")
@click.option(
    "--free-page-reporting/--no-free-page-reporting",
    default=True,
    help="The guest gives what it frees back to the host, and it need not be sent; default: yes.",
)
@click.option("--start", "and_start", is_flag=True, help="Start it, too.")
@json_option
@click.pass_obj
def create(
    session: Session,
    name: str,
    memory: int,
    cpus: int,
    disks: tuple[DiskSpec, ...],
    image: str | None,
    append: str | None,
    switches: tuple[str, ...],
    macs: tuple[str, ...],
    cpu: str | None,
    machine: str | None,
    free_page_reporting: bool,
    and_start: bool,
) -> None:
    """Define a VM."""
    if len(macs) > len(switches):
        raise click.UsageError("there are more --mac than --switch")
    agent = session.agent()
    spec = VmSpec(
        name=name,
        memory_bytes=memory,
        cpus=cpus,
        machine=machine,
        cpu=cpu,
        disks=tuple(_absolute(disk) for disk in disks) if agent.address.local else disks,
        switches=switches,
        macs=macs,
        image=image,
        append=append,
        free_page_reporting=free_page_reporting,
    )
    agent.call("POST", "vms", object, body=spec, timeout_s=CREATE_TIMEOUT_S)
    if and_start:
        agent.call("POST", f"vms/{segment(name)}/start", object, timeout_s=START_TIMEOUT_S)
    _say_or_show(session, agent, name, "created and started" if and_start else "created")


def _absolute(disk: DiskSpec) -> DiskSpec:
    """A relative path is meant from here, and the agent works elsewhere."""
    return disk if disk.file is None else msgspec.structs.replace(disk, file=str(Path(disk.file).absolute()))


def _say_or_show(session: Session, agent: Agent, name: str, what: str) -> None:
    if session.json:
        output.emit(_details(agent, name))
    else:
        output.say(f"{name} {what}")


@vm.command()
@click.argument("name", type=VM)
@click.option(
    "--take-over",
    is_flag=True,
    help="Start it although another host owns its disks: only if that host is surely dead and stays so.",
)
@json_option
@click.pass_obj
def start(session: Session, name: str, take_over: bool) -> None:
    """Start a VM."""
    agent = session.agent()
    body = {"take_over": take_over}
    agent.call("POST", f"vms/{segment(name)}/start", object, body=body, timeout_s=START_TIMEOUT_S)
    _say_or_show(session, agent, name, "started")


@vm.command()
@click.argument("name", type=VM)
@click.option("--force", is_flag=True, help="End it at once, as if its power failed.")
@click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(min=0, max=3600),
    metavar="SECONDS",
    help=f"How long the guest may take to shut down before it is ended by force; default {STOP_GRACE_S:.0f}.",
)
@json_option
@click.pass_obj
def stop(session: Session, name: str, force: bool, timeout_s: float | None) -> None:
    """Stop a VM: by its power button, then by force."""
    agent = session.agent()
    body = {"force": force, "timeout_s": timeout_s}
    patience_s = (STOP_GRACE_S if timeout_s is None else timeout_s) + 60.0
    agent.call("POST", f"vms/{segment(name)}/stop", object, body=body, timeout_s=patience_s)
    _say_or_show(session, agent, name, "stopped")


@vm.command("set")
@click.argument("name", type=VM)
@click.option(
    "--probe",
    metavar="PROBE",
    help="What the source asks the guest while it moves, to measure the gap to its first answer: ping:IP, "
    "tcp:IP:PORT or http://IP[:PORT][/PATH].",
)
@click.option("--no-probe", is_flag=True, help="Ask it nothing.")
@click.option(
    "--free-page-reporting/--no-free-page-reporting",
    default=None,
    help="Of a stopped VM: whether its guest gives what it frees back to the host.",
)
@json_option
@click.pass_obj
def set_vm(session: Session, name: str, probe: str | None, no_probe: bool, free_page_reporting: bool | None) -> None:
    """Change a VM: what its guest sees, only while it is stopped."""
    if probe is not None and no_probe:
        raise click.UsageError("give --probe or --no-probe")
    changes: dict[str, object] = {}
    done = []
    if free_page_reporting is not None:
        changes["free_page_reporting"] = free_page_reporting
        done.append(f"{'gives' if free_page_reporting else 'does not give'} what it frees back to the host")
    if probe is not None or no_probe:
        changes["probe"] = probe
        done.append("has no probe" if probe is None else f"is asked by {probe} when it moves")
    if not changes:
        raise click.UsageError("give what is to be changed: --probe, --no-probe or --[no-]free-page-reporting")
    agent = session.agent()
    agent.call("PATCH", f"vms/{segment(name)}", object, body=changes)
    _say_or_show(session, agent, name, ", ".join(done))


@vm.command()
@click.argument("name", type=VM)
@click.option("--keep-disks", is_flag=True, help="Leave its disks where they are.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@json_option
@click.pass_obj
def remove(session: Session, name: str, keep_disks: bool, yes: bool) -> None:
    """Remove a stopped VM with its disks. Asks first on a terminal."""
    if not (yes or session.json) and sys.stdin.isatty() and sys.stdout.isatty():
        click.confirm(f"Remove {name}{'' if keep_disks else ' and its disks'}?", abort=True)
    query = urlencode({"keep_disks": "true" if keep_disks else "false"})
    session.agent().call("DELETE", f"vms/{segment(name)}?{query}", object)
    session.answer({"name": name, "removed": True}, lambda: output.say(f"{name} removed"))


@vm.command("list")
@json_option
@click.pass_obj
def list_vms(session: Session) -> None:
    """List VMs."""
    found = session.agent().call("GET", "vms", list[VmSummary])

    def draw() -> None:
        others = any(it.runtime for it in found)
        rows = [_row(it, (it.runtime or "kvmhv",) if others else ()) for it in found]
        output.table(("name", "state", "host", "memory", "cpus", *(("run by",) if others else ()), "id"), rows)

    session.answer(found, draw)


def _row(it: VmSummary, run_by: tuple[str, ...]) -> tuple[object, ...]:
    return it.name, it.state, it.host, output.size_text(it.memory_bytes), it.cpus, *run_by, it.id


@vm.command()
@click.argument("name", type=VM)
@json_option
@click.pass_obj
def show(session: Session, name: str) -> None:
    """Show a VM's definition and what runs of it."""
    details = _details(session.agent(), name)
    session.answer(details, lambda: _draw(details))


def _draw(details: VmDetails) -> None:
    it = details.vm
    kernel = f"kernel {output.size_text(it.kernel.kernel_bytes)}, append {it.kernel.append!r}" if it.kernel else "disk"
    output.pairs(
        [
            ("name", it.name),
            ("id", it.id),
            ("state", details.state if details.exit_reason is None else f"{details.state} ({details.exit_reason})"),
            ("host", details.host),
            ("run by", it.runtime or None),
            ("memory", output.size_text(it.memory_bytes)),
            ("cpus", f"{it.cpus} ({it.cpu})"),
            ("machine", it.machine),
            ("boot", kernel if not it.runtime else None),
            ("epoch", it.epoch if not it.runtime else None),
            ("free pages", _FREE_PAGES[it.free_page_reporting] if not it.runtime else None),
            ("probe", it.probe),
            ("qemu", f"{details.qemu_version}, {details.accel}, process {details.pid}" if details.pid else None),
            ("started", output.time_text(details.started_at)),
            ("move", details.move),
            ("console", details.console),
            *(("waits", _stall_text(stall)) for stall in details.io_stalled),
        ]
    )
    if it.disks:
        output.say("")
        output.table(("disk", "size", "format", "layers, the top first"), [_disk_row(disk) for disk in it.disks])
    if it.nics:
        output.say("")
        output.table(("card", "switch", "mac"), [_nic_row(nic) for nic in it.nics])


_FREE_PAGES = {True: "given back to the host", False: "kept"}


def _stall_text(stall: IoStall) -> str:
    since = output.time_text(stall.since)
    return f"{stall.disk} ({stall.place}) has answered nothing for {stall.seconds:.0f} s, since {since}"


def _disk_row(disk: Disk) -> tuple[object, ...]:
    layers = ", ".join(
        layer.path if layer.location == OUTSIDE else f"{layer.location}/{layer.path}" for layer in disk.layers
    )
    return disk.name, output.size_text(disk.size_bytes), disk.layers[0].format, layers


def _nic_row(nic: Nic) -> tuple[object, ...]:
    return nic.name, nic.switch, nic.mac


@vm.command()
@click.argument("name", type=VM)
@click.pass_obj
def console(session: Session, name: str) -> None:
    """Use a VM's serial console. Ctrl-] leaves it."""
    from kvmhv.cli import console as terminal  # noqa: PLC0415 - termios and friends, for this command only

    with closing(session.agent().open_websocket(f"vms/{segment(name)}/console")) as connection:
        terminal.run(connection)
