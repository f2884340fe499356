"""What the live page shows of a host at one moment."""

import msgspec

from kvmhv.model import MoveReport, Struct, VmSummary


class View(Struct, frozen=True, kw_only=True):
    """One host."""

    host: str
    version: str
    enabled: bool
    """It takes part in moves."""
    slots_out: int
    slots_in: int
    vms: tuple[VmSummary, ...]
    moves: tuple[MoveReport, ...]
    """Those that are open, out and in."""
    queued: tuple[MoveReport, ...] = ()
    """Those that wait for a slot, in their order."""
    last: tuple[MoveReport, ...]
    """The newest that ended, the newest first."""


class HostLine(Struct, frozen=True, kw_only=True):
    """A host of the page: this one, or one that it trusts."""

    name: str
    address: str
    own: bool = False
    view: View | None = None
    """None: it does not answer, or was not asked yet."""
    problem: str | None = None


class Page(Struct, frozen=True, kw_only=True):
    """All that the page shows; this host first."""

    hosts: tuple[HostLine, ...]
    by_cookie: bool = False
    """Who looks has signed in, and may sign out."""


def slim(report: MoveReport) -> MoveReport:
    """Return a report without what the page does not show: it is sent when it changes, twice a second at most."""
    return msgspec.structs.replace(
        report, plan=None, request=None, findings=(), effects=(), versions=(), queued_seconds=None
    )
