"""How the guest's disk requests come on, seen in the rings that guest and QEMU share.

Two running indices of a virtio queue say it all: what QEMU has taken and not yet answered (`inuse`), and how many
answers it has given (`used-idx`, modulo 2^16). Nothing is asked of the storage, so the look cannot hang with it.
"""

from kvmhv.drivers.qemu.answers import Queue
from kvmhv.drivers.qemu.qmp import Qmp
from kvmhv.model import DiskIo, Vm

LOOK_S = 2.0
DEVICE = "/machine/peripheral/{}-device/virtio-backend"


async def look(qmp: Qmp, vm: Vm) -> dict[str, DiskIo]:
    """Return how far each disk is. Raises QmpRefused (a guest without driver: no queue is there yet), QmpLost."""
    queues = [(disk.name, number) for disk in vm.disks for number in range(vm.cpus)]
    questions = (("x-query-virtio-queue-status", {"path": DEVICE.format(name), "queue": n}) for name, n in queues)
    answers = await qmp.together(*questions, timeout_s=LOOK_S, logged=False)
    found: dict[str, DiskIo] = {}
    for (name, _), answer in zip(queues, answers, strict=True):
        before = found.get(name, DiskIo(answered=0, waits=False))
        queue = qmp.read(Queue, answer, "x-query-virtio-queue-status")
        found[name] = DiskIo(answered=before.answered + queue.used_idx, waits=before.waits or queue.inuse > 0)
    return found
