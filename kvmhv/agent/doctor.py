"""`kvmhv doctor`: what on this host would keep VMs from running or moving, as far as it can be seen without trying."""

import os
from collections.abc import Iterator
from pathlib import Path

from kvmhv.agent.settings import Settings
from kvmhv.config import Config, parse_networks
from kvmhv.core import addresses
from kvmhv.core.checks import NEEDED_CAPABILITIES, OLDEST_QEMU, TCG_FIXED_IN
from kvmhv.drivers.auth.trust import Trust
from kvmhv.drivers.storage import qemu_img
from kvmhv.drivers.storage.directory import DEFAULT
from kvmhv.errors import HostError
from kvmhv.model import DEFAULT_MACHINE, GIB, Accel, Access, Location, Problem, QemuInfo, Severity
from kvmhv.ports import Disks, Hypervisor, Network, Runtime

LOW_SPACE_BYTES = 1 * GIB
PORTS_PER_MOVE = 2
"""One for memory, one for disks."""
MEMORY_FILE_SYSTEMS = frozenset({"tmpfs", "ramfs"})
LISTENING = "0A"
"""State of a listening socket in /proc/net/tcp."""


class Doctor:
    """Looks at one host; `root` is where its /dev and /proc are."""

    def __init__(
        self,
        *,
        config: Config,
        settings: Settings,
        trust: Trust,
        hypervisor: Hypervisor,
        disks: Disks,
        network: Network,
        runtime: Runtime | None = None,
        root: Path = Path("/"),
    ) -> None:
        self._config = config
        self._settings = settings
        self._trust = trust
        self._hypervisor = hypervisor
        self._disks = disks
        self._network = network
        self._runtime = runtime
        self._root = root

    async def problems(self) -> tuple[Problem, ...]:
        """Look, and return every problem at once, the errors first; an empty tuple: VMs can run and move here."""
        found = [*await self._qemu(), *self._devices(), *self._run_dir()]
        for location in await self._disks.locations():
            found += _location(location)
        found += self._runtime.problems() if self._runtime is not None else ()
        for part in (self._switches, self._moves):
            try:
                found += await part()
            except HostError as error:
                found.append(_error(error.code, error.message, error.todo))
        return tuple(sorted(found, key=lambda problem: problem.severity is not Severity.ERROR))

    async def _qemu(self) -> list[Problem]:
        found = []
        if qemu_img.find(self._config.qemu_binary) is None:
            found.append(_error("qemu-img-missing", "there is no qemu-img: no disk can be made", "install qemu-utils"))
        try:
            info = await self._hypervisor.probe()
        except HostError as error:
            return [*found, _error(error.code, error.message, error.todo)]
        found += _versions(info)
        if info.accel is Accel.TCG and self._config.accel != "tcg":
            reason = self._hypervisor.accel_reason()
            todo = "on a machine with virtualisation (vmx, svm) load kvm_intel or kvm_amd; in a VM, ask for nested KVM"
            found.append(_warning("kvm-unusable", f"guests run without KVM, many times slower: {reason}", todo))
        return found

    def _devices(self) -> Iterator[Problem]:
        if not (self._root / "dev/net/tun").is_char_device():
            yield _error("tun-missing", "there is no /dev/net/tun: VMs cannot have network cards", "modprobe tun")

    def _run_dir(self) -> Iterator[Problem]:
        kind = _file_system(self._root / "proc/self/mountinfo", self._config.run_path.resolve())
        if kind is not None and kind not in MEMORY_FILE_SYSTEMS:
            yield _warning(
                "run-dir-on-disk",
                f"run_dir {self._config.run_dir} is on {kind}, not on a tmpfs: keys of moves are written to a disk, "
                "and after a crash of the host its agent takes old notes for new ones",
                "set run_dir in agent.toml to a directory on a tmpfs (/run is one where systemd runs)",
            )

    async def _switches(self) -> list[Problem]:
        there = await self._network.switches()
        if self._config.switches:
            missing = [name for name in self._config.switches if name not in there]
            return [
                _error(
                    "switch-missing", f"the configured switch {name} is no bridge of this host", f"make bridge {name}"
                )
                for name in missing
            ]
        if there:
            return []
        todo = "make one: `ip link add lan type bridge && ip link set lan up`"
        return [_warning("switch-none", "this host has no bridge: VMs can have no network cards", todo)]

    async def _moves(self) -> list[Problem]:
        settings = self._settings.current
        found = []
        if not settings.enabled:
            text = "live migration is switched off: this host neither sends VMs nor takes them"
            found.append(_warning("migration-disabled", text, "`kvmhv host set migration.enabled=true`"))
        host = await self._network.addresses()
        if not addresses.usable(host, parse_networks(settings.networks), settings.use_any_network):
            listed = ", ".join(settings.networks) or "none"
            has = ", ".join(f"{ip}/{prefix}" for ip, prefix in host) or "none"
            text = f"no address of this host ({has}) is in a network that migration may use ({listed})"
            todo = "`kvmhv host set migration.networks=SUBNET`, or migration.use_any_network=true"
            severity = Severity.ERROR if settings.enabled else Severity.WARNING
            found.append(Problem(id="migration-network-none", severity=severity, text=text, todo=todo))
        if not self._trust.list():
            text = "this host trusts no other host, so there is none to move VMs to or from"
            found.append(
                _warning("trust-none", text, "`kvmhv host trust invite` on one host, `... join CODE` on the other")
            )
        first, last = self._config.migration_ports
        free = last - first + 1 - len(self._listening(first, last))
        if free < PORTS_PER_MOVE * settings.moves_in:
            text = f"{free} of the ports {first} to {last} are free; {settings.moves_in} moves in need up to "
            text += f"{PORTS_PER_MOVE * settings.moves_in}"
            severity = Severity.ERROR if free < PORTS_PER_MOVE else Severity.WARNING
            todo = "give migration_ports in agent.toml a larger or another range"
            found.append(Problem(id="ports-taken", severity=severity, text=text, todo=todo))
        return found

    def _listening(self, first: int, last: int) -> set[int]:
        ports = set()
        for name in ("tcp", "tcp6"):
            try:
                lines = (self._root / "proc/net" / name).read_text().splitlines()[1:]
            except OSError:  # no IPv6 on this host
                continue
            for fields in (line.split() for line in lines):
                port = int(fields[1].rpartition(":")[2], 16)
                if fields[3] == LISTENING and first <= port <= last:
                    ports.add(port)
        return ports


