"""What a host keeps of its moves: entries on disk, entries that a reboot takes away, reports."""

import msgspec

from kvmhv.model import MoveReport


class Journal:
    """Durable and volatile entries, and reports, as drivers/database keeps them."""

    def __init__(self) -> None:
        self.durable: dict[tuple[str, str], bytes] = {}
        self.volatile: dict[tuple[str, str], bytes] = {}
        self.reports: dict[str, bytes] = {}

    def write(self, key: tuple[str, str], state: bytes, *, durable: bool) -> None:
        """Keep the newest state."""
        if durable:
            self.durable[key] = state
            self.volatile.pop(key, None)
        else:
            self.volatile[key] = state

    def age(self) -> None:
        """Put the states into the form in which a version before the announcement kept them."""
        for kept in (self.durable, self.volatile):
            for key, encoded in kept.items():
                state = msgspec.msgpack.decode(encoded)
                state["hold"].pop("announced", None)
                kept[key] = msgspec.msgpack.encode(state)

    def load(self) -> list[tuple[str, bytes]]:
        """Return (role, newest state) of every open move."""
        return [(key[1], self.volatile.get(key, state)) for key, state in self.durable.items()]

    def end(self, key: tuple[str, str], report: MoveReport) -> None:
        """Replace a move's states by its report."""
        self.durable.pop(key, None)
        self.volatile.pop(key, None)
        self.reports[key[0]] = msgspec.json.encode(report)

    def ended(self, move_id: str) -> MoveReport | None:
        """Return the report of a move that has ended."""
        found = self.reports.get(move_id)
        return None if found is None else msgspec.json.decode(found, type=MoveReport)
