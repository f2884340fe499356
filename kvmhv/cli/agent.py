"""`kvmhv agent`: the one command that is not a client."""

import importlib
from pathlib import Path

import click


@click.command()
@click.option(
    "--config",
    metavar="FILE",
    type=click.Path(path_type=Path),
    envvar="KVMHV_CONFIG",
    help="The configuration; defaults suit one host.  [env: KVMHV_CONFIG]",
)
def agent(config: Path | None) -> int:
    """Run this host's agent in the foreground until SIGTERM. VMs outlive it."""
    status = importlib.import_module("kvmhv.agent.main").run(config)
    return int(status or 0)
