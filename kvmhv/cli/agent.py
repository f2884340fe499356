"""`kvmhv agent`: the one command that is not a client."""

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
    from kvmhv.agent.main import run  # noqa: PLC0415 - the whole agent, for this command only

    return run(config)
