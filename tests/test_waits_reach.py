"""What agent.toml says of waits is what the drivers wait: each outside thing hangs here, and is given up in time."""

import asyncio
import contextlib
import json
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvmhv import config
from kvmhv.agent.link import Link
from kvmhv.agent.visit import first_hello
from kvmhv.config import Waits
from kvmhv.drivers import network
from kvmhv.drivers.libvirt.connection import Connection
from kvmhv.drivers.network import LinuxNetwork
from kvmhv.drivers.qemu import blocks, direct, memory, process, storage_move
from kvmhv.drivers.qemu.instance import Instance
from kvmhv.drivers.qemu.qmp import QmpLost
from kvmhv.drivers.qemu.rundir import VmDir
from kvmhv.drivers.storage import iscsi, mounts, nfs
from kvmhv.drivers.storage.storage import Storage
from kvmhv.drivers.storage.volumes import LunVolume, NfsVolume
from kvmhv.errors import HostError, KvmhvError, PeerBroke
from kvmhv.model import LocationKind, LocationSpec
from kvmhv.places import Lun
from kvmhv.wire.session import SOURCE, Hello
from tests.fuzz.test_fuzz_qemu import PLAN

SHORT_S = 0.1
HANGS_S = 30.0
SOON_S = 10.0
"""Long after SHORT_S on a busy machine, and long before what hangs ends, or a default does."""


@contextlib.contextmanager
def soon() -> Iterator[None]:
    begun_s = time.monotonic()
    yield
    assert SHORT_S * 0.9 <= time.monotonic() - begun_s < SOON_S


def made(**waits: float) -> config.Config:
    return config.from_data({"name": "host1", "waits": waits}, "test")


def hang(*_arguments: object) -> None:
    time.sleep(SHORT_S * 5)


# --- storage


async def test_qemu_img(tmp_path: Path) -> None:
    (tmp_path / "qemu-img").write_text(f"#!/bin/sh\nexec sleep {HANGS_S}\n")
    (tmp_path / "qemu-img").chmod(0o755)
    image = tmp_path / "image.raw"
    image.write_bytes(bytes(1 << 20))
    where = {"state_dir": str(tmp_path / "state"), "qemu_binary": str(tmp_path / "qemu-system-x86_64")}
    with soon(), pytest.raises(HostError, match=r"has not ended|does not answer"):
        await Storage(config.from_data({**where, "waits": {"image_look_s": SHORT_S}}, "test")).chain(image, None)


class Library:
    """In the place of libnfs or libiscsi: notes what it is told, and lets nobody in."""

    def __init__(self) -> None:
        self.told: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            self.told[name] = arguments[-1:]
            return {"nfs_get_error": b"", "iscsi_get_error": b"", "nfs_mount": -1}.get(name, 1)

        return call


def test_the_clients_of_nfs_and_iscsi(monkeypatch: pytest.MonkeyPatch) -> None:
    library, waits = Library(), Waits(share_command_s=2.5)
    monkeypatch.setattr(nfs, "_load", lambda: (library, False))
    monkeypatch.setattr(iscsi, "_load", lambda: library)
    with pytest.raises(OSError, match="mount"):
        NfsVolume("server", "/export", waits).space()
    lun = Lun(portal="p:3260", target="iqn", lun=1, initiator="iqn")
    with pytest.raises(OSError, match="cannot be used"):
        LunVolume(lun, "", lambda _record: True, waits).space()
    assert (library.told["nfs_set_timeout"], library.told["iscsi_set_timeout"]) == ((2500,), (3,))


def test_a_lun_that_another_host_has_reserved(monkeypatch: pytest.MonkeyPatch) -> None:
    def reserved(*_arguments: object) -> bytes:
        raise PermissionError("reserved")

    target = iscsi.Target(None, None, SHORT_S)  # type: ignore[arg-type]
    monkeypatch.setattr(target, "_run", reserved)
    with soon(), pytest.raises(PermissionError):
        target.read(1, 0, 512)


