"""`kvmhv completion`: what a shell has to read to complete commands, VMs, hosts and moves."""

import click
from click.shell_completion import get_completion_class


@click.command()
@click.argument("shell", type=click.Choice(("bash", "zsh", "fish")))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print the completion script of SHELL.

    For bash, once: kvmhv completion bash > /etc/bash_completion.d/kvmhv
    """
    kind = get_completion_class(shell)
    assert kind is not None, "click knows each of the choices"
    root = context.find_root()
    click.echo(kind(root.command, {}, "kvmhv", "_KVMHV_COMPLETE").source())
