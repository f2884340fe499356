"""Post-copy as the simulated QEMUs do it: the state first, then the pages, and what becomes of them when links break.

As measured on the real one: from `postcopy-active` on the source cannot let its guest go on and cannot be cancelled; a
connection that breaks, and the other QEMU's end, leave `postcopy-paused`; a cut link raises no event.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.sim.machine import Machine, Qemu

ACTIVE, PAUSED = "postcopy-active", "postcopy-paused"
MISSING = (ACTIVE, PAUSED)
TAKES_MS = (20.0, 4_000.0)
"""How long the pages are on their way."""


def hand_on(machine: "Machine", qemu: "Qemu") -> None:
    """The source's QEMU gives the state away."""
    qemu.migration = ACTIVE
    machine.unlock()
    qemu.say("FOLLOW")
    machine.kernel.after(machine.kernel.some_ms(5, 60), lambda: _load(machine, qemu))


def _load(machine: "Machine", qemu: "Qemu") -> None:
    there = machine.other.qemu
    if not qemu.alive or qemu.migration != ACTIVE:
        return
    if there is None or there.migration == "failed" or there.status != "inmigrate":
        halt(qemu)
    elif not machine.network_up():
        machine.kernel.after(500, lambda: _load(machine, qemu))
    else:
        if qemu.mirrors:
            raise AssertionError("the state was handed on while a mirror wrote")
        there.status, there.migration, there.fresh = "paused", ACTIVE, True
        there.say("FOLLOW")
        _send(machine, qemu)


def _send(machine: "Machine", qemu: "Qemu") -> None:
    machine.kernel.after(machine.kernel.some_ms(*TAKES_MS), lambda: _arrive(machine, qemu))


def _arrive(machine: "Machine", qemu: "Qemu") -> None:
    there = machine.other.qemu
    if not qemu.alive or qemu.migration != ACTIVE:
        return
    if there is None or there.migration == PAUSED:
        halt(qemu)
    elif not machine.network_up():
        if machine.kernel.rng.random() < 0.1:  # somebody on the way says that it is broken
            halt(qemu)
        else:
            machine.kernel.after(1000, lambda: _arrive(machine, qemu))
    elif there.migration == ACTIVE:
        there.migration = "completed"
        there.say("COMPLETED")
        machine.kernel.after(machine.kernel.some_ms(0.1, 5), lambda: _acknowledge(qemu))


def _acknowledge(qemu: "Qemu") -> None:
    if qemu.alive and qemu.migration == ACTIVE:
        qemu.migration = "completed"
        qemu.say("COMPLETED")


def halt(qemu: "Qemu") -> None:
    """The connection of the pages is broken, as this side sees it."""
    if qemu.alive and qemu.migration == ACTIVE:
        qemu.migration = PAUSED
        qemu.say("HALTED")


def wait_anew(qemu: "Qemu") -> bool:
    """The target's QEMU waits on a new address; False if it lacks nothing."""
    halt(qemu)
    qemu.awaits = qemu.migration == PAUSED
    return qemu.awaits


def resume(machine: "Machine", qemu: "Qemu") -> bool:
    """The source's QEMU takes up sending; False if the target does not wait for it."""
    halt(qemu)
    there = machine.other.qemu
    if qemu.migration != PAUSED or there is None or not there.awaits or not machine.network_up():
        return False
    there.awaits = False
    qemu.migration = there.migration = ACTIVE
    qemu.say("FOLLOW")
    _send(machine, qemu)
    return True