async def test_mount_and_umount(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "umount").write_text(f"#!/bin/sh\nexec sleep {HANGS_S}\n")
    (tmp_path / "umount").chmod(0o755)
    monkeypatch.setattr(mounts, "kernel_mount", lambda *_all: ["sleep", str(HANGS_S)])
    monkeypatch.setattr(mounts, "is_mounted", lambda _directory: True)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    spec = LocationSpec(name="share", kind=LocationKind.NFS, server="server", share="/export")
    with soon(), pytest.raises(HostError, match="longer than"):
        await mounts.mount_with_kernel(spec, tmp_path / "mnt", tmp_path, Waits(mount_s=SHORT_S))
    with soon(), pytest.raises(HostError, match="umount hangs"):
        await mounts.unmount(tmp_path, SHORT_S)


async def test_the_program_that_serves_an_smb_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mounts, "_serve", lambda _file, _log: subprocess.Popen(["sleep", str(HANGS_S)]))
    spec = LocationSpec(name="share", kind=LocationKind.SMB, server="server", share="vms", user="kvmhv")
    waits = Waits(mount_s=SHORT_S, share_command_s=3.0, smb_silence_s=7.0, smb_patience_s=11.0)
    (tmp_path / "share.log").touch()
    with soon(), pytest.raises(HostError, match="does not come up"):
        await mounts.mount_in_user_space(spec, tmp_path / "mnt", tmp_path / "secret", tmp_path, waits)
    written = json.loads((tmp_path / "share.json").read_text())
    assert (written["connect_s"], written["silence_s"], written["patience_s"]) == (3.0, 7.0, 11.0)


async def test_a_look_at_a_disks_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct, "has_direct", hang)
    with soon(), pytest.raises(HostError, match="does not answer"):
        await direct.buffered({"disk0": (tmp_path / "image",)}, SHORT_S)


# --- QEMU


@contextlib.asynccontextmanager
async def silent_qemu(directory: Path, waits: Waits) -> AsyncIterator[Instance]:
    """A process without QMP."""
    vm_dir = VmDir(directory, "5d0cc5a9-44a5-4b6e-b4b7-7a2b5f1f2f10")
    vm_dir.make(incoming=False)
    child = process.start(["/bin/sh", "-c", "trap '' TERM; sleep 60"], vm_dir.qemu_log)
    bound = {"timeout_s": HANGS_S, "waits": waits}
    instance = Instance(vm_dir, child, [], now_ms=lambda: 0.0, emit=lambda _event: None, **bound)  # type: ignore[arg-type]
    try:
        yield instance
    finally:
        child.send(9)
        await instance.close()


async def test_a_qemu_that_says_nothing(tmp_path: Path) -> None:
    waits = Waits(qemu_state_s=SHORT_S, qemu_quit_s=SHORT_S, memory_cancel_s=SHORT_S, yank_s=SHORT_S)
    async with silent_qemu(tmp_path, waits) as instance:
        with soon():
            assert not (await instance.state()).answers
        with soon():
            assert (await memory.stats(instance.qmp, SHORT_S)).status == "lost"
        with soon(), pytest.raises(QmpLost):
            await memory.cancel(instance.qmp, SHORT_S, lambda: None, waits)
        with soon():
            await instance.kill()
        assert instance.process.gone


class Qmp:
    """Answers at once, and notes how long it might have taken."""

    version = (10, 0, 0)

    def __init__(self, **answers: Any) -> None:
        self.bounds: dict[str, Any] = {}
        self._answers = answers

    async def execute(self, command: str, arguments: Any = None, **bound: Any) -> Any:
        self.bounds[command] = arguments if command == "blockdev-add" else bound.get("timeout_s")

    async def ask(self, kind: Any, command: str, arguments: Any = None, **bound: Any) -> Any:
        await self.execute(command, arguments, **bound)
        return self._answers[command.replace("-", "_")]


