"""agent/doctor.py: a healthy host has no problems, and each ailment is found by itself."""

import os
from pathlib import Path

import msgspec
import pytest

from kvmhv.agent.doctor import Doctor
from kvmhv.config import Config, HostSettings, from_data
from kvmhv.drivers.storage.directory import Directories
from kvmhv.errors import HostError
from kvmhv.model import Accel, QemuInfo, Severity, TrustedHost

MOUNTS = "1 0 0:1 / / rw - ext4 /dev/vda rw\n2 1 0:2 / {run} rw,nosuid shared:5 - {kind} none rw\n"
TCP = "  sl  local_address rem_address   st tx_queue rx_queue\n"


class Host:
    """A host that is well, until a test changes something of it; it is also every part that the doctor asks."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = directory
        (directory / "bin").mkdir()
        (directory / "bin/qemu-img").touch()
        (directory / "bin/qemu-img").chmod(0o755)
        monkeypatch.setenv("PATH", str(directory / "bin"))
        (directory / "dev/net").mkdir(parents=True)
        (directory / "dev/net/tun").symlink_to("/dev/null")  # some character device
        (directory / "proc/self").mkdir(parents=True)
        (directory / "proc/net").mkdir()
        (directory / "run").mkdir()
        self.mounts("tmpfs")
        self.listens([])
        self.config: Config = from_data(
            {
                "state_dir": str(directory / "state"),
                "run_dir": str(directory / "run"),
                "migration_ports": [50000, 50009],
            },
            "test",
        )
        self.current = HostSettings(enabled=True, networks=("10.0.0.0/24",))
        self.trusted = [TrustedHost(name="host2", address="host2:6600", fingerprint="00")]
        self.qemu: QemuInfo | HostError = QemuInfo(
            binary="qemu", version=(10, 0, 3), accel=Accel.KVM, machines=("pc-q35-7.2",), cpu_models={},
            capabilities=("events", "return-path", "pause-before-switchover"), parameters=(),
        )  # fmt: skip
        self.bridges: tuple[str, ...] = ("lan",)

    def mounts(self, kind: str) -> None:
        (self.root / "proc/self/mountinfo").write_text(MOUNTS.format(run=self.root / "run", kind=kind))

    def listens(self, ports: list[int], state: str = "0A") -> None:
        lines = [f"   {n}: 0100007F:{port:04X} 00000000:0000 {state} 0 0\n" for n, port in enumerate(ports)]
        (self.root / "proc/net/tcp").write_text(TCP + "".join(lines))

    def changes_qemu(self, **changes: object) -> None:
        assert isinstance(self.qemu, QemuInfo)
        self.qemu = msgspec.structs.replace(self.qemu, **changes)

    async def probe(self) -> QemuInfo:
        if isinstance(self.qemu, HostError):
            raise self.qemu
        return self.qemu

    def accel_reason(self) -> str:
        return "/dev/kvm is not there"

    async def switches(self) -> tuple[str, ...]:
        return self.bridges

    async def addresses(self) -> tuple[tuple[str, int], ...]:
        return (("10.0.0.1", 24), ("192.168.1.1", 24))

    def list(self) -> list[TrustedHost]:
        return self.trusted

    async def ailments(self) -> dict[str, Severity]:
        doctor = Doctor(
            config=self.config,
            settings=self,  # type: ignore[arg-type]
            trust=self,  # type: ignore[arg-type]
            hypervisor=self,  # type: ignore[arg-type]
            disks=Directories(self.config),
            network=self,  # type: ignore[arg-type]
            root=self.root,
        )
        found = await doctor.problems()
        assert all(problem.text and problem.todo for problem in found)
        severities = [problem.severity for problem in found]
        assert severities == sorted(severities, key=[Severity.ERROR, Severity.WARNING].index)
        return {problem.id: problem.severity for problem in found}


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    return Host(tmp_path, monkeypatch)


ERROR, WARNING = Severity.ERROR, Severity.WARNING


async def test_a_host_that_is_well(host: Host) -> None:
    assert await host.ailments() == {}


async def test_qemu_missing(host: Host) -> None:
    host.qemu = HostError("qemu-missing", "there is no qemu-system-x86_64", "install qemu-system-x86")
    (host.root / "bin/qemu-img").unlink()
    assert await host.ailments() == {"qemu-missing": ERROR, "qemu-img-missing": ERROR}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"version": (7, 1, 9)}, {"qemu-old": ERROR}),
        ({"version": (7, 2, 0)}, {}),
        ({"version": (8, 2, 9), "accel": Accel.TCG}, {"qemu-tcg-damages": ERROR, "kvm-unusable": WARNING}),
        ({"version": (9, 0, 0), "accel": Accel.TCG}, {"kvm-unusable": WARNING}),
        ({"machines": ("pc-q35-10.0",)}, {"machine-missing": ERROR}),
        ({"capabilities": ("events", "return-path")}, {"capability-missing": ERROR}),
    ],
)
async def test_qemu_that_will_not_do(host: Host, changes: dict[str, object], expected: dict[str, Severity]) -> None:
    host.changes_qemu(**changes)
    assert await host.ailments() == expected


async def test_tcg_that_was_asked_for_is_no_problem(host: Host) -> None:
    host.changes_qemu(accel=Accel.TCG)
    host.config = msgspec.structs.replace(host.config, accel="tcg")
    assert await host.ailments() == {}


async def test_tun_missing(host: Host) -> None:
    (host.root / "dev/net/tun").unlink()
    assert await host.ailments() == {"tun-missing": ERROR}
    (host.root / "dev/net/tun").touch()
    assert await host.ailments() == {"tun-missing": ERROR}


async def test_the_run_dir_on_a_disk(host: Host) -> None:
    host.mounts("ext4")
    assert await host.ailments() == {"run-dir-on-disk": WARNING}
    (host.root / "proc/self/mountinfo").unlink()
    assert await host.ailments() == {}


async def test_locations(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    host.config = msgspec.structs.replace(host.config, locations={"nfs": str(host.root / "nfs")})
    assert await host.ailments() == {"location-missing": ERROR}
    (host.root / "nfs").mkdir()
    assert await host.ailments() == {}
    monkeypatch.setattr("kvmhv.agent.doctor.LOW_SPACE_BYTES", 1 << 60)
    assert await host.ailments() == {"location-low": WARNING}
    real = os.statvfs

    def read_only(path: Path) -> os.statvfs_result:
        values = list(real(path))
        values[8] |= os.ST_RDONLY
        return os.statvfs_result(values)

    monkeypatch.setattr(os, "statvfs", read_only)
    assert await host.ailments() == {"location-read-only": ERROR}


async def test_switches(host: Host) -> None:
    host.bridges = ()
    assert await host.ailments() == {"switch-none": WARNING}
    host.config = msgspec.structs.replace(host.config, switches=("lan",))
    assert await host.ailments() == {"switch-missing": ERROR}
    host.bridges = ("lan", "dmz")
    assert await host.ailments() == {}


async def test_a_network_that_does_not_answer_is_a_problem_too(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fails() -> tuple[str, ...]:
        raise HostError("network", "netlink does not answer", "see the kernel's log")

    monkeypatch.setattr(host, "switches", fails)
    host.trusted = []
    assert await host.ailments() == {"network": ERROR, "trust-none": WARNING}


async def test_moves_that_are_not_allowed_yet(host: Host) -> None:
    host.current = HostSettings()
    host.trusted = []
    assert await host.ailments() == {
        "migration-disabled": WARNING, "migration-network-none": WARNING, "trust-none": WARNING,
    }  # fmt: skip


async def test_no_network_for_moves(host: Host) -> None:
    host.current = HostSettings(enabled=True, networks=("172.16.0.0/12",))
    assert await host.ailments() == {"migration-network-none": ERROR}
    host.current = HostSettings(enabled=True, use_any_network=True)
    assert await host.ailments() == {}


async def test_ports_that_others_have(host: Host) -> None:
    host.listens(list(range(50000, 50006)))
    assert await host.ailments() == {}
    host.listens(list(range(49990, 50007)))
    assert await host.ailments() == {"ports-taken": WARNING}
    host.listens(list(range(50000, 50009)))
    assert await host.ailments() == {"ports-taken": ERROR}
    host.listens(list(range(50000, 50010)), state="01")  # connections, not listeners
    assert await host.ailments() == {}
