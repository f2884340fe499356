"""What the machines of the core rely on in two QEMUs that migrate: asked of the real ones and of the simulated ones.

Each scenario is run by tests/real/test_qemu_contract.py with real QEMU and by tests/sim/test_sim_contract.py with that
of the simulation. What is true of the one must be true of the other: else the simulation proves nothing.
"""

from collections.abc import Awaitable, Callable
from typing import Protocol

PASS, STOP, PRE_SWITCHOVER, COMPLETED, FAILED, GONE = "PASS", "STOP", "PRE-SWITCHOVER", "COMPLETED", "FAILED", "GONE"
FOLLOW, HALTED = "FOLLOW", "HALTED"
"""Post-copy: pages follow the guest; their connection broke."""
SOURCE, TARGET = "source", "target"


class Both(Protocol):
    """Two QEMUs: the source's guest runs, the target's waits for it."""

    async def mirror(self) -> bool:
        """Mirror the source's disk to the target's; True when it is in sync, False when the copy failed."""
        ...

    async def fill_target_disk(self) -> None:
        """Nothing can be written to the target's disk from now on."""
        ...

    async def migrate(self) -> None:
        """Begin passes that do not converge, and wait for the second one."""
        ...

    async def converge(self) -> None:
        """Let the passes converge, so that QEMU stops the guest by itself."""
        ...

    async def stop(self, *, post_copy: bool = False) -> None:
        """Pull the lever; `post_copy`: so that pages follow the guest."""
        ...

    async def break_pages(self) -> None:
        """The connection of the pages ends at the source."""
        ...

    async def reconnect(self) -> bool:
        """Connect the pages anew; False if that is refused."""
        ...

    async def end_lost(self) -> bool:
        """End a target whose pages will not come; True if it has all."""
        ...

    async def finish_mirrors(self) -> bool:
        """End the mirrors in sync; False if one is broken."""
        ...

    async def go_on(self) -> bool:
        """Let the switchover go on; False if it is refused."""
        ...

    async def undo(self) -> str:
        """Cancel memory and mirrors, by force if QMP hangs; returns the migration's last status."""
        ...

    async def cont(self, side: str) -> bool:
        """Let the guest run; False if QEMU refuses."""
        ...

    async def kill(self, side: str) -> None:
        """End the process at once."""
        ...

    async def cut(self) -> None:
        """Nothing that is sent arrives any more, and nobody says so."""
        ...

    async def mend(self) -> None:
        """What is sent arrives again."""
        ...

    async def runs(self, side: str) -> bool:
        """Whether the guest runs there."""
        ...

    async def migration(self, side: str) -> str:
        """Status of the migration there."""
        ...

    async def heard(self, side: str, event: str) -> None:
        """Wait for an event."""
        ...

    async def silence(self) -> None:
        """Wait for as long as an event would take that comes by itself."""
        ...

    def events(self, side: str) -> list[str]:
        """What this side's QEMU has said so far."""
        ...


Scenario = Callable[[Both], Awaitable[None]]
SCENARIOS: dict[str, Scenario] = {}


def scenario(run: Scenario) -> Scenario:
    """Register a scenario under its name."""
    SCENARIOS[run.__name__] = run  # type: ignore[attr-defined]
    return run


async def _stopped_by_the_lever(both: Both) -> None:
    await both.migrate()
    await both.stop()
    assert not await both.runs(SOURCE)
    await both.heard(SOURCE, PRE_SWITCHOVER)
    assert await both.migration(SOURCE) == "pre-switchover"


