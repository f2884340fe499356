"""A storage move in one QEMU, step by step, with the oldest QEMU that kvmhv knows and a new one.

The guest's requests are made by QEMU's own `qemu-io` command on the guest's device, so each one is known.
"""

import asyncio
import os
import shutil
import subprocess
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from kvmhv.config import Config, Limits
from kvmhv.drivers.qemu import Qemu
from kvmhv.drivers.qemu.nodes import top_nodes
from kvmhv.errors import HostError
from kvmhv.model import MIB, Disk, DiskCopy, DiskFormat, Layer, Vm
from tests.real.qemu_pair import Clock
from tests.real.test_qemu_driver import other_version, tools  # noqa: F401 - a fixture

pytestmark = pytest.mark.real

SIZE_BYTES = 16 * MIB
LAST = SIZE_BYTES - 512
DEVICE = "/machine/peripheral/disk0-device/virtio-backend"
RAW, QCOW2 = DiskFormat.RAW, DiskFormat.QCOW2


def run(*command: str | Path) -> str:
    """Run a command that must succeed."""
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


class Host:
    """A driver and one VM; its images lie in directories `old`, `new`, ..."""

    def __init__(self, binary: Path, root: Path, formats: tuple[DiskFormat, ...]) -> None:
        self.root, self.formats = root, formats
        self.img = binary.with_name("qemu-img")
        limits = Limits(qmp_timeout_s=10.0)
        run = root / "run"
        run.mkdir()
        self.config = Config(name="host1", run_dir=str(run), qemu_binary=str(binary), accel="tcg", limits=limits)
        self.qemu = Qemu(self.config, Clock())
        self.vm_id = str(uuid.uuid4())

    def vm(self, place: str) -> Vm:
        layers = tuple(
            Layer(location=place, path=f"{depth}.{kind.value}", format=kind) for depth, kind in enumerate(self.formats)
        )
        disk = Disk(name="disk0", size_bytes=SIZE_BYTES, layers=layers, pci_slot=8)
        return Vm(id=self.vm_id, name="web01", memory_bytes=16 * MIB, cpus=1, disks=(disk,))

    def paths(self, place: str) -> dict[str, tuple[Any, ...]]:
        return {"disk0": tuple(self.root / place / layer.path for layer in self.vm(place).disks[0].layers)}

    def make(self, place: str) -> None:
        (self.root / place).mkdir()
        below: Path | None = None
        for path, kind in reversed(list(zip(self.paths(place)["disk0"], self.formats, strict=True))):
            backing = ["-u", "-b", below.name, "-F", "raw"] if below else []
            run(self.img, "create", "-q", "-f", kind.value, *backing, path, str(SIZE_BYTES))
            below = path

    def copies(self, old: str, new: str) -> tuple[DiskCopy, ...]:
        source, target = self.vm(old).disks[0].layers, self.vm(new).disks[0].layers
        copy = DiskCopy(disk="disk0", size_bytes=SIZE_BYTES, used_bytes=MIB, source_layers=source, target_layers=target)
        return (copy,)

    async def qmp(self, command: str, **arguments: object) -> Any:
        return await (await self.qemu._instance(self.vm_id)).qmp.execute(command, arguments)

    async def io(self, command: str) -> None:
        """Make a request of the guest."""
        line = f'qemu-io -d {DEVICE} "{command}"'
        said = await self.qmp("human-monitor-command", **{"command-line": line})
        assert "rror" not in said and "ailed" not in said, said

    async def new_agent(self) -> None:
        await self.qemu.close()
        self.qemu = Qemu(self.config, Clock())

    async def copied(self, old: str, new: str) -> None:
        self.make(new)
        await self.qemu.copy_disks(self.vm(new), self.copies(old, new), self.paths(new), 0, 60.0)
        assert await self.end_of_copy() == ""

    async def end_of_copy(self) -> str:
        """Wait until all is copied, or until that has failed: returns why."""
        while True:
            (stats,) = await self.qemu.mirror_stats(self.vm_id)
            if stats.ready or stats.error:
                return stats.error
            await asyncio.sleep(0.05)

    def holds(self, place: str, *patterns: tuple[int, int]) -> None:
        """Assert what lies where, in an image that no QEMU has open."""
        reads = [word for at, pattern in patterns for word in ("-c", f"read -P {pattern} {at} 512")]
        path, io = self.paths(place)["disk0"][0], self.img.with_name("qemu-io")
        said = run(io, "-f", self.formats[0].value, *reads, path)
        assert "failed" not in said, said

    async def nodes(self) -> set[str]:
        return {node["node-name"] for node in await self.qmp("query-named-block-nodes", flat=True)}


@pytest.fixture(params=["tree", "machine"])
def binary(request: pytest.FixtureRequest, tools: Path, monkeypatch: pytest.MonkeyPatch) -> Path:  # noqa: F811
    if request.param == "machine":
        return other_version(tools)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    return tools / "qemu-system-x86_64"


