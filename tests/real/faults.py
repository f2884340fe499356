"""The faults of the matrix: each strikes while every move is held in its phase, lets the moves go on, waits where what
it breaks has to be noticed by a deadline, and mends what an operator would mend."""

import os
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


def _host_frozen(name: str, other: str) -> Callable[[Stage], None]:
    def strike(stage: Stage) -> None:
        side: Side = getattr(stage, name)
        side.host.freeze()
        stage.go_on()
        _noticed(stage, getattr(stage, other))
        side.host.thaw()

    return strike


def _agent_frozen(name: str) -> Callable[[Stage], None]:
    """For a moment: long enough that every move has gone on to where it waits for this agent, or for nobody."""

    def strike(stage: Stage) -> None:
        pid = stage.agent(getattr(stage, name))
        os.kill(pid, signal.SIGSTOP)
        stage.go_on()
        os.kill(pid, signal.SIGCONT)

    return strike


def _qemus_frozen(name: str) -> Callable[[Stage], None]:
    def strike(stage: Stage) -> None:
        side: Side = getattr(stage, name)
        for player in stage.players:
            stage.signal(side, player, signal.SIGSTOP)
        stage.release()
        _noticed(stage, stage.a)
        for player in stage.players:
            stage.signal(side, player, signal.SIGCONT)
        stage.go_on()

    return strike


def _migration_cut(stage: Stage) -> None:
    stage.b.host.cut("migration")
    stage.go_on()
    _noticed(stage, stage.a)
    stage.b.host.mend("migration")


def _control_cut(stage: Stage) -> None:
    """For so long that the target gives up what it has not whole."""
    stage.b.host.cut("management")
    stage.release(stage.b)
    _noticed(stage, stage.b)
    stage.go_on()
    stage.b.host.mend("management")


def _connections_broken(which: int) -> Callable[[Stage], None]:
    def strike(stage: Stage) -> None:
        for player in stage.players:
            assert stage.break_connections(player, which), f"{player.name} has no such connection"
        stage.go_on()

    return strike


MEMORY, DISK = 0, 1

FAULTS: dict[str, Callable[[Stage], None]] = {
    "source agent killed": _agents_killed("a"),
    "target agent killed": _agents_killed("b"),
    "both agents killed": _agents_killed("a", "b"),
    "source QEMU killed": _qemus_killed("a"),
    "target QEMU killed": _qemus_killed("b"),
    "source host off": _host_off("a", "b"),
    "target host off": _host_off("b", "a"),
    "source agent frozen": _agent_frozen("a"),
    "target agent frozen": _agent_frozen("b"),
    "source QEMU frozen": _qemus_frozen("a"),
    "target QEMU frozen": _qemus_frozen("b"),
    "source host frozen": _host_frozen("a", "b"),
    "target host frozen": _host_frozen("b", "a"),
    "control cable cut": _control_cut,
    "migration cable cut": _migration_cut,
    "memory link broken": _connections_broken(MEMORY),
    "disk link broken": _connections_broken(DISK),
}
