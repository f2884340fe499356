"""`kvmhv vm move-storage`: a VM's disks go to another location of its host."""

import click

from kvmhv.cli.address import segment
from kvmhv.cli.move import CHECK_TIMEOUT_S, begun_or_waited
from kvmhv.cli.parameters import VM, Rate
from kvmhv.cli.session import Session, json_option
from kvmhv.model import MoveReport, StorageMoveRequest


@click.command("move-storage")
@click.argument("name", type=VM)
@click.option("--to", "location", required=True, metavar="LOCATION", help="Where the disks go.")
@click.option("--disk", "disks", multiple=True, metavar="DISK", help="Only this one, e.g. disk0; may be repeated.")
@click.option("--lun", type=click.IntRange(0, 16383), metavar="N", help="To an iSCSI location: the LUN for the disk.")
@click.option("--bandwidth", type=Rate(), metavar="RATE", help="At most so fast: 100M (bytes per second) or 800mbit.")
@click.option("--no-wait", is_flag=True, help="Only start the move.")
@json_option
@click.pass_obj
def move_storage(
    session: Session,
    name: str,
    location: str,
    disks: tuple[str, ...],
    lun: int | None,
    bandwidth: int | None,
    no_wait: bool,
) -> int:
    """Move a VM's disks to another location of its host, while it runs or while it is stopped.

    The guest notices a moment in which its disks answer late. Ctrl-C cancels; a second Ctrl-C leaves the move as it is.
    """
    request = StorageMoveRequest(vm=name, location=location, disks=disks, lun=lun, bandwidth_bytes_per_s=bandwidth)
    agent = session.agent()
    path = f"vms/{segment(name)}/move-storage"
    return begun_or_waited(
        session,
        agent,
        lambda: agent.call("POST", path, MoveReport, body=request, timeout_s=CHECK_TIMEOUT_S),
        no_wait=no_wait,
    )
