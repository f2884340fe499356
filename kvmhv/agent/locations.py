"""The locations of this host: those of agent.toml, and those that operators add, kept in the database.

A password or CHAP secret is kept apart from its location, in a file of its own that only root reads; no answer of the
API, no log and no command line has it. A location that cannot be reached when the agent starts is tried again until it
can; VMs on it run on meanwhile.
"""

import asyncio
import contextlib
import os
from collections.abc import Callable, Coroutine
from functools import partial
from pathlib import Path

import msgspec
import structlog

from kvmhv.agent import events
from kvmhv.agent.vm_records import VmRecords
from kvmhv.config import Config
from kvmhv.core import ownership
from kvmhv.core.vm_spec import check_name
from kvmhv.drivers.storage import mounts
from kvmhv.drivers.storage.storage import Attached, Storage
from kvmhv.drivers.storage.volumes import DirectoryVolume, LunVolume, NfsVolume, Volume
from kvmhv.errors import CallerError, HostError, KvmhvError, Refused
from kvmhv.model import Access, Event, Location, LocationKind, LocationReport, LocationSpec, Problem, Severity, Vm
from kvmhv.places import Lun
from kvmhv.ports import Records

log = structlog.get_logger(__name__)

KIND = "location"
LOCATIONS_MAX = 64
AGAIN_S = 10.0
WATCH_S = 30.0
"""Between two looks at the shares: QEMU raises no event when a server is away, its guests just wait."""
SECRET_BYTES_MAX = 256
ISCSI_PORT = 3260
PROBE = "kvmhv-check"


