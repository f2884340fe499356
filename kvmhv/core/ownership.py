"""Who may start a VM whose disks other hosts see: the record beside each such disk.

A record names host, epoch and boot. It changes only in these ways, each one a swap against what was read:

    none or let go  --claim-->  held by A, epoch n  --let go (the VM was stopped)-->  let go by A, epoch n
    held by A, epoch n  --begin_move-->  A, epoch n, moving to B  --settle-->  held by B, epoch n+1   (it runs there)
                                                                 `-settle-->  held by A, epoch n      (taken back)

While it says "moving" both hosts refuse a plain start: only the move's handover (core/handover.py) says who runs the
VM, and whoever it is settles the record afterwards. So nothing is written to it in the blackout.
"""

import msgspec

from kvmhv.model import Epoch, Struct, Vm


class Owner(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The record. Short, for it has to fit a block of a LUN."""

    vm_id: str
    vm: str
    host: str
    host_id: str
    boot_id: str
    epoch: Epoch
    held: bool = True
    """False: the VM was stopped, and may be started on any host."""
    moving_to: str | None = None


class Refusal(Struct, frozen=True, kw_only=True):
    """Why a host may not start the VM; the operator may know better, and take it over."""

    code: str
    text: str


def encode(owner: Owner) -> bytes:
    """Return the record's bytes."""
    return msgspec.json.encode(owner)


def decode(content: bytes) -> Owner | None:
    """Return the record; None for bytes that are none (somebody else's file)."""
    try:
        return msgspec.json.decode(content, type=Owner)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None


def is_of(content: bytes, host_id: str) -> bool:
    """Whether a record's bytes name this host."""
    owner = decode(content)
    return owner is not None and owner.host_id == host_id


def claimed(vm: Vm, host: str, host_id: str, boot_id: str) -> Owner:
    """Return the record of a host that runs the VM."""
    return Owner(vm_id=vm.id, vm=vm.name, host=host, host_id=host_id, boot_id=boot_id, epoch=vm.epoch)


def may_claim(found: Owner | None, vm: Vm, host_id: str, place: str) -> Refusal | None:
    """Say why this host may not start the VM from this disk, None if it may.

    The host that holds it may always start it again: it knows its own processes.
    """
    if found is None:
        return None
    if found.vm_id != vm.id and found.held:
        return belongs(found, place)
    if found.moving_to is not None:
        text = f"{place}: {found.vm} is moving from {found.host} (epoch {found.epoch}) to {found.moving_to}"
        return Refusal(code="vm-moving", text=text)
    if found.held and found.host_id != host_id:
        text = f"{place}: {found.vm} is owned by {found.host} (epoch {found.epoch}), which runs it or may still"
        return Refusal(code="vm-owned-elsewhere", text=text)
    if found.vm_id == vm.id and found.epoch > vm.epoch:
        text = f"{place}: {found.vm} has moved on (epoch {found.epoch}, this host's copy is of epoch {vm.epoch})"
        return Refusal(code="vm-copy-stale", text=text)
    return None


def belongs(found: Owner, place: str) -> Refusal:
    """Say that a disk is another VM's."""
    return Refusal(code="disk-owned", text=f"{place} belongs to the VM {found.vm} of {found.host} ({found.vm_id})")


def may_delete(found: Owner | None, vm: Vm, host_id: str, place: str) -> Refusal | None:
    """Say why this host may not delete the disk, None if it may: it may start the VM, and no other was on it last."""
    if found is not None and found.vm_id != vm.id:
        return belongs(found, place)
    return may_claim(found, vm, host_id, place)


def let_go(found: Owner | None, vm: Vm, host: str, host_id: str, boot_id: str) -> Owner | None:
    """Return the record after the VM was stopped here, in no move; None: it is not this host's to change.

    A record that still says "moving" is of a move that is over, for the VM is this host's: it came here, or stayed.
    """
    if found is None or found.vm_id != vm.id or found.epoch > vm.epoch:
        return None
    if found.host_id != host_id and found.moving_to != host:
        return None
    return msgspec.structs.replace(claimed(vm, host, host_id, boot_id), held=False)


def moving(found: Owner | None, vm: Vm, host: str, host_id: str, boot_id: str, target: str) -> Owner | None:
    """Return the record of a VM that is about to move; None: this host does not hold it."""
    if found is not None and (found.vm_id != vm.id or (found.held and found.host_id != host_id)):
        return None
    return msgspec.structs.replace(claimed(vm, host, host_id, boot_id), moving_to=target)


def expects(found: Owner | None, vm: Vm, source: str, target: str) -> str | None:
    """Target: say what is wrong with the record that it sees, None if it is of this very move."""
    if found is None:
        return "there is no ownership record beside it"
    if found.vm_id != vm.id or found.host != source or found.moving_to != target or found.epoch != vm.epoch - 1:
        where = f", moving to {found.moving_to}" if found.moving_to else ""
        return f"its ownership record says {found.vm} on {found.host}, epoch {found.epoch}{where}"
    return None


def settled(found: Owner | None, vm: Vm, host: str, host_id: str, boot_id: str) -> Owner | None:
    """Return the record of a VM that runs here after a move, also one that was taken back; None: it says so already.

    The handover has decided, so what the record says of a move that is over does not matter; a higher epoch does.
    """
    wanted = claimed(vm, host, host_id, boot_id)
    if found == wanted or (found is not None and (found.vm_id != vm.id or found.epoch > vm.epoch)):
        return None
    return wanted
