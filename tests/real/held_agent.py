"""The agent with places at which a test can hold one of its moves; runs on a lab's host in the place of `kvmhv agent`.

A place is named `<role>.<point>.<vm>`. Points: `before-X` and `after-X` an effect X (`before-Send-Grant` for messages),
and `fact-Y`, when fact Y is about to be handled. A file of that name in HOLD/at asks for a hold: once the move is there
the file is in HOLD/held, and the move goes on when it is removed. Everything else goes on meanwhile: QEMU, connections,
the agent's other moves; only the held move's own timers wait with it, so that where a test holds it is where it stands.
"""

import asyncio
import sys
from pathlib import Path

from kvmhv.agent import main, open_moves, runner
from kvmhv.core import facts
from kvmhv.core.effects import Effect, Send, SetTimer

HOLD = Path("/run/hold")
LOOK_S = 0.005


class HeldFacts(asyncio.Queue[facts.Fact]):
    """A move's facts, of which the next can be held up."""

    def __init__(self, owner: "HeldRunner", limit: int) -> None:
        super().__init__(limit)
        self._owner = owner

    async def get(self) -> facts.Fact:
        """Return the next fact, when no test holds it."""
        fact = await super().get()
        what = fact.message if isinstance(fact, facts.Received) else fact
        await self._owner.hold(f"fact-{type(what).__name__}")
        return fact


class HeldRunner(runner.Runner):
    """A runner that stops where it is told to."""

    _held = False

    def __init__(self, machine: runner.Machine, *others: object) -> None:
        super().__init__(machine, *others)  # type: ignore[arg-type]
        self._facts = HeldFacts(self, self._facts.maxsize)
        self._lengths_s: dict[str, float] = {}

    async def hold(self, point: str) -> None:
        """Wait as long as a test wants this move to wait here."""
        name = f"{self.machine.role}.{point}.{self.state.vm.name}"
        held = HOLD / "held" / name
        try:
            (HOLD / "at" / name).rename(held)
        except FileNotFoundError:
            return
        self._held = True
        while held.exists():  # noqa: ASYNC110 (a test removes it, from outside)
            await asyncio.sleep(LOOK_S)
        self._held = False

    async def _perform(self, effect: Effect) -> None:
        name = type(effect).__name__
        if isinstance(effect, Send):
            name = f"Send-{type(effect.message).__name__}"
        if isinstance(effect, SetTimer):
            self._lengths_s[effect.name] = effect.after_s
        await self.hold(f"before-{name}")
        await super()._perform(effect)
        await self.hold(f"after-{name}")

    def _fire(self, name: str) -> None:
        if not self._held:
            super()._fire(name)
            return
        self._timers[name] = asyncio.get_running_loop().call_later(self._lengths_s[name], self._fire, name)


if __name__ == "__main__":
    for place in ("at", "held"):
        (HOLD / place).mkdir(parents=True, exist_ok=True)
    open_moves.Runner = HeldRunner  # type: ignore[misc]
    sys.exit(main.run(Path(sys.argv[1])))