async def test_the_memory_that_never_shakes_hands() -> None:
    capability = memory.Capability
    known = tuple(capability(capability=name, state=True) for name in (*memory.ALWAYS, *PLAN.capabilities))
    qmp: Any = Qmp(query_migrate_capabilities=known, query_migrate=memory.Migration(status="setup"))
    with soon():
        await memory.begin(qmp, PLAN, 49152, lambda: None, 0, Waits(handshake_s=SHORT_S, memory_stats_s=2 * SHORT_S))
    assert qmp.bounds["query-migrate"] == 2 * SHORT_S


async def test_an_nbd_server_without_a_word() -> None:
    silence = asyncio.Event()

    async def say_nothing(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await silence.wait()
        writer.close()

    server = await asyncio.start_server(say_nothing, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    try:
        with soon(), pytest.raises(HostError, match="said nothing"):
            await blocks._greeted("127.0.0.1", port, SHORT_S)
    finally:
        silence.set()
        server.close()


async def test_what_qemu_is_told_of_the_target_of_a_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    greeted: list[float] = []

    async def greet(_ip: str, _port: int, timeout_s: float) -> None:
        greeted.append(timeout_s)

    monkeypatch.setattr(blocks, "_greeted", greet)
    qmp: Any = Qmp()
    await blocks._add_target(qmp, PLAN, 49153, "disk0", Waits(greeting_s=7.0, handshake_s=1.5))
    assert (greeted, qmp.bounds["blockdev-add"]["open-timeout"]) == ([7.0], 2)


async def test_a_storage_move_that_qemu_does_not_end() -> None:
    job = blocks.Job(id="mirror-disk0", status="running", current_progress=0, total_progress=0)
    with soon(), pytest.raises(QmpLost, match="does not take"):
        await storage_move._ended(Qmp(query_jobs=(job,)), SHORT_S)  # type: ignore[arg-type]


# --- libvirt, the kernel, other agents


async def test_libvirt(monkeypatch: pytest.MonkeyPatch) -> None:
    connection = Connection("test:///default", SHORT_S, lambda _text: None)
    connection._connection = object()
    monkeypatch.setattr(Connection, "library", property(lambda _self: Any))
    for bound in ({}, {"timeout_s": SHORT_S}):
        with soon(), pytest.raises(HostError) as caught:
            await connection.call("what hangs", hang, **bound)
        assert caught.value.code == "libvirt-silent"


async def test_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "IPRoute", hang)
    with soon(), pytest.raises(HostError, match="netlink"):
        await LinuxNetwork(made(netlink_s=SHORT_S)).taps()


class SilentAgent:
    """ports.PeerConnection to an agent that takes it and says nothing; ports.Peer with such agents."""

    peer_name, peer_ip = "host2", "127.0.0.1"

    def __init__(self) -> None:
        self.connect_s: list[float] = []

    async def connect(self, _host: str, timeout_s: float) -> "SilentAgent":
        self.connect_s.append(timeout_s)
        return self

    async def send(self, frame: bytes) -> None: ...

    async def close(self) -> None: ...

    async def frames(self) -> AsyncIterator[bytes]:
        await asyncio.sleep(HANGS_S)
        yield b""


class Clock:
    def monotonic_ms(self) -> float:
        return 0.0


async def _told(begin: Callable[[Callable[[KvmhvError], None]], Awaitable[None]]) -> KvmhvError:
    told: asyncio.Future[KvmhvError] = asyncio.get_running_loop().create_future()
    task = asyncio.ensure_future(begin(lambda error: None if told.done() else told.set_result(error)))
    try:
        return await told
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_another_agent() -> None:
    agent: Any = SilentAgent()
    with soon(), pytest.raises(PeerBroke):
        await first_hello(agent, SHORT_S)
    hello = Hello(move_id="move-1", host="host1", role=SOURCE, epoch=1)

    def keep(lost: Callable[[KvmhvError], None]) -> Awaitable[None]:
        clock: Any = Clock()
        return Link(hello, clock, SHORT_S, lambda: None, lost, lambda _message: None).keep(agent, "host2")

    with soon():
        assert (await _told(keep)).code == "protocol-order"
    assert agent.connect_s == [SHORT_S]
