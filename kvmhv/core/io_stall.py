"""When a disk of a VM stands still. QEMU raises no event while storage is away: the guest's requests just wait.

A look at a disk says how many requests it has answered and whether one waits. If one waits at two looks in a row and
none was answered between them, it is the same one: it has waited since the first of them at least.
"""

from kvmhv.model import DiskIo, Struct


class Waiting(Struct, frozen=True, kw_only=True):
    """What is kept of the looks at a disk."""

    answered: int
    since_ms: float | None = None
    """Since when nothing was answered while a request waits."""

    def stalled_ms(self, now_ms: float) -> float:
        """For how long the oldest request has waited, at least."""
        return 0.0 if self.since_ms is None else now_ms - self.since_ms


def step(before: Waiting | None, look: DiskIo, now_ms: float) -> Waiting:
    """Add a look to what is known."""
    if not look.waits:
        return Waiting(answered=look.answered)
    if before is None or before.since_ms is None or before.answered != look.answered:
        return Waiting(answered=look.answered, since_ms=now_ms)
    return before
