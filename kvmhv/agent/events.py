"""The host's events: what happened to its moves, who asked for it, kept on disk and told to whoever listens.

Those of a move's end are made from its report, so they say the same as the record. Hyper-V's number stands with an
event where Hyper-V has one for the same thing.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator

import msgspec

from kvmhv.errors import KvmhvError
from kvmhv.model import MIB, Asked, Event, IoStall, Mode, MoveReport, Outcome, Phase, Vm
from kvmhv.ports import Clock, Records

KIND = "events"
KEPT = 2000
LONG_BLACKOUT_MS = 3000.0
"""Hyper-V calls a blackout that its users notice unexpectedly long (20417); from here on TCP users do."""
PAGE_BYTES = 4096
LIMIT_CODES = frozenset({"limit-reached"})

FINISHED, FINISHED_LONG, SUCCEEDED = 20415, 20417, 20418
OVER_LIMIT, FAILED = 21501, 21502
BROWNOUT, BLACKOUT = 22508, 22509

_Batch = tuple[Event, ...]


class Events:
    """Adds, lists and follows. What is added together is on disk together when `add` returns."""

    def __init__(self, records: Records, clock: Clock, host: str, kept: int = KEPT) -> None:
        self._records = records
        self._clock = clock
        self._host = host
        self._kept = kept
        self._events: deque[Event] = deque()
        self._batches: deque[tuple[str, int]] = deque()
        self._fresh = asyncio.Event()
        for key, value in records.all(KIND):
            batch = msgspec.json.decode(value, type=_Batch)
            self._events.extend(batch)
            self._batches.append((key, len(batch)))
        self._number = self._events[-1].number if self._events else 0

    def add(self, *drafts: Event) -> None:
        """Number, keep and tell events; their number, time and host are filled in here. The oldest are forgotten."""
        if not drafts:
            return
        now_s = self._clock.wall_s()
        batch = tuple(
            msgspec.structs.replace(draft, number=self._number + place, at=now_s, host=self._host)
            for place, draft in enumerate(drafts, 1)
        )
        self._number += len(batch)
        key = f"{batch[0].number:012}"
        self._records.put(KIND, key, msgspec.json.encode(batch))
        self._events.extend(batch)
        self._batches.append((key, len(batch)))
        while len(self._events) - self._batches[0][1] >= self._kept:
            oldest, count = self._batches.popleft()
            for _ in range(count):
                self._events.popleft()
            self._records.delete(KIND, oldest)
        fresh, self._fresh = self._fresh, asyncio.Event()
        fresh.set()

    def list(self, after: int = 0, most: int = KEPT) -> tuple[Event, ...]:
        """Return the newest `most` of the kept events whose number is higher than `after`, the newest last."""
        found = [event for event in self._events if event.number > after]
        return tuple(found[-most:] if most else ())

    async def follow(self, after: int | None = None) -> AsyncIterator[Event]:
        """Yield each event beyond `after` (None: from now on), without end. A slow reader misses what is forgotten."""
        reached = self._number if after is None else after
        while True:
            fresh = self._fresh
            for event in self.list(reached):
                reached = event.number
                yield event
            if reached >= self._number or not self._events:
                await fresh.wait()


def io_stalled(vm: Vm, stall: IoStall) -> Event:
    """Return the event of a disk that answers nothing."""
    text = f"{stall.disk} of {vm.name} ({stall.place}) has answered nothing for {stall.seconds:.0f} s: the VM waits"
    return _of_vm("io-stalled", vm.name, text)


def io_goes_on(vm: Vm, stall: IoStall) -> Event:
    """Return the event of a disk that answers again."""
    text = f"{stall.disk} of {vm.name} ({stall.place}) answers again, after {stall.seconds:.0f} s"
    return _of_vm("io-goes-on", vm.name, text)


def location_silent(name: str, vms: tuple[str, ...]) -> Event:
    """Return the event of a location whose server does not answer."""
    waiting = f"; VMs on it wait: {', '.join(vms)}" if vms else ""
    return _of_vm("location-silent", None, f"location {name} does not answer{waiting}")


def location_answers(name: str) -> Event:
    """Return the event of a location that answers again."""
    return _of_vm("location-answers", None, f"location {name} answers again")


def _of_vm(kind: str, vm: str | None, text: str) -> Event:
    return Event(number=0, at=0, host="", kind=kind, text=text, vm=vm)


def _draft(kind: str, report: MoveReport, text: str, hyperv: int | None = None) -> Event:
    return Event(number=0, at=0, host="", kind=kind, text=text, hyperv=hyperv, move=report.id, vm=report.vm)


def move_asked(report: MoveReport, asked: Asked) -> Event:
    """Return the event of a move that was asked for and admitted here."""
    draft = _draft("move-asked", report, f"{asked} asked to move {report.vm} from {report.source} to {report.target}")
    return msgspec.structs.replace(draft, asked=asked)


def move_queued(report: MoveReport, asked: Asked) -> Event:
    """Return the event of a move that waits for a slot."""
    text = f"{asked} asked to move {report.vm} from {report.source} to {report.target} as soon as there is a slot"
    return msgspec.structs.replace(_draft("move-queued", report, text), asked=asked)


def storage_move_asked(report: MoveReport, asked: Asked) -> Event:
    """Return the event of a storage move that was asked for and admitted here."""
    draft = _draft("move-asked", report, f"{asked} asked to move {_disks(report)}")
    return msgspec.structs.replace(draft, asked=asked)


def storage_move_refused(vm: str, location: str, asked: Asked, error: KvmhvError) -> Event:
    """Return the event of a storage move that was not admitted here."""
    return move_refused(f"the disks of {vm}", f"location {location}", asked, error, vm)


def _disks(report: MoveReport) -> str:
    ways = (f"{it.disk} from {it.source_layers[0].location} to {it.target_layers[0].location}" for it in report.disks)
    return f"{report.vm}'s {', '.join(ways)}"


def move_refused(what: str, target: str, asked: Asked, error: KvmhvError, vm: str | None = None) -> Event:
    """Return the event of a move that was not admitted here."""
    return Event(
        number=0,
        at=0,
        host="",
        kind="move-refused",
        text=f"{asked} asked to move {what} to {target}: {error.message} ({error.code})",
        hyperv=OVER_LIMIT if error.code in LIMIT_CODES else None,
        vm=vm or what,
        asked=asked,
    )


def move_refused_in(source: str, vm: str, error: KvmhvError) -> Event:
    """Return the event of an offer that was not let in here."""
    return Event(
        number=0,
        at=0,
        host="",
        kind="move-refused",
        text=f"{source} offered {vm}: {error.message} ({error.code})",
        hyperv=OVER_LIMIT if error.code in LIMIT_CODES else None,
        vm=vm,
    )


def needs_operator(report: MoveReport) -> Event:
    """Return the event of a move that waits for somebody to decide."""
    return _draft("needs-operator", report, report.reason or f"the move of {report.vm} needs the operator")


def move_ended(report: MoveReport) -> tuple[Event, ...]:
    """Return the events of a move's end; the figures are told by its source."""
    if report.mode is Mode.STORAGE:
        return (_storage_move_ended(report),)
    if report.outcome is Outcome.DONE:
        text = f"{report.vm} moved from {report.source} to {report.target}"
        if report.error is not None:  # post-copy
            return (_draft("guest-lost", report, report.error.message),)
        succeeded = _draft("move-done", report, text, SUCCEEDED)
        return (succeeded,) if report.direction == "in" else (*_figures(report), succeeded)
    why = report.reason or str(report.outcome)
    if report.outcome is Outcome.CANCELLED:
        return (_draft("move-cancelled", report, why),)
    code = report.error.code if report.error else ""
    text = f"the move of {report.vm} from {report.source} to {report.target} failed: {why}"
    return (_draft("move-failed", report, text, OVER_LIMIT if code in LIMIT_CODES else FAILED),)