@scenario
async def the_straight_way(both: Both) -> None:
    """The target has all, needs nothing more of the source, and waits for ever until it is told to run."""
    assert await both.mirror()
    await _stopped_by_the_lever(both)
    said = both.events(SOURCE)
    assert said.index(STOP) < said.index(PRE_SWITCHOVER), "what is held was stopped before QEMU did it"
    assert await both.finish_mirrors()
    assert COMPLETED not in both.events(TARGET)
    assert await both.go_on()
    await both.heard(SOURCE, COMPLETED)
    await both.heard(TARGET, COMPLETED)
    await both.silence()
    assert not await both.runs(SOURCE)
    assert not await both.runs(TARGET)
    assert await both.migration(TARGET) == "completed"
    assert await both.undo() == "completed", "too late to cancel, and it says so"
    await both.kill(SOURCE)
    await both.heard(SOURCE, GONE)
    assert await both.cont(TARGET)
    assert await both.cont(TARGET)
    assert await both.runs(TARGET)


@scenario
async def cancelled_in_the_passes(both: Both) -> None:
    """The guest does not notice, and the target's copy is spoiled."""
    assert await both.mirror()
    await both.migrate()
    assert await both.undo() == "cancelled"
    assert await both.runs(SOURCE)
    await both.heard(SOURCE, FAILED)
    await both.heard(TARGET, FAILED)
    assert await both.migration(TARGET) == "failed"
    assert not await both.runs(TARGET)


@scenario
async def cancelled_after_the_lever(both: Both) -> None:
    """Whom the lever has stopped only a cont lets go on."""
    await _stopped_by_the_lever(both)
    assert await both.undo() == "cancelled"
    await both.silence()
    assert not await both.runs(SOURCE)
    await both.cont(SOURCE)
    assert await both.runs(SOURCE)
    await both.heard(TARGET, FAILED)


@scenario
async def cancelled_after_qemu_stopped_the_guest(both: Both) -> None:
    """Whom QEMU has stopped it lets go on by itself, even if it was told to stop meanwhile."""
    await both.migrate()
    await both.converge()
    await both.heard(SOURCE, PRE_SWITCHOVER)
    assert not await both.runs(SOURCE)
    await both.stop()
    assert await both.undo() == "cancelled"
    await both.silence()
    assert await both.runs(SOURCE)


@scenario
async def rolled_back_after_the_end(both: Both) -> None:
    """All is sent, the target has not run and is gone: the source's copy is whole."""
    await _stopped_by_the_lever(both)
    assert await both.go_on()
    await both.heard(SOURCE, COMPLETED)
    await both.kill(TARGET)
    await both.heard(TARGET, GONE)
    await both.cont(SOURCE)
    assert await both.runs(SOURCE)


@scenario
async def the_target_dies_in_the_passes(both: Both) -> None:
    """The source notices, and its guest runs on; the mirrors are not in sync any more."""
    assert await both.mirror()
    await both.migrate()
    await both.kill(TARGET)
    await both.heard(SOURCE, FAILED)
    assert await both.runs(SOURCE)
    assert not await both.finish_mirrors()
    await both.undo()
    assert await both.runs(SOURCE)


@scenario
async def the_target_dies_after_the_lever(both: Both) -> None:
    """Nobody is told until the switchover goes on; then it fails, and the guest waits for a cont."""
    await _stopped_by_the_lever(both)
    await both.kill(TARGET)
    await both.silence()
    assert FAILED not in both.events(SOURCE)
    await both.go_on()
    await both.heard(SOURCE, FAILED)
    assert COMPLETED not in both.events(SOURCE)
    assert not await both.runs(SOURCE)
    await both.cont(SOURCE)
    assert await both.runs(SOURCE)


@scenario
async def the_source_dies_before_the_end(both: Both) -> None:
    """The target's QEMU stays, has failed, and does not run."""
    await _stopped_by_the_lever(both)
    await both.kill(SOURCE)
    await both.heard(TARGET, FAILED)
    assert await both.migration(TARGET) == "failed"
    assert not await both.runs(TARGET)


@scenario
async def the_link_is_cut_in_the_passes(both: Both) -> None:
    """Nobody is told; the guest runs; to cancel works."""
    await both.migrate()
    await both.cut()
    await both.silence()
    assert FAILED not in both.events(SOURCE)
    assert await both.undo() in ("failed", "cancelled")
    assert await both.runs(SOURCE)
    await both.mend()
    await both.heard(TARGET, FAILED)


