"""The faults of the matrix: each strikes while every move is held in its phase, lets the moves go on, waits where what
it breaks has to be noticed by a deadline, and mends what an operator would mend."""

import signal
from collections.abc import Callable

from tests.real.moving import Side, until
from tests.real.stage import Stage

NOTICED_S = 60.0


def _agents_killed(*names: str) -> Callable[[Stage], None]:
    def strike(stage: Stage) -> None:
        sides = [getattr(stage, name) for name in names]
        for side in sides:
            side.host.agent_kill()
        stage.go_on()
        for side in sides:
            side.host.agent_wait()

    return strike


def _qemus_killed(name: str) -> Callable[[Stage], None]:
    def strike(stage: Stage) -> None:
        for player in stage.players:
            stage.signal(getattr(stage, name), player, signal.SIGKILL)
        stage.go_on()

    return strike


def _noticed(stage: Stage, side: Side) -> None:
    """Wait until one side works on no move any more: it has ended them, or stands still and says so."""
    until(f"{side.name} has noticed", lambda: not stage.undecided(side), NOTICED_S)


def _host_off(name: str, other: str) -> Callable[[Stage], None]:
    def strike(stage: Stage) -> None:
        side: Side = getattr(stage, name)
        stage.witness.look()  # what stands on its consoles is gone when it boots
        side.host.kill()
        stage.witness.look()
        stage.go_on()
        _noticed(stage, getattr(stage, other))
        side.host.boot()

    return strike


FAULTS: dict[str, Callable[[Stage], None]] = {
    "source agent killed": _agents_killed("a"),
    "target agent killed": _agents_killed("b"),
    "both agents killed": _agents_killed("a", "b"),
    "source QEMU killed": _qemus_killed("a"),
    "target QEMU killed": _qemus_killed("b"),
    "source host off": _host_off("a", "b"),
    "target host off": _host_off("b", "a"),
}