@pytest.fixture(params=[(RAW,), (QCOW2,), (QCOW2, RAW)], ids=["raw", "qcow2", "chain"])
async def host(
    request: pytest.FixtureRequest, binary: Path, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Host]:
    root = tmp_path_factory.mktemp("m")
    made = Host(binary, root, request.param)
    made.make("old")
    if len(made.formats) > 1:
        io, base = made.img.with_name("qemu-io"), made.paths("old")["disk0"][1]
        run(io, "-f", "raw", "-c", "write -P 66 5M 512", base)
    await made.qemu.start(made.vm("old"), made.paths("old"), {})
    try:
        yield made
    finally:
        await made.qemu.kill(made.vm_id)
        await made.qemu.close()
        shutil.rmtree(root)


async def test_there_and_back_with_an_agent_that_dies_while_requests_are_held(host: Host) -> None:
    await host.io("write -P 1 0 1M")
    await host.io(f"write -P 2 {LAST} 512")
    await host.copied("old", "new")
    await host.io("write -P 3 1M 1M")
    await host.io("write -z 0 512")
    await host.io("discard 64k 64k")
    await host.qemu.hold_writes(host.vm_id, ("disk0",), 20.0)
    version = (await host.qemu._instance(host.vm_id)).qmp.version
    waits = version >= (8, 0, 0)
    if waits:
        await host.io("aio_write -P 4 2M 512")
    else:
        assert (await host.qemu.state(host.vm_id)).status == "paused"
    held = [(0, 0), (512, 1), (MIB, 3), (LAST, 2), (2 * MIB, 0)]
    before = (host.root / "held.copy").resolve()
    shutil.copytree(host.root / "new", before)  # what is on the disk now
    await host.new_agent()
    assert await host.qemu.release_writes(host.vm_id) == ()
    assert await host.qemu.release_writes(host.vm_id) == ()
    assert (await host.qemu.state(host.vm_id)).status == "running"
    assert await top_nodes((await host.qemu._instance(host.vm_id)).qmp) == {"disk0": "disk0-alt"}
    assert {name.split("-")[1] for name in await host.nodes()} == {"alt"}
    await host.io("write -P 5 3M 512")
    await host.copied("new", "back")
    await host.qemu.hold_writes(host.vm_id, ("disk0",), 20.0)
    assert await host.qemu.release_writes(host.vm_id) == ()
    await host.io("write -P 6 4M 512")
    assert not any("alt" in name for name in await host.nodes())
    await host.qemu.kill(host.vm_id)
    shutil.rmtree(host.root / "new")
    before.rename(host.root / "new")
    base = [(5 * MIB, 66)] if len(host.formats) > 1 else []
    host.holds("new", *held, *base)
    host.holds("back", *held[:4], (2 * MIB, 4 if waits else 0), (3 * MIB, 5), (4 * MIB, 6), *base)


async def test_whatever_was_begun_is_undone_and_the_old_image_goes_on(host: Host) -> None:
    await host.io("write -P 1 0 512")
    before = await host.nodes()
    await host.copied("old", "new")
    await host.qemu.hold_writes(host.vm_id, ("disk0",), 20.0)
    await host.new_agent()
    await host.qemu.undo_copies(host.vm_id, 20.0)
    await host.qemu.undo_copies(host.vm_id, 20.0)
    assert await host.nodes() == before
    assert (await host.qemu.state(host.vm_id)).status == "running"
    await host.io("write -P 7 1M 512")
    await host.qemu.kill(host.vm_id)
    host.holds("old", (0, 1), (MIB, 7))


async def test_a_new_image_that_is_full_costs_the_guest_nothing(
    binary: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = tmp_path_factory.mktemp("m")
    made = Host(binary, root, (QCOW2,))
    made.make("old")
    small = root / "small"
    small.mkdir()
    run("mount", "-t", "tmpfs", "-o", "size=4M", "small", small)
    try:
        await made.qemu.start(made.vm("old"), made.paths("old"), {})
        await made.io("write -P 1 0 8M")
        path = small / "0.qcow2"
        run(made.img, "create", "-q", "-f", "qcow2", path, str(SIZE_BYTES))
        await made.qemu.copy_disks(made.vm("new"), made.copies("old", "new"), {"disk0": (path,)}, 0, 60.0)

        assert "No space left" in await made.end_of_copy()
        with pytest.raises(HostError) as refused:
            await made.qemu.hold_writes(made.vm_id, ("disk0",), 5.0)
        assert refused.value.code == "mirror-failed"
        await made.qemu.undo_copies(made.vm_id, 20.0)
        await made.io("write -P 2 8M 512")
        assert (await made.qemu.state(made.vm_id)).status == "running"
    finally:
        await made.qemu.kill(made.vm_id)
        await made.qemu.close()
        run("umount", small)
    made.holds("old", (0, 1), (8 * MIB, 2))
