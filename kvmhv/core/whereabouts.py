"""Where a VM is that another program moved: what both sides say, and the one conclusion that it leaves, or none.

The program's own word at the end of its move is no proof: its source starts the guest again when the target's last
answer is lost, though the guest may run there by then. What each side says of the VM afterwards is evidence.
"""

import enum

from kvmhv.model import Stay, Whereabouts


class Verdict(enum.StrEnum):
    """What follows."""

    MOVED = "moved"
    """It runs at the target, and nothing of it is here."""
    STAYS = "stays"
    """It runs here, and nothing of it is at the target."""
    RESUME = "resume"
    """It stands still here, and the target proves that it never ran there."""
    END_ARRIVAL = "end-arrival"
    """Nothing moves it here any more, and what waits for it at the target never ran: the program forgot to end it."""
    END_COPY = "end-copy"
    """It runs at the target; what stands still here was succeeded."""
    GONE = "gone"
    """It has ended: on its own, or with its QEMU."""
    TWICE = "twice"
    """It runs on both."""
    STANDS = "stands"
    """It stands still, and nobody can prove where it is the newest."""
    WAIT = "wait"
    """A side is silent, or still at it."""


NOT_THERE = (Stay.ABSENT, Stay.OFF)


def conclude(here: Whereabouts | None, there: Whereabouts | None) -> Verdict:
    """Return the verdict; `None`: that side was not heard."""
    if here is None or there is None or here.busy or Stay.SILENT in (here.stay, there.stay):
        return Verdict.WAIT
    if there.stay is Stay.ARRIVING:
        return Verdict.END_ARRIVAL
    if there.busy or here.stay is Stay.ARRIVING:
        return Verdict.WAIT
    if there.stay is Stay.RUNNING:
        return _runs_there(here)
    if here.stay is Stay.RUNNING:
        return Verdict.STAYS if there.stay in NOT_THERE else Verdict.STANDS
    if here.stay is Stay.PAUSED:
        return Verdict.RESUME if there.stay in NOT_THERE and there.ran is False else Verdict.STANDS
    return Verdict.GONE if there.stay in NOT_THERE else Verdict.STANDS


def _runs_there(here: Whereabouts) -> Verdict:
    if here.stay is Stay.RUNNING:
        return Verdict.TWICE
    return Verdict.END_COPY if here.stay is Stay.PAUSED else Verdict.MOVED
