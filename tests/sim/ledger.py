"""What a run is asked for, and what it came to."""

from dataclasses import dataclass, field


@dataclass
class Single:
    """One fault, at the n-th boundary of the run."""

    boundary: int
    kind: str
    host: str


@dataclass
class Ledger:
    """What a run came to."""

    moves: int = 0
    outcomes: dict[str, int] = field(default_factory=dict)
    boundaries: int = 0
    faults: int = 0
    stood_still: int = 0
    kinds: dict[str, int] = field(default_factory=dict)
    """Faults by kind."""

    def add(self, one: "Ledger") -> None:
        """Sum up; a run counts as one move at least."""
        self.moves += max(1, one.moves)
        self.faults += one.faults
        self.boundaries += one.boundaries
        self.stood_still += one.stood_still
        for mine, others in ((self.outcomes, one.outcomes), (self.kinds, one.kinds)):
            for name, count in others.items():
                mine[name] = mine.get(name, 0) + count

    def fault(self, kind: str) -> None:
        """Count one."""
        self.faults += 1
        self.kinds[kind] = self.kinds.get(kind, 0) + 1
