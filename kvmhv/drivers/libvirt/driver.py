"""ports.Runtime for libvirt: its domains, as its events tell of them, and what is asked of it."""

import asyncio
import contextlib
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import msgspec

from kvmhv.config import Config
from kvmhv.drivers.libvirt import arrival, moving
from kvmhv.drivers.libvirt.connection import Connection
from kvmhv.drivers.libvirt.definition import NAME, Domain, needs_of, paths_of, vm_of
from kvmhv.drivers.libvirt.states import STATES, WITHOUT_PROCESS, whereabouts
from kvmhv.errors import HostError, KvmhvError
from kvmhv.model import (
    Plan,
    Problem,
    RuntimeInfo,
    Severity,
    Stay,
    Vm,
    VmFacts,
    VmState,
    VmSummary,
    Whereabouts,
)
from kvmhv.ports import Clock, EventSink, MemoryStats, MirrorStats, QemuEvent, RunState

SUSPENDED, RESUMED, STARTED, STOPPED = 3, 4, 2, 5
"""virDomainEventType."""
EVENTS = {SUSPENDED: "STOP", RESUMED: "RESUME", STOPPED: "GONE"}
AGAIN_S = 0.5
POLL_S = 0.1


class Libvirt:
    """libvirt of this host."""

    name = NAME

    def __init__(self, config: Config, clock: Clock, told: Callable[[str], None]) -> None:
        """`told` hears in words when libvirt comes and goes."""
        self._host = config.name
        self._settings = config.libvirt
        self._image_look_s = config.waits.image_look_s
        self._clock = clock
        self._connection = Connection(config.libvirt.uri, config.libvirt.call_s, told)
        self._known: dict[str, VmSummary] = {}
        self._sinks: list[EventSink] = []
        self._looks: dict[str, int] = {}
        """How often each domain was looked at: answers may come in another order."""
        self._refreshing: set[asyncio.Task[None]] = set()
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def watch(self) -> int:
        """Names the unbroken time in which every event has been heard."""
        return self._connection.generation if self._connection.stands else 0

    def on_event(self, sink: EventSink) -> None:
        """Tell `sink` of every event."""
        self._sinks.append(sink)

    def vms(self) -> tuple[VmSummary, ...]:
        """Every domain by name, as the events told."""
        return tuple(sorted(self._known.values(), key=lambda vm: vm.name))

    # --- the connection and its events

    async def keep(self) -> None:
        """Connect, and again; ends by cancellation."""
        self._loop = asyncio.get_running_loop()
        await self._connection.keep(self._prepare, self._lost)

    def problems(self) -> tuple[Problem, ...]:
        """What keeps domains from being seen or moved; nothing on a host without libvirt."""
        if self._connection.socket() is None:
            return ()
        if not self._connection.installed():
            text = "libvirt is here, and kvmhv lacks its Python library: its guests are not seen"
            todo = "install python3-libvirt, or `pip install kvmhv[libvirt]`; then start the agent again"
            return (Problem(id="libvirt-library-missing", severity=Severity.WARNING, text=text, todo=todo),)
        if not self._connection.stands:
            text = f"libvirt does not answer at {self._settings.uri}: its guests cannot be moved"
            todo = "is libvirtd (or virtqemud) running, and may root use it? See `virsh list`"
            return (Problem(id="libvirt-silent", severity=Severity.WARNING, text=text, todo=todo),)
        if not self._encrypts():
            text = f"QEMU has no certificates in {self._settings.certificates}: libvirt's guests travel unencrypted"
            todo = "see docs/libvirt.md for the certificates"
            return (Problem(id="libvirt-unencrypted", severity=Severity.WARNING, text=text, todo=todo),)
        return ()

    def _encrypts(self) -> bool:
        return self._settings.encrypt and moving.has_certificates(Path(self._settings.certificates))

    def _lost(self) -> None:
        self._known = {vm_id: msgspec.structs.replace(vm, state=VmState.UNKNOWN) for vm_id, vm in self._known.items()}

    def _prepare(self, connection: Any) -> None:
        library = self._connection.library
        for number, heard in (
            (library.VIR_DOMAIN_EVENT_ID_LIFECYCLE, self._lifecycle),
            (library.VIR_DOMAIN_EVENT_ID_MIGRATION_ITERATION, self._iteration),
        ):
            connection.domainEventRegisterAny(None, number, heard, None)
        self._known = {vm.id: vm for vm in (self._summary(domain) for domain in connection.listAllDomains())}

    def _lifecycle(self, _connection: Any, domain: Any, event: int, detail: int, _opaque: object) -> None:
        self._hand_over(domain.UUIDString(), EVENTS.get(event), {"detail": detail})

    def _iteration(self, _connection: Any, domain: Any, iteration: int, _opaque: object) -> None:
        self._hand_over(domain.UUIDString(), "MIGRATION_PASS", {"pass": iteration})

    def _hand_over(self, vm_id: str, name: str | None, data: dict[str, object]) -> None:
        """From the library's thread into the agent's loop; the time is that of the event."""
        event = QemuEvent(vm_id=vm_id, name=name, data=data, at_ms=self._clock.monotonic_ms()) if name else None
        assert self._loop is not None
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._tell, vm_id, event)

    def _tell(self, vm_id: str, event: QemuEvent | None) -> None:
        if event is not None:
            for sink in self._sinks:
                sink(event)
        if event is None or event.name != "MIGRATION_PASS":
            task = asyncio.create_task(self._refresh_twice(vm_id), name=f"look at {vm_id}")
            self._refreshing.add(task)
            task.add_done_callback(self._refreshing.discard)

    async def _refresh_twice(self, vm_id: str) -> None:
        """libvirt says that a domain has stopped a moment before it is gone, and nothing after it."""
        await self._refresh(vm_id)
        await asyncio.sleep(AGAIN_S)
        await self._refresh(vm_id)

    async def _refresh(self, vm_id: str) -> None:
        number = self._looks[vm_id] = self._looks.get(vm_id, 0) + 1
        with contextlib.suppress(HostError):
            found = await self._connection.call("a domain", lambda connection: self._find(connection, vm_id))
            if self._looks[vm_id] != number:
                return  # a later look has the newer answer
            if found is None:
                self._known.pop(vm_id, None)
            else:
                self._known[vm_id] = found

    def _find(self, connection: Any, vm_id: str) -> VmSummary | None:
        domain = self._lookup(connection, vm_id)
        return self._summary(domain) if domain is not None else None

    def _summary(self, domain: Any) -> VmSummary:
        state, memory_kib, _, cpus, _ = domain.info()
        return VmSummary(
            name=domain.name(),
            id=domain.UUIDString(),
            state=STATES[state],
            host=self._host,
            memory_bytes=domain.maxMemory() * 1024 if state in (1, 2, 3) else memory_kib * 1024,
            cpus=cpus,
            runtime=NAME,
        )

    def _lookup(self, connection: Any, vm_id: str) -> Any | None:
        library = self._connection.library
        try:
            return connection.lookupByUUIDString(vm_id)
        except library.libvirtError as error:
            if error.get_error_code() == library.VIR_ERR_NO_DOMAIN:
                return None
            raise

    def _domain(self, connection: Any, vm_id: str) -> Any:
        domain = self._lookup(connection, vm_id)
        if domain is None:
            raise HostError("libvirt-domain-gone", f"libvirt has no domain {vm_id} any more", "see `virsh list --all`")
        return domain

    # --- what is known of a domain

    async def vm(self, vm_id: str) -> Vm:
        """Return a domain's definition as it is now."""

        def read(connection: Any) -> Vm:
            domain = self._domain(connection, vm_id)
            xml = domain.XMLDesc(0)
            sizes: dict[str, int] = {}
            for name, chain in paths_of(xml).items():
                if chain:
                    with contextlib.suppress(self._connection.library.libvirtError):  # an image that is not there
                        sizes[name] = domain.blockInfo(name)[0]
            kept = Domain(xml=xml, persistent=bool(domain.isPersistent()), autostart=_autostart(domain))
            return vm_of(kept, sizes)

        return await self._connection.call("a domain's definition", read)

    async def state(self, vm_id: str) -> RunState:
        """Return what libvirt says of the domain's process."""

        def read(connection: Any) -> RunState:
            domain = self._domain(connection, vm_id)
            state = STATES[domain.state()[0]]
            if state in WITHOUT_PROCESS:
                return RunState(process=False, status=state.value)
            return RunState(
                process=True,
                status=state.value,
                accel=needs_of(domain.XMLDesc(0)).accel,
                qemu_version=_version(connection.getVersion()),
                pid=_pid(domain.name()),
            )

        return await self._connection.call("a domain's state", read)

    async def look(self, vm_id: str) -> Whereabouts:
        """Return where the domain is."""

        def read(connection: Any) -> Whereabouts:
            domain = self._lookup(connection, vm_id)
            if domain is None:
                return Whereabouts(stay=Stay.ABSENT)
            return whereabouts(self._connection.library, domain)

        try:
            return await self._connection.call("where a domain is", read, self._settings.look_s)
        except KvmhvError:
            return Whereabouts(stay=Stay.SILENT)

    async def facts(self, vm: Vm) -> VmFacts:
        """Read what the check of a move needs."""

        def read(connection: Any) -> VmFacts:
            domain = self._domain(connection, vm.id)
            needs = needs_of(domain.XMLDesc(0))
            running = STATES[domain.state()[0]] is VmState.RUNNING
            version = connection.getVersion()
            blockers = []
            if needs.host_devices:
                blockers.append(f"{needs.host_devices} devices of the host were given to it")
            if domain.snapshotNum():
                blockers.append("libvirt does not move a domain that has snapshots")
            return VmFacts(
                running=running,
                qemu_version=(version // 1_000_000, version // 1000 % 1000, version % 1000),
                accel=needs.accel,
                memory_used_bytes=moving.used_bytes(domain) if running else 0,
                dirty_bytes_per_s=None,
                blockers=tuple(blockers),
                disk_used_bytes={disk.name: domain.blockInfo(disk.name)[1] for disk in vm.disks},
            )

        return await self._connection.call("what the check wants to know", read)

    async def info(self, arriving: Vm | None, copied: Collection[str]) -> RuntimeInfo | None:
        """Return what libvirt can do here, with what speaks against a domain that is to arrive."""
        if not self._connection.stands:
            return None

        def read(connection: Any) -> RuntimeInfo:
            dirs = arrival.image_dirs(connection, self._settings.image_dirs)
            found = arrival.findings(connection, self._host, arriving, copied, dirs) if arriving is not None else ()
            return RuntimeInfo(
                version=_version(connection.getLibVersion()),
                encrypts=self._encrypts(),
                findings=found,
                commands={"end": "virsh destroy", "resume": "virsh resume"},
            )

        return await self._connection.call("what it can do", read)

    # --- a domain's life

    async def start(self, vm_id: str) -> None:
        """Start it; no error if it runs."""
        await self._do(vm_id, "starting", lambda domain: None if domain.isActive() else domain.create())

    async def power_button(self, vm_id: str) -> None:
        """Ask the guest to shut down."""
        await self._do(vm_id, "shutting down", lambda domain: domain.shutdown())

    async def kill(self, vm_id: str) -> None:
        """End its process; no error if there is none."""
        await self._do(vm_id, "ending", lambda domain: domain.destroy() if domain.isActive() else None)

    async def wait_off(self, vm_id: str, timeout_s: float) -> bool:
        """Wait for its process to end."""
        return await self._until(vm_id, timeout_s, lambda found: found.stay in (Stay.OFF, Stay.ABSENT))

    async def _until(self, vm_id: str, timeout_s: float, so_far: Callable[[Whereabouts], bool]) -> bool:
        deadline_ms = self._clock.monotonic_ms() + timeout_s * 1000
        while not so_far(await self.look(vm_id)):
            if self._clock.monotonic_ms() > deadline_ms:
                return False
            await asyncio.sleep(POLL_S)
        return True

    async def resume(self, vm_id: str) -> float:
        """Let the guest go on."""
        running = (1, 2)
        await self._do(vm_id, "resuming", lambda it: None if it.state()[0] in running else it.resume())
        return self._clock.monotonic_ms()

    async def _do(self, vm_id: str, what: str, do: Any) -> None:
        await self._connection.call(what, lambda connection: do(self._domain(connection, vm_id)), self._settings.act_s)
        await self._refresh(vm_id)

    # --- target of a move

    async def prepare(self, vm: Vm, copied: Collection[str]) -> None:
        """Make the empty images of these disks."""
        places = self._settings.image_dirs
        dirs = await self._connection.call("its pools", lambda it: arrival.image_dirs(it, places))
        await arrival.make_images(vm, copied, dirs, self._image_look_s)

    async def adopt(self, vm: Vm) -> None:
        """Set what libvirt's move does not bring along: whether the domain starts with the host."""
        await self._do(vm.id, "autostart", lambda domain: arrival.adopt(domain, vm))

    async def remove_disks(self, vm: Vm, names: Collection[str]) -> tuple[str, ...]:
        """Delete the images of these disks that no domain here uses."""
        used = await self._connection.call("which images are used", arrival.used_paths)
        return await asyncio.to_thread(arrival.remove_images, vm, names, used)

    # --- source of a move

    async def move(self, vm: Vm, plan: Plan) -> None:
        """Let libvirt move it; returns at the end."""
        try:
            await self._connection.apart(
                "moving",
                lambda connection: moving.move(
                    self._connection.library, self._domain(connection, vm.id), plan, self._settings.peer_uri
                ),
            )
        except HostError as error:
            said = error.message.removeprefix("libvirt, moving: ")
            text = f"libvirt did not move {vm.name}: {said}"
            raise HostError("libvirt-move", text, "see libvirt's log on both hosts") from error

    async def progress(self, vm_id: str) -> tuple[MemoryStats, MirrorStats]:
        """Return how far the move is."""
        return await self._connection.call(
            "how far a move is", lambda connection: moving.progress(self._domain(connection, vm_id))
        )

    async def stop_guest(self, vm_id: str) -> None:
        """Lift the bandwidth cap, then suspend the guest."""
        await self._connection.call("stopping", lambda connection: moving.stop(self._domain(connection, vm_id)))

    async def abort(self, vm_id: str, timeout_s: float) -> None:
        """End the move and wait until none is under way."""
        library = self._connection.library
        await self._connection.call("ending a move", lambda it: moving.abort(library, self._domain(it, vm_id)))
        if not await self._until(vm_id, timeout_s, lambda found: not found.busy and found.stay is not Stay.SILENT):
            raise HostError("libvirt", "libvirt does not end its move", "see `virsh domjobinfo`")

    async def end_arrival(self, vm_id: str) -> bool:
        """End an incoming domain that libvirt has left standing; False for any other, which stays as it is."""
        library = self._connection.library

        def end(connection: Any) -> bool:
            domain = self._lookup(connection, vm_id)
            if domain is None or whereabouts(library, domain).stay is not Stay.ARRIVING:
                return False
            domain.destroy()
            return True

        return await self._connection.call("ending an arrival", end)

    async def end_copy(self, vm_id: str) -> None:
        """End and forget a copy that was succeeded on another host."""
        library = self._connection.library
        await self._do(vm_id, "ending a copy", lambda domain: arrival.forget(library, domain))


def _version(number: int) -> str:
    return f"{number // 1_000_000}.{number // 1000 % 1000}.{number % 1000}"


def _autostart(domain: Any) -> bool:
    return bool(domain.isPersistent() and domain.autostart())


def _pid(name: str) -> int | None:
    with contextlib.suppress(OSError, ValueError):
        return int(Path(f"/run/libvirt/qemu/{name}.pid").read_text())
    return None