@scenario
async def the_link_is_cut_in_the_switchover(both: Both) -> None:
    """Nobody is told, and QMP may hang: a yank ends it. The guest waits for a cont, the target does not run."""
    await _stopped_by_the_lever(both)
    await both.cut()
    await both.go_on()
    await both.silence()
    assert not {FAILED, COMPLETED} & set(both.events(SOURCE))
    assert await both.undo() in ("failed", "cancelled")
    assert not await both.runs(SOURCE)
    await both.cont(SOURCE)
    assert await both.runs(SOURCE)
    await both.mend()
    await both.silence()
    assert not await both.runs(TARGET)


@scenario
async def the_target_has_no_room(both: Both) -> None:
    """The copy fails and says so; the guest runs on."""
    await both.fill_target_disk()
    assert not await both.mirror()
    assert await both.runs(SOURCE)
    assert await both.undo() in ("", "none")
    assert await both.runs(SOURCE)


POST_COPY = "pages_"
"""How the names begin of scenarios in which pages may follow the guest."""


async def _handed_on(both: Both) -> None:
    assert await both.mirror()
    await both.migrate()
    await both.stop(post_copy=True)
    await both.heard(SOURCE, PRE_SWITCHOVER)
    assert not await both.runs(SOURCE)
    assert await both.finish_mirrors()
    assert FOLLOW not in both.events(TARGET)
    assert await both.go_on()
    for side in (SOURCE, TARGET):
        await both.heard(side, FOLLOW)


@scenario
async def pages_follow_the_guest(both: Both) -> None:
    """The guest runs at the target before all is there, and not before it is told to; both say when all is there."""
    await _handed_on(both)
    assert not await both.runs(TARGET)
    assert not await both.cont(SOURCE)
    assert await both.cont(TARGET)
    assert await both.runs(TARGET)
    for side in (TARGET, SOURCE):
        await both.heard(side, COMPLETED)
    assert not await both.runs(SOURCE)
    await both.kill(SOURCE)
    await both.silence()
    assert await both.runs(TARGET)


@scenario
async def pages_all_come_without_a_run(both: Both) -> None:
    """They do not wait for the guest to run, and then the source could go on again."""
    await _handed_on(both)
    for side in (TARGET, SOURCE):
        await both.heard(side, COMPLETED)
    await both.kill(TARGET)
    assert await both.cont(SOURCE)
    assert await both.runs(SOURCE)


@scenario
async def pages_are_lost_with_the_target(both: Both) -> None:
    """The source cannot let its guest go on, nor can it be cancelled: undoing it ends it."""
    await _handed_on(both)
    await both.kill(TARGET)
    await both.heard(SOURCE, HALTED)
    assert not await both.cont(SOURCE)
    assert not await both.runs(SOURCE)
    assert await both.undo() == "gone"
    await both.heard(SOURCE, GONE)


@scenario
async def pages_are_lost_with_the_source(both: Both) -> None:
    """The target hears it and has not all: it is ended."""
    await _handed_on(both)
    assert await both.cont(TARGET)
    await both.kill(SOURCE)
    await both.heard(TARGET, HALTED)
    assert not await both.end_lost()
    await both.heard(TARGET, GONE)


@scenario
async def pages_go_on_over_a_new_connection(both: Both) -> None:
    """As often as it breaks; none of it lets the source run."""
    await _handed_on(both)
    assert await both.cont(TARGET)
    for _ in range(2):
        await both.break_pages()
        await both.heard(SOURCE, HALTED)
        assert not await both.cont(SOURCE)
        assert await both.reconnect()
    for side in (TARGET, SOURCE):
        await both.heard(side, COMPLETED)
    assert await both.runs(TARGET)
    assert not await both.reconnect()
    assert await both.end_lost()
    assert await both.runs(TARGET)