class Locations:
    """Adds, shows, checks and removes locations; `storage` has those that can be used."""

    def __init__(
        self, config: Config, host_id: str, records: Records, storage: Storage, tell: Callable[[Event], None]
    ) -> None:
        """`tell` keeps an event."""
        self._config = config
        self._waits = config.waits
        self._host_id = host_id
        self._records = records
        self._vms = VmRecords(records)
        self._storage = storage
        self._tell = tell
        self._changing = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self._broken: dict[str, HostError] = {}
        self.moving: Callable[[], tuple[Vm, ...]] = lambda: ()
        """The VMs of open moves, also those that arrive here."""

    # --- an agent's life

    async def start(self) -> None:
        """Use every location that is kept; within `waits.locations_start_s`, for nothing waits for a dead server."""
        tasks = [self._spawn(self._until_it_works(spec), f"location {spec.name}") for spec in self._kept()]
        if tasks:
            await asyncio.wait(tasks, timeout=self._waits.locations_start_s)
        self._spawn(self._watch(), "watch locations")

    async def close(self) -> None:
        """End what runs in the background; mounts stay, for the VMs on them run on."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # --- for operators

    async def add(self, spec: LocationSpec, secret: str | None) -> LocationReport:
        """Keep a location that works: it was reached, written and read. After any error nothing of it is left.

        Raises CallerError `location-exists`, `location-invalid`; HostError `location-unreachable`,
        `location-read-only`, `location-missing`, `location-silent`; Refused `location-limit`.
        """
        check_name(spec.name, "location")
        _check(spec, secret)
        async with self._changing:
            if spec.name in {location.name for location in await self._storage.locations()}:
                text = f"there is a location {spec.name!r} already"
                raise CallerError("location-exists", text, "choose another name, or remove it", http_status=409)
            if len(self._kept()) >= LOCATIONS_MAX:
                raise Refused("location-limit", f"this host has {LOCATIONS_MAX} locations", "remove one")
            try:
                self._keep_secret(spec, secret)
                await self._attach(spec)
                await self._try(spec.name)
                self._records.put(KIND, spec.name, msgspec.json.encode(spec))
            except BaseException:
                await self._forget(spec)
                raise
        log.info("location added", location=spec.name, kind=str(spec.kind), server=spec.server, share=spec.share)
        return await self.show(spec.name)

    async def list(self) -> tuple[LocationReport, ...]:
        """Return every location by name."""
        kept = {spec.name: spec for spec in self._kept()}
        seen = {location.name: location for location in await self._storage.locations()}
        names = sorted({*kept, *seen})
        return tuple(self._report(kept.get(name), seen.get(name) or _unseen(kept[name])) for name in names)

    async def show(self, name: str) -> LocationReport:
        """Return one location. Raises CallerError `location-unknown`."""
        for report in await self.list():
            if report.spec.name == name:
                return report
        raise CallerError(
            "location-unknown", f"this host has no location {name!r}", "see: kvmhv storage list", http_status=404
        )

    async def check(self, name: str) -> LocationReport:
        """Write, read and remove something on a location; what is wrong with it is in `problems`."""
        report = await self.show(name)
        problems = list(report.problems)
        if self._storage.volume(name) is not None and not problems:
            try:
                await self._try(name)
            except HostError as error:
                problems.append(_problem(error))
        return msgspec.structs.replace(report, problems=tuple(problems))

    async def remove(self, name: str) -> None:
        """Use and know a location no longer; what lies on it stays.

        Raises CallerError `location-unknown`, `location-configured`; Refused `location-in-use`.
        """
        async with self._changing:
            report = await self.show(name)
            if report.configured:
                text = f"location {name!r} stands in agent.toml"
                raise CallerError("location-configured", text, "take it out there and restart the agent")
            arriving = (vm.name for vm in self.moving() if _uses(vm, name))
            if users := sorted({*report.vms, *arriving}):
                who = ", ".join(users)
                text = f"location {name!r} has disks of {who}"
                raise Refused("location-in-use", text, "remove or move those VMs first", http_status=409)
            await self._forget(report.spec)
        log.info("location removed", location=name)

    # ---

    def _kept(self) -> tuple[LocationSpec, ...]:
        return tuple(msgspec.json.decode(value, type=LocationSpec) for _, value in self._records.all(KIND))

    def _report(self, spec: LocationSpec | None, location: Location) -> LocationReport:
        name = location.name
        users = (record.vm.name for record in self._vms.all() if _uses(record.vm, name))
        problems = [_problem(self._broken[name])] if name in self._broken else []
        if location.silent and not problems:
            text = f"location {name} does not answer"
            todo = "is its server up, and the network to it?"
            problems.append(Problem(id="location-silent", severity=Severity.ERROR, text=text, todo=todo))
        for why in location.unsafe:
            text = f"location {name}: {why}"
            todo = "mount it with the options that docs/storage.md names"
            problems.append(Problem(id="location-unsafe", severity=Severity.WARNING, text=text, todo=todo))
        return LocationReport(
            spec=spec or LocationSpec(name=name, kind=LocationKind.DIR, path=location.path),
            location=location,
            configured=spec is None,
            has_secret=self._secret_file(name).exists(),
            vms=tuple(users),
            problems=tuple(problems),
        )

    def _secret_file(self, name: str) -> Path:
        return self._config.state_path / "storage" / f"{name}.secret"

    def _credentials_file(self, name: str) -> Path:
        return self._config.state_path / "storage" / f"{name}.credentials"

    def _keep_secret(self, spec: LocationSpec, secret: str | None) -> None:
        """Write the secret for QEMU and smb_mount (nothing else in the file), and as mount.cifs wants it."""
        if secret is None:
            return
        contents = {self._secret_file(spec.name): secret}
        if spec.kind is LocationKind.SMB:
            contents[self._credentials_file(spec.name)] = f"username={spec.user}\npassword={secret}\n"
        for file, content in contents.items():
            file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            file.unlink(missing_ok=True)
            with os.fdopen(os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as written:
                written.write(content)
                written.flush()
                os.fsync(written.fileno())

    def _mountpoint(self, name: str) -> Path:
        return self._config.run_path / "storage" / name

    async def _attach(self, spec: LocationSpec) -> None:
        self._storage.attach(spec.name, await self._make(spec))
        self._broken.pop(spec.name, None)

    async def _make(self, spec: LocationSpec) -> Attached:
        """Reach a location. Raises HostError."""
        shown = f"{spec.server}:{spec.share}" if spec.kind is not LocationKind.DIR else spec.path
        hint = f"{spec.kind}:{spec.server}:{spec.share}"
        if spec.path:
            return await self._storage.ask(spec.name, lambda: self._made_of_directory(spec, Path(spec.path)))
        if spec.kind is LocationKind.ISCSI:
            return Attached("iscsi", self._target(spec), hint, Access.USER, shown)
        with_kernel = spec.access is not Access.USER and mounts.kernel_can(spec.kind)
        if spec.access is Access.KERNEL and not with_kernel:
            text = f"location {spec.name}: this host has no kernel client for {spec.kind}, or no program to mount it"
            raise HostError("kernel-client-missing", text, "install cifs-utils or nfs-common, or use --access user")
        if spec.kind is LocationKind.NFS and not with_kernel:
            server, port = mounts.split_server(spec.server)
            if port is not None:
                text = f"location {spec.name}: QEMU's own NFS driver takes no port"
                raise HostError("location-unreachable", text, "give the server without a port")
            return Attached("nfs", NfsVolume(server, spec.share, self._waits), hint, Access.USER, shown)
        mountpoint = self._mountpoint(spec.name)
        if await self._has_dead_mount(spec.name):
            await mounts.unmount(mountpoint, self._waits.unmount_s, lazily=True)
        if not mounts.is_mounted(mountpoint):
            mountpoint.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            if with_kernel:
                await mounts.mount_with_kernel(spec, mountpoint, self._credentials_file(spec.name), self._waits)
            else:
                secret_file = self._secret_file(spec.name)
                await mounts.mount_in_user_space(spec, mountpoint, secret_file, mountpoint.parent, self._waits)
        found = mounts.mount_of(mountpoint)
        access = Access.USER if found is not None and found.type == mounts.FUSE_TYPE else Access.KERNEL
        return Attached(str(spec.kind), DirectoryVolume(mountpoint, self._waits), hint, access, shown)

    async def _has_dead_mount(self, name: str) -> bool:
        mountpoint = self._mountpoint(name)
        try:
            return mounts.is_mounted(mountpoint) and await self._storage.ask(name, partial(mounts.is_dead, mountpoint))
        except HostError:  # silent: its server is away, and it waits for it
            return False

    async def _mount_again(self, name: str) -> None:
        """Mount a share again whose mount has lost the program that served it: VMs have to be started again."""
        async with self._changing:
            for spec in self._kept():
                if spec.name == name and await self._has_dead_mount(name):
                    log.warning("the program that served a share has ended: mounted again", location=name)
                    with contextlib.suppress(HostError):
                        await self._attach(spec)

    def _made_of_directory(self, spec: LocationSpec, path: Path) -> Attached:
        found = mounts.mount_of(path)
        if found is None or (spec.kind is LocationKind.DIR and not path.is_dir()):
            raise HostError("location-missing", f"location {spec.name!r}: there is no {path}", "mount or make it")
        kinds = {LocationKind.NFS: ("nfs", "nfs4"), LocationKind.SMB: ("cifs", "smb3")}
        if spec.kind is not LocationKind.DIR and found.type not in kinds[spec.kind]:
            text = f"location {spec.name!r}: {path} is on {found.type}, which is no {spec.kind} mount"
            raise HostError("location-missing", text, "mount the share there first")
        shared = spec.kind is not LocationKind.DIR or spec.shared or found.type in mounts.SHARED_TYPES
        hint = f"{found.type}:{found.source}" if shared else None
        unsafe = mounts.unsafe_options(found) if shared else ()
        return Attached(str(spec.kind), DirectoryVolume(path, self._waits), hint, Access.DIRECTORY, str(path), unsafe)

    def _target(self, spec: LocationSpec) -> Volume:
        server, port = mounts.split_server(spec.server)
        host = f"[{server}]" if ":" in server else server
        secret_file = self._secret_file(spec.name)
        lun = Lun(
            portal=f"{host}:{port or ISCSI_PORT}",
            target=spec.share,
            lun=spec.records_lun,
            initiator=f"iqn.2024-01.dev.kvmhv:{self._host_id}",
            user=spec.user,
            secret_file=str(secret_file) if spec.user else "",
        )
        is_own = partial(ownership.is_of, host_id=self._host_id)
        return LunVolume(lun, secret_file.read_text() if spec.user else "", is_own, self._waits)

    async def _try(self, name: str) -> None:
        """Write a record and read it again; tells a read-only export, a wrong password, a full share."""
        volume = self._storage.volume(name)
        if volume is None:
            return
        record = f".{PROBE}-{self._host_id}"
        old = await self._storage.ask(name, lambda: volume.read_record(record))
        content = os.urandom(16).hex().encode()
        await self._storage.ask(name, lambda: volume.swap_record(record, old, content))
        if await self._storage.ask(name, lambda: volume.read_record(record)) != content:
            text = f"location {name!r} does not give back what was written to it"
            raise HostError("location-unreachable", text, "check the server")
        await self._storage.ask(name, lambda: volume.swap_record(record, content, None))

    async def _forget(self, spec: LocationSpec) -> None:
        self._storage.detach(spec.name)
        self._broken.pop(spec.name, None)
        if spec.kind is LocationKind.SMB or (spec.kind is LocationKind.NFS and not spec.path):
            with contextlib.suppress(HostError):
                await mounts.unmount(self._mountpoint(spec.name), self._waits.unmount_s)
            with contextlib.suppress(OSError):  # still mounted, or never made
                await asyncio.to_thread(self._mountpoint(spec.name).rmdir)
        for suffix in (".json", ".log"):
            (self._mountpoint(spec.name).parent / f"{spec.name}{suffix}").unlink(missing_ok=True)
        self._secret_file(spec.name).unlink(missing_ok=True)
        self._credentials_file(spec.name).unlink(missing_ok=True)
        self._records.delete(KIND, spec.name)

    async def _until_it_works(self, spec: LocationSpec) -> None:
        while any(kept.name == spec.name for kept in self._kept()):
            try:
                await self._attach(spec)
            except HostError as error:
                if spec.name not in self._broken:
                    log.warning("location cannot be used yet", location=spec.name, error=str(error))
                self._broken[spec.name] = error
                await asyncio.sleep(AGAIN_S)
            else:
                return

    async def _watch(self) -> None:
        """Tell when a share stops to answer, with the VMs that wait for it, and when it answers again."""
        silent: set[str] = set()
        while True:
            await asyncio.sleep(WATCH_S)
            for location in await self._storage.locations():
                if location.silent:
                    await self._mount_again(location.name)
                if location.silent and location.name not in silent:
                    silent.add(location.name)
                    vms = self._report(None, location).vms
                    log.warning("location does not answer: VMs on it wait", location=location.name, vms=vms)
                    self._tell(events.location_silent(location.name, vms))
                elif not location.silent and location.name in silent:
                    silent.remove(location.name)
                    log.info("location answers again", location=location.name)
                    self._tell(events.location_answers(location.name))

    def _spawn(self, work: Coroutine[None, None, None], name: str) -> asyncio.Task[None]:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def _uses(vm: Vm, location: str) -> bool:
    return any(layer.location == location for disk in vm.disks for layer in disk.layers)


def _unseen(spec: LocationSpec) -> Location:
    return Location(name=spec.name, kind=str(spec.kind), path=spec.path or f"{spec.server}:{spec.share}", silent=True)


def _problem(error: KvmhvError) -> Problem:
    return Problem(id=error.code, severity=Severity.ERROR, text=error.message, todo=error.todo)


def _check(spec: LocationSpec, secret: str | None) -> None:
    """Raise CallerError `location-invalid` unless all that the kind needs is there, and nothing else."""
    wrong = _wrong(spec, secret is not None)
    texts = (spec.path, spec.server, spec.share, spec.user)
    if any(not text.isprintable() or "," in text or len(text) > 1024 for text in texts):
        wrong = "a path, server, share or user has a comma or unprintable characters in it"
    elif secret is not None and (len(secret.encode()) > SECRET_BYTES_MAX or not secret.isprintable()):
        wrong = f"a password has 1 to {SECRET_BYTES_MAX} printable characters"
    elif spec.server and not wrong:
        try:
            mounts.split_server(spec.server)
        except ValueError as error:
            wrong = str(error)
    if wrong:
        raise CallerError("location-invalid", f"location {spec.name!r}: {wrong}", "see: kvmhv storage add --help")


def _wrong(spec: LocationSpec, secret: bool) -> str:
    """Say what is missing or too much for the kind, nothing if all is right."""
    if spec.path and (not spec.path.startswith("/") or spec.kind is LocationKind.ISCSI):
        return "--path is an absolute path, of a directory or of a mount"
    if spec.kind is LocationKind.DIR:
        network = spec.server or spec.share or spec.user or secret
        return "" if spec.path and not network else "a directory has --path and nothing else"
    if spec.path:
        return ""
    if not (spec.server and spec.share):
        return f"{spec.kind} needs --server and --share (or --path, where you have mounted it)"
    if spec.kind is LocationKind.SMB and not (spec.user and secret):
        return "smb needs --user and a password"
    if spec.kind is LocationKind.NFS and (spec.user or secret):
        return "nfs has no user: the server trusts the host's address"
    return "" if bool(spec.user) == secret else "--user and a password or CHAP secret go together"
