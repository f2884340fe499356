"""How long each phase of a move took."""

from typing import Protocol

from kvmhv.model import Phase, PhaseTime, Struct


class PhaseMark(Struct, frozen=True, kw_only=True):
    """When a phase began."""

    phase: Phase
    at_ms: float


class Marked(Protocol):
    """What has phases."""

    @property
    def marks(self) -> tuple[PhaseMark, ...]:
        """When each phase began."""
        ...

    @property
    def ended_ms(self) -> float | None:
        """When the last one ended."""
        ...


def phase_times(state: Marked, now_ms: float) -> tuple[PhaseTime, ...]:
    """Return how long each phase took, the running one up to now."""
    if not state.marks:
        return ()
    ends = [mark.at_ms for mark in state.marks[1:]] + [state.ended_ms if state.ended_ms is not None else now_ms]
    return tuple(
        PhaseTime(phase=mark.phase, seconds=max(0.0, end - mark.at_ms) / 1000)
        for mark, end in zip(state.marks, ends, strict=True)
    )
