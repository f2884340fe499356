"""What a move did not have to send, for its report."""

from kvmhv.model import DiskSaving, DiskSent, Inventory, Plan, Sha256


def bases(source: Inventory) -> tuple[Sha256, ...]:
    """Return what the target is asked for: the contents of the VM's bases, as far as they are known."""
    known = source.facts_of_vm.bases if source.facts_of_vm else {}
    return tuple(base.sha256 for base in known.values())


def of_memory(before: int | None, told: int | None) -> int | None:
    """Return the newer count of zeros in memory: it only grows, and a QEMU that is gone tells none."""
    return max(before or 0, told) if told is not None else before


def of_disks(plan: Plan | None, sent: tuple[DiskSent, ...]) -> tuple[DiskSaving, ...]:
    """Return the saving of each disk; nothing before the disks are copied.

    What the guest writes while they are copied counts as sent, so a saving is told too small rather than too large.
    """
    copies = {copy.disk: copy for copy in plan.disk_copies} if plan is not None else {}
    found = []
    for one in sent:
        copy = copies.get(one.disk)
        if copy is not None:
            found.append(
                DiskSaving(
                    disk=one.disk,
                    size_bytes=copy.size_bytes,
                    sent_bytes=one.sent_bytes,
                    unallocated_bytes=max(0, copy.size_bytes - copy.used_bytes),
                    base_bytes=copy.base.data_bytes if copy.base else 0,
                    zero_bytes=None if one.sent_bytes is None else max(0, copy.travelling_bytes - one.sent_bytes),
                )
            )
    return tuple(found)
