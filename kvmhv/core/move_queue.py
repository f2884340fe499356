"""Moves that wait for a slot instead of being refused: whose turn it is.

They go in the order in which they came, but none stands in the way of one that needs other slots: a move to a host
that is full holds up no move to another host. A move that waits holds no slot itself.
"""

from collections.abc import Sequence

import msgspec

from kvmhv.core import admission
from kvmhv.core.admission import Load
from kvmhv.model import HostSettings, Refusal, Struct

ASK_AGAIN_MS = 3000.0
"""A target that said no is asked again so much later."""
STORAGE_COPIES = "migration.storage_copies"
REASONS = ("moves_out", "storage_copies", "target_moves_in", "target_storage_copies", "other")
"""What a move can wait for, as the metrics call it."""


class Queued(Struct, frozen=True, kw_only=True):
    """One move that waits."""

    move_id: str
    target: str
    with_storage: bool
    trying: bool = False
    """It is being begun at this moment."""
    refusal: Refusal | None = None
    """Why it has not begun yet, as far as that is known."""
    ask_at_ms: float = 0.0
    """It was turned away when it was tried: not before is it tried again."""


def look(settings: HostSettings, host: str, load: Load, queue: Sequence[Queued], now_ms: float) -> tuple[Queued, ...]:
    """Return the queue with `trying` set where a move's turn has come, and with what each of the others waits for.

    `load` has the slots of open moves and of those that are being begun.
    """
    seen: list[Queued] = []
    for one in queue:
        now = one if one.trying else _looked_at(settings, host, load, one, seen, now_ms)
        if now.trying and not one.trying:
            load = msgspec.structs.replace(
                load, moves_out=load.moves_out + 1, storage_copies=load.storage_copies + one.with_storage
            )
        seen.append(now)
    return tuple(seen)


def refused(one: Queued, refusal: Refusal, now_ms: float) -> Queued:
    """Return a move that was tried and turned away."""
    return msgspec.structs.replace(one, trying=False, refusal=refusal, ask_at_ms=now_ms + ASK_AGAIN_MS)


def reason(one: Queued, host: str) -> str:
    """Return what it waits for, one of REASONS."""
    if one.refusal is None or one.refusal.setting is None:
        return "other"
    name = one.refusal.setting.removeprefix("migration.")
    found = name if one.refusal.host == host else f"target_{name}"
    return found if found in REASONS else "other"


def _looked_at(
    settings: HostSettings, host: str, load: Load, one: Queued, earlier: Sequence[Queued], now_ms: float
) -> Queued:
    refusal = admission.admit_out(settings, host, load, with_storage=one.with_storage)
    if refusal is not None:
        return msgspec.structs.replace(one, refusal=refusal)
    before = next((other for other in earlier if _is_before(other, one)), None)
    if before is not None:
        return msgspec.structs.replace(one, refusal=before.refusal or one.refusal)
    return msgspec.structs.replace(one, trying=now_ms >= one.ask_at_ms)


def _is_before(other: Queued, one: Queued) -> bool:
    """Whether another one waits for the same slot of the same target, or may be given it at this moment."""
    if other.target != one.target:
        return False
    if other.trying:
        return True
    at_target = other.refusal is not None and other.refusal.host == other.target
    for_storage = other.refusal is not None and other.refusal.setting == STORAGE_COPIES
    return at_target and (one.with_storage or not for_storage)
