"""A simulated QEMU and a simulated host: what the drivers would act on, and the truth that no agent can see.

The memory migration goes as measured on the real one: a pass sends what was dirtied during the one before; a stopped
guest's rest leads to pre-switchover; QEMU may win the race and stop the guest by itself, and then resumes it by itself
when the migration fails; a cut link raises no event and leaves QMP hanging in the device state.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from tests.sim import pages
from tests.sim.kernel import Kernel

MIB = 1024**2
ACTIVE = ("active", "pre-switchover", "device")
CONVERGES_BYTES = 64 * 1024
LEASE_MS = 90_000.0
"""A file server forgets the lock of a client that is gone after at most so long."""


class Broken(AssertionError):
    """A promise to the VM's users was broken."""


@dataclass
class Truth:
    """What the guest's users know: which writes were acknowledged; who ran it last."""

    acknowledged: int = 0
    owner: str = ""
    stopped_by_fault: bool = False
    stands_since_ms: float | None = None
    """Since when its guest has been stopped for a switchover."""
    excused: bool = False
    """Since then an agent has died, or the operator was told."""


@dataclass
class Image:
    """The VM's disk files: the newest acknowledged write in them, and what a power failure leaves.

    On shared storage both hosts see the same, and one QEMU at a time has its lock.
    """

    writes: int
    flushed: int
    shared: bool = False
    lock: str = ""
    """The host whose QEMU has it; a host that lost its power keeps it until the server forgets it."""


@dataclass
class Qemu:
    """One process of the VM."""

    host: "Machine"
    status: str
    migration: str = ""
    fresh: bool = True
    ran: bool = False
    mirrors: bool = False
    mirrors_ready: bool = False
    exported: bool = False
    hangs: bool = False
    follow: bool = False
    """Post-copy: its pages are to go over after the switchover."""
    awaits: bool = False
    """Post-copy: it waits on a new address for the pages that it lacks."""
    pass_number: int = 0
    sent_bytes: int = 0
    remaining_bytes: int = 0
    dirty_bytes_per_s: float = 0.0
    events: Callable[[str, dict[str, int]], None] | None = None
    alive: bool = True

    def say(self, name: str, **data: int) -> None:
        """Raise an event; nobody listens while no agent lives."""
        if self.alive:
            self.host.event(self, name, data)


