"""The faults of the matrix: each strikes while every move is held in its phase, lets the moves go on, waits where what
it breaks has to be noticed by a deadline, and mends what an operator would mend."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tests.real.moving import Side, until
from tests.real.stage import Player, Stage

NOTICED_S = 60.0
DISKS = "/var/lib/kvmhv/disks"
FILLER = f"{DISKS}/full"


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


def _both_hosts_off(stage: Stage) -> None:
    stage.witness.look()
    for side in stage.sides:
        side.host.kill()
    stage.witness.look()
    for side in stage.sides:
        side.host.boot()


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


WRITES_MS = {"source disk full": 500, "target disk full": 500}
"""Guests that take their time have places on their disks that they have not written to yet: those want room."""
MIRROR_FAILS, GUEST_STOPS = "No space left on device", "BLOCK_IO_ERROR"


def _disk_full(name: str, felt: dict[str, tuple[str, str]]) -> Callable[[Stage], None]:
    """Until the moves have ended; then there is room again, and what stands still for it is let go on.

    `felt`: what is heard of a VM by its phase, while its move is held: on which host, and what.
    """

    def strike(stage: Stage) -> None:
        side: Side = getattr(stage, name)
        side.sh(f"cat /dev/zero > {FILLER} || true")
        for player in stage.players:
            where, sign = felt.get(player.phase, (name, ""))
            log = stage.qmp_log(getattr(stage, where), player)
            until(f"{player.name} has felt it", lambda log=log, sign=sign: not sign or sign in log.read_text())
        stage.go_on()
        for one in stage.sides:
            _noticed(stage, one)
        side.sh(f"rm {FILLER}")
        for player in stage.players:
            if stage.state(side, player) != "absent":
                until(f"{player.name} goes on", lambda p=player: _let_go_on(stage, side, p))

    return strike


def _let_go_on(stage: Stage, side: Side, player: Player) -> bool:
    stage.call(side, "POST", f"vms/{player.name}/start")
    return stage.runs(side, player)


@contextmanager
def ground(stage: Stage, fault: str) -> Iterator[None]:
    """Give a host what a fault needs to be there before: disks on a file system of their own, which can be filled."""
    side = {"source disk full": stage.a, "target disk full": stage.b}.get(fault)
    if side is None:
        yield
        return
    side.sh(f"mkdir -p {DISKS} && mount -t tmpfs -o size=160M disks {DISKS}")
    try:
        yield
    finally:
        side.sh(f"! mountpoint -q {DISKS} || umount {DISKS}")  # a host that was booted again has none


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
    "both hosts off": _both_hosts_off,
    "source agent frozen": _agent_frozen("a"),
    "target agent frozen": _agent_frozen("b"),
    "source QEMU frozen": _qemus_frozen("a"),
    "target QEMU frozen": _qemus_frozen("b"),
    "source host frozen": _host_frozen("a", "b"),
    "target host frozen": _host_frozen("b", "a"),
    "control cable cut": _control_cut,
    "migration cable cut": _migration_cut,
    "source disk full": _disk_full("a", dict.fromkeys(("storage", "early passes"), ("a", GUEST_STOPS))),
    "target disk full": _disk_full(
        "b",
        {
            **dict.fromkeys(("storage", "early passes"), ("a", MIRROR_FAILS)),
            **dict.fromkeys(("runs", "cleanup"), ("b", GUEST_STOPS)),
        },
    ),
    "memory link broken": _connections_broken(MEMORY),
    "disk link broken": _connections_broken(DISK),
}
