"""What a move did not have to send, for its report."""

from kvmhv.model import DiskSaving, DiskSent, Plan


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
                    zero_bytes=None if one.sent_bytes is None else max(0, copy.used_bytes - one.sent_bytes),
                )
            )
    return tuple(found)