def _storage_move_ended(report: MoveReport) -> Event:
    if report.outcome is Outcome.DONE:
        held = f"; its requests waited {report.writes_held_ms:.0f} ms" if report.writes_held_ms is not None else ""
        return _draft("move-done", report, f"moved {_disks(report)}{held}")
    why = report.reason or str(report.outcome)
    if report.outcome is Outcome.CANCELLED:
        return _draft("move-cancelled", report, why)
    return _draft("move-failed", report, f"the move of {_disks(report)} failed: {why}")


def _figures(report: MoveReport) -> tuple[Event, ...]:
    found = []
    brownout_s = sum(phase.seconds for phase in report.phases if phase.phase is Phase.MEMORY)
    passes = f"{len(report.passes)} pass{'' if len(report.passes) == 1 else 'es'}"
    found.append(_draft("brownout", report, f"the brownout lasted {brownout_s:.2f} s, {passes}", BROWNOUT))
    if report.blackout_ms is None:
        return tuple(found)
    blackout_s = report.blackout_ms / 1000
    pages = report.switchover.remaining_bytes // PAGE_BYTES if report.switchover else 0
    found.append(_draft("blackout", report, f"the blackout lasted {blackout_s:.3f} s, {pages} dirty pages", BLACKOUT))
    long = report.blackout_ms > LONG_BLACKOUT_MS
    text = f"the move finished with {'an unexpectedly long' if long else 'a'} blackout of {blackout_s:.3f} s"
    found.append(_draft("blackout-long" if long else "finished", report, text, FINISHED_LONG if long else FINISHED))
    if report.pages is not None:
        size, took_s = report.pages.sent_bytes / MIB, report.pages.seconds
        text = (
            f"{report.vm} ran on {report.target} for {took_s:.2f} s before its last page was there: {size:.0f} MiB came"
        )
        found.append(_draft("pages", report, text))
    return tuple(found)


def network_gap(report: MoveReport) -> Event:
    """Return the event of the first frame, which comes when the move may have ended."""
    assert report.network_gap_ms is not None
    text = f"the network gap of {report.vm} was {report.network_gap_ms / 1000:.3f} s"
    return _draft("network-gap", report, text)


def answer_gap(report: MoveReport) -> Event:
    """Return the event of the first answer to the VM's probe, which comes when the move may have ended."""
    assert report.answer_gap_ms is not None
    text = f"{report.vm} answered its probe again after {report.answer_gap_ms / 1000:.3f} s"
    return _draft("answer-gap", report, text)