def _versions(info: QemuInfo) -> Iterator[Problem]:
    version = info.version_text
    if info.version < OLDEST_QEMU:
        yield _error("qemu-old", f"QEMU {version} is older than 7.2", "install QEMU 7.2 or newer")
        return
    if info.accel is Accel.TCG and info.version < TCG_FIXED_IN:
        yield _error(
            "qemu-tcg-damages",
            f"QEMU {version} without KVM damages guests that it sends: live moves from this host are refused",
            "install QEMU 9.0 or newer, or use a machine with KVM",
        )
    if DEFAULT_MACHINE not in info.machines:
        yield _error("machine-missing", f"QEMU {version} has no machine {DEFAULT_MACHINE}", "install QEMU 7.2 to 10")
    for capability in NEEDED_CAPABILITIES:
        if capability not in info.capabilities:
            yield _error("capability-missing", f"QEMU {version} cannot {capability}", "install QEMU 7.2 or newer")


def _location(location: Location) -> Iterator[Problem]:
    if location.silent:
        text = f"location {location.name} ({location.path}) does not answer"
        yield _error("location-silent", text, "is its server up, and the network to it? VMs on it wait for it")
    for why in location.unsafe:
        text = f"location {location.name}: {why}"
        yield _warning("location-unsafe", text, "mount it with the options that docs/storage.md names")
    if location.access is not Access.DIRECTORY or location.silent:
        return
    path = Path(location.path)
    if not path.is_dir():
        if location.name != DEFAULT:  # that one is made with the first disk
            text = f"location {location.name}: there is no directory {path}"
            yield _error("location-missing", text, "mount or make it, or take the location out of agent.toml")
        return
    if not os.access(path, os.R_OK | os.W_OK | os.X_OK) or os.statvfs(path).f_flag & os.ST_RDONLY:
        yield _error("location-read-only", f"location {location.name}: {path} cannot be written", "remount it writable")
    elif location.free_bytes < LOW_SPACE_BYTES:
        text = f"location {location.name}: {location.free_bytes // 1024**2} MiB are free in {path}"
        yield _warning("location-low", text, "make room")


def _file_system(mountinfo: Path, directory: Path) -> str | None:
    """Type of the file system that a directory is on; None if that cannot be told."""
    try:
        lines = mountinfo.read_text().splitlines()
    except OSError:
        return None
    best: tuple[int, str] | None = None
    for line in lines:
        fields, _, kind = line.partition(" - ")
        mounted_on = Path(fields.split()[4].encode().decode("unicode_escape"))
        depth = len(mounted_on.parts)
        if directory.is_relative_to(mounted_on) and (best is None or depth >= best[0]):
            best = depth, kind.split()[0]
    return best[1] if best else None


def _error(id: str, text: str, todo: str) -> Problem:  # noqa: A002
    return Problem(id=id, severity=Severity.ERROR, text=text, todo=todo)


def _warning(id: str, text: str, todo: str) -> Problem:  # noqa: A002
    return Problem(id=id, severity=Severity.WARNING, text=text, todo=todo)
