"""What the target of a move does with its disks over QMP: exports that the source writes, layers that are sealed again.

The NBD server has one port for all of a VM's disks, and one export for each layer that travels, named after its node.
"""

from kvmhv.drivers.qemu.graph import Node, inet_address
from kvmhv.drivers.qemu.keys import TLS_OBJECT
from kvmhv.drivers.qemu.qmp import Qmp, QmpRefused
from kvmhv.drivers.qemu.rundir import VmDir, keep_json, read_json
from kvmhv.errors import HostError
from kvmhv.model import Plan


async def export(qmp: Qmp, plan: Plan, ports: tuple[int, int], nodes: list[str]) -> int:
    """Export nodes for writing by NBD under the key, at the plan's address; returns the port, one of `ports`.

    Raises HostError `no-port` when all are in use.
    """
    for port in range(ports[0], ports[1] + 1):
        try:
            await qmp.execute(
                "nbd-server-start",
                {"addr": {"type": "inet", "data": inet_address(plan, port)}, "tls-creds": TLS_OBJECT},
            )
        except QmpRefused as error:
            if "in use" not in error.description:
                raise
            continue
        for node in nodes:
            await qmp.execute(
                "block-export-add",
                {"type": "nbd", "id": f"export-{node}", "node-name": node, "name": node, "writable": True},
            )
        return port
    text = f"no port of {ports[0]}-{ports[1]} is free on {plan.target_address}"
    raise HostError("no-port", text, "widen migration_ports")


async def unexport(qmp: Qmp) -> None:
    """End the NBD server and with it every export and connection; no error if there is none."""
    try:
        await qmp.execute("nbd-server-stop")
    except QmpRefused as error:
        if "not running" not in error.description:
            raise


def remember_sealing(directory: VmDir, nodes: list[Node]) -> None:
    """Keep which nodes `seal` has to make read only, for an agent that is restarted before it can."""
    sealed = [{**node, "read-only": True} for node in nodes]
    keep_json(directory.path / "seal.json", sealed)


async def seal(qmp: Qmp, directory: VmDir) -> None:
    """Make the backing layers that a move wrote read only, as they are on any other day; no error if done before."""
    file = directory.path / "seal.json"
    if file.exists():
        nodes = read_json(file, list[dict[str, object]])
        if nodes:
            await qmp.execute("blockdev-reopen", {"options": nodes})
        file.unlink(missing_ok=True)
