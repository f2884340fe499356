"""`kvmhv image`: kernels, initrds and disks that new VMs are made of."""

from pathlib import Path

import click

from kvmhv.cli import output
from kvmhv.cli.address import segment
from kvmhv.cli.connection import Agent, file_size
from kvmhv.cli.parameters import IMAGE, NEW
from kvmhv.cli.progress import upload_progress
from kvmhv.cli.session import Session, json_option
from kvmhv.model import DiskFormat, Image

FILE = click.Path(path_type=Path)


@click.group()
def image() -> None:
    """Kernels, initrds and disks for new VMs."""


@image.command("import")
@click.argument("name", type=NEW)
@click.option("--kernel", type=FILE, help="A Linux kernel for direct boot.")
@click.option("--initrd", type=FILE, help="Its initial RAM disk.")
@click.option("--append", metavar="TEXT", help="The kernel's command line.")
@click.option("--disk", type=FILE, help="A disk image.")
@click.option(
    "--format", "disk_format", type=click.Choice([str(it) for it in DiskFormat]), help="The disk's; default: found out."
)
@json_option
@click.pass_obj
def import_image(
    session: Session,
    name: str,
    kernel: Path | None,
    initrd: Path | None,
    append: str | None,
    disk: Path | None,
    disk_format: str | None,
) -> None:
    """Upload files of this machine to the agent as image NAME."""
    if kernel is None and disk is None:
        raise click.UsageError("an image needs --kernel or --disk")
    if kernel is None and (initrd is not None or append is not None):
        raise click.UsageError("--initrd and --append go with --kernel")
    if disk is None and disk_format is not None:
        raise click.UsageError("--format goes with --disk")
    wanted = [
        ("kernel", kernel, {} if append is None else {"append": append}),
        ("initrd", initrd, {}),
        ("disk", disk, {} if disk_format is None else {"format": disk_format}),
    ]
    files = [(part, file, file_size(file), query) for part, file, query in wanted if file is not None]
    agent = session.agent()
    for part, file, size_bytes, query in files:
        _upload(agent, f"images/{segment(name)}/{part}", file, size_bytes, query, quiet=session.json)
    made = next((found for found in _images(agent) if found.name == name), None)
    session.answer(made, lambda: output.say(f"image {name} imported ({', '.join(part for part, *_ in files)})"))


def _upload(agent: Agent, path: str, file: Path, size_bytes: int, query: dict[str, str], *, quiet: bool) -> None:
    with file.open("rb") as content, upload_progress(file.name, size_bytes, quiet=quiet) as sent:
        agent.upload(path, content, size_bytes, query, sent)


def _images(agent: Agent) -> list[Image]:
    return agent.call("GET", "images", list[Image])


@image.command("list")
@json_option
@click.pass_obj
def list_images(session: Session) -> None:
    """List images."""
    images = _images(session.agent())

    def draw() -> None:
        rows = [
            (
                found.name,
                output.size_text(found.kernel_bytes),
                output.size_text(found.initrd_bytes),
                output.size_text(found.disk_virtual_bytes or found.disk_bytes),
                found.disk_format,
                found.append or None,
            )
            for found in images
        ]
        output.table(("name", "kernel", "initrd", "disk", "format", "append"), rows)

    session.answer(images, draw)


@image.command("remove")
@click.argument("name", type=IMAGE)
@json_option
@click.pass_obj
def remove_image(session: Session, name: str) -> None:
    """Remove an image; VMs made of it keep what they have."""
    session.agent().call("DELETE", f"images/{segment(name)}", object)
    session.answer({"name": name, "removed": True}, lambda: output.say(f"image {name} removed"))