@dataclass
class Machine:
    """A host: its disk, its processes, and the ledger of what is on it."""

    name: str
    kernel: Kernel
    truth: Truth
    other: "Machine" = field(init=False)
    network_up: Callable[[], bool] = field(init=False)
    event: Callable[[Qemu, str, dict[str, int]], None] = field(init=False)
    up: bool = True
    boot: int = 0
    booted_ms: float = 0.0
    qemu: Qemu | None = None
    image: Image | None = None
    blackout_s: float = math.inf
    """How long a guest may stand still that nobody tells of."""
    defined: int | None = None
    """Epoch of the VM's record here."""
    taps: bool = False
    kernel_files: bool = False
    half_undone: bool = False
    """Its storage does not let go of what was made for the VM's arrival."""
    wall_offset_s: float = 0.0
    disk_broken: bool = False
    """Its disk is full, or gives errors: nothing can be written to it."""

    @property
    def wall_s(self) -> float:
        """The host's wall clock, which jumps."""
        return 1e9 + self.wall_offset_s + self.kernel.now_ms / 1000

    @property
    def clock_ms(self) -> float:
        """The host's monotonic clock: another zero on each host and after each boot."""
        return self.kernel.now_ms - self.booted_ms + 1e6 * (1 + len(self.name) + self.boot)

    # --- the guest

    def run(self) -> None:
        """Let the guest run; every promise is checked at this instant."""
        qemu, other = self.qemu, self.other.qemu
        assert qemu is not None
        if qemu.status == "running":
            return
        if other is not None and other.status == "running":
            raise Broken("two running copies")
        if not qemu.fresh:
            raise Broken(f"a stale copy runs on {self.name}")
        if self.image is None or self.image.writes != self.truth.acknowledged:
            raise Broken(f"acknowledged writes are missing on {self.name}: {self.image} of {self.truth.acknowledged}")
        if self.truth.stands_since_ms is not None and not self.truth.excused:
            stood_s = (self.kernel.now_ms - self.truth.stands_since_ms) / 1000
            if stood_s > self.blackout_s:
                raise Broken(f"the guest stood still for {stood_s:.1f} s, {self.blackout_s:.1f} s are promised")
        self.truth.stands_since_ms = None
        self.image.lock = self.name
        qemu.status, qemu.ran = "running", True
        if other is not None:
            other.fresh = False
        self.truth.owner = self.name
        self.kernel.tell(self.name, "the guest runs")
        self.write()

    def write(self) -> None:
        """The running guest writes, and its users are told that it is on the disk."""
        qemu, there = self.qemu, self.other
        if qemu is None or qemu.status != "running" or self.image is None:
            return
        self.truth.acknowledged += 1
        self.image.writes = self.image.flushed = self.truth.acknowledged
        if qemu.mirrors_ready and there.disk_broken:  # the guest is told of nothing, the mirror's job has failed
            qemu.mirrors = qemu.mirrors_ready = False
        elif qemu.mirrors_ready and there.qemu is not None and there.qemu.exported and there.image is not None:
            there.image.writes = self.truth.acknowledged

    def stop(self, *, post_copy: bool = False) -> None:
        """The lever."""
        qemu = self.qemu
        if qemu is not None:
            qemu.follow = post_copy and qemu.migration == "active"
        if qemu is not None and qemu.status == "running":
            self.write()
            qemu.status = "paused"
            self._stands(qemu)
            self.kernel.tell(self.name, "the guest is stopped")

    def _stands(self, qemu: Qemu) -> None:
        self.truth.stands_since_ms, self.truth.excused = self.kernel.now_ms, False
        qemu.say("STOP")

    def can_lock(self) -> bool:
        """Whether no other host has the image's lock."""
        return self.image is None or self.image.lock in ("", self.name)

    def unlock(self) -> None:
        """Let go of the image's lock, if this host's QEMU has it."""
        if self.image is not None and self.image.lock == self.name:
            self.image.lock = ""

    # --- the migration

    def begin_mirrors(self, progress: Callable[[str, int], None]) -> None:
        """Copy the disks; `progress` hears `some`, `ready`, `failed`."""
        qemu = self.qemu
        assert qemu is not None
        qemu.mirrors = True

        def copy(left: int) -> None:
            there = self.other.qemu
            if not qemu.alive or not qemu.mirrors:
                return
            lost = there is None or not there.exported or self.other.image is None or self.image is None
            if lost or self.other.disk_broken:
                qemu.mirrors = qemu.mirrors_ready = False
                progress("failed", 0)
            elif not self.network_up():
                self.kernel.after(1000, lambda: copy(left))
            elif left:
                progress("some", 10 - left)
                self.kernel.after(self.kernel.some_ms(50, 400), lambda: copy(left - 1))
            else:
                assert self.image is not None
                assert self.other.image is not None
                self.write()
                qemu.mirrors_ready = True
                self.other.image.writes = self.image.writes
                progress("ready", 10)

        copy(self.kernel.rng.randint(1, 3))

    def finish_mirrors(self) -> bool:
        """End them in sync; False if one is broken."""
        qemu, there = self.qemu, self.other
        assert qemu is not None
        broken = there.disk_broken or there.image is None
        if not qemu.mirrors_ready or broken or there.qemu is None or not there.qemu.exported:
            qemu.mirrors = qemu.mirrors_ready = False
            return False
        assert there.image is not None
        qemu.mirrors = qemu.mirrors_ready = False
        there.image.flushed = there.image.writes
        return True

    def migrate(self, memory_bytes: int, bytes_per_s: float) -> None:
        """Begin the passes."""
        qemu = self.qemu
        assert qemu is not None
        qemu.migration, qemu.pass_number, qemu.remaining_bytes = "active", 0, memory_bytes
        self._next_pass(qemu, memory_bytes, bytes_per_s)

    def _next_pass(self, qemu: Qemu, memory_bytes: int, bytes_per_s: float) -> None:
        if not qemu.alive or qemu.migration != "active":
            return
        if self._target_gone():
            self.fail(qemu)
            return
        if not self.network_up():  # no event, no progress
            self.kernel.after(1000, lambda: self._next_pass(qemu, memory_bytes, bytes_per_s))
            return
        self.write()
        qemu.pass_number += 1
        begins = qemu.status == "running"
        if qemu.pass_number > 1 and (not begins or qemu.remaining_bytes <= CONVERGES_BYTES):
            self._wait_for_switchover(qemu)
            return
        qemu.say("PASS", number=qemu.pass_number, sent=qemu.sent_bytes, remaining=qemu.remaining_bytes)
        took_s = qemu.remaining_bytes / bytes_per_s + 0.002
        qemu.sent_bytes += qemu.remaining_bytes
        qemu.remaining_bytes = min(memory_bytes, int(qemu.dirty_bytes_per_s * took_s))
        self.kernel.after(took_s * 1000, lambda: self._next_pass(qemu, memory_bytes, bytes_per_s))

    def _wait_for_switchover(self, qemu: Qemu) -> None:
        if qemu.status == "running":
            self.write()
            qemu.status = "finish"
            self._stands(qemu)
            self.kernel.tell(self.name, "QEMU stops the guest by itself")
        qemu.migration = "pre-switchover"
        qemu.say("PRE-SWITCHOVER")

    def continue_switchover(self) -> bool:
        """Send the device state."""
        qemu = self.qemu
        assert qemu is not None
        if qemu.migration != "pre-switchover":
            return False
        if qemu.follow:
            pages.hand_on(self, qemu)
            return True
        qemu.migration = "device"
        self.unlock()
        self.kernel.after(self.kernel.some_ms(5, 60), lambda: self._load(qemu))
        return True

    def _load(self, qemu: Qemu) -> None:
        there = self.other.qemu
        if not qemu.alive or qemu.migration != "device":
            return
        if there is None or there.migration == "failed" or there.status != "inmigrate":
            self.fail(qemu)
        elif not self.network_up():
            qemu.hangs = True  # QMP with it, until a yank
            self.kernel.after(500, lambda: self._load(qemu))
        else:
            qemu.hangs = False
            if qemu.mirrors:
                raise Broken("the device state went over while a mirror wrote")
            there.status, there.migration, there.fresh = "paused", "completed", True
            there.say("COMPLETED")
            self.kernel.after(self.kernel.some_ms(0.1, 5), lambda: self._acknowledge(qemu))

    def _acknowledge(self, qemu: Qemu) -> None:
        there = self.other.qemu
        if not qemu.alive or qemu.migration != "device":
            return
        if there is None:
            self.fail(qemu)
        elif not self.network_up():
            qemu.hangs = True
            self.kernel.after(500, lambda: self._acknowledge(qemu))
        else:
            qemu.hangs = False
            qemu.migration = "completed"
            if qemu.status == "finish":
                qemu.status = "paused"
            qemu.say("COMPLETED")

    def fail(self, qemu: Qemu, status: str = "failed") -> None:
        """The migration ends without success."""
        if qemu.migration not in ACTIVE:
            return
        sent, acknowledged = qemu.migration == "device", self.truth.acknowledged
        qemu.migration, qemu.hangs = status, False
        if qemu.status == "finish":
            qemu.status = "paused"
            self.run()
        qemu.say("FAILED")
        there = self.other.qemu
        if there is None or there.status != "inmigrate" or there.migration != "":
            return
        if sent and self.kernel.rng.random() < 0.5:  # all of it was on its way: it arrives, though the source gave up
            self.kernel.after(5, lambda: self._load_late(there, acknowledged))
        else:
            self.kernel.after(5, lambda: self._fail_incoming(there))

    def _load_late(self, there: Qemu, acknowledged: int) -> None:
        if there.alive and there.migration == "" and there.status == "inmigrate":
            there.status, there.migration = "paused", "completed"
            there.fresh = acknowledged == self.truth.acknowledged
            there.say("COMPLETED")

    def _fail_incoming(self, there: Qemu) -> None:
        if there.alive and there.migration == "" and there.status == "inmigrate":
            there.migration = "failed"
            there.say("FAILED")

    def undo(self) -> None:
        """Cancel memory and mirrors, by force if need be; a QEMU in post-copy can only be ended."""
        qemu = self.qemu
        assert qemu is not None
        if qemu.migration in pages.MISSING:
            self.truth.stopped_by_fault = True
            self.kill_qemu()
            return
        qemu.mirrors = qemu.mirrors_ready = False
        self.fail(qemu, "cancelled")

    def _target_gone(self) -> bool:
        there = self.other.qemu
        return there is None or there.migration == "failed"

    # --- ends

    def end_undoing(self) -> None:
        """What could not be taken back goes with the next try, the agent's next start, or the VM's next arrival."""
        if self.half_undone:
            self.image, self.half_undone = None, False

    def kill_qemu(self) -> None:
        """The process ends."""
        qemu = self.qemu
        if qemu is None:
            return
        self.write()
        self.unlock()
        self.qemu = None
        qemu.say("GONE")
        qemu.alive = False
        here = self.other.qemu
        if here is not None and here.migration == pages.ACTIVE:
            self.kernel.after(self.kernel.some_ms(1, 50), lambda: pages.halt(here))
        if here is not None and here.migration in ("active", "device"):  # before the switchover it does not look
            delay_ms = self.kernel.some_ms(1, 50)
            self.kernel.after(delay_ms, lambda: self.other.fail(here) if here.alive and self.network_up() else None)
        if here is not None and here.status == "inmigrate":
            self.kernel.after(5, lambda: self.other._fail_incoming(here))

    def lose_power(self) -> None:
        """Everything but the disk is gone, and of the disk what was not flushed."""
        image, locked = self.image, self.image is not None and self.image.lock == self.name
        self.kill_qemu()
        if locked and image is not None and image.shared:
            image.lock = self.name
            self.kernel.after(self.kernel.some_ms(0, LEASE_MS), self.unlock)
        self.up = False
        self.boot += 1
        self.taps = False
        if self.image is not None:
            self.image.writes = self.image.flushed
