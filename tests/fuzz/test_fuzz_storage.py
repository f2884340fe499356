"""What storage servers answer, as libnfs and libiscsi hand it on: taken, or an error that the manual knows.

The libraries read the network; here stands what kvmhv reads of their answers, whatever a server has put into them.
"""

import asyncio
import ctypes
import errno
import tempfile
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmhv.config import Waits, from_data
from kvmhv.core import ownership
from kvmhv.core.ownership import Owner
from kvmhv.drivers.storage import iscsi, nfs
from kvmhv.drivers.storage.storage import Attached, Storage
from kvmhv.drivers.storage.volumes import LunVolume, NfsVolume
from kvmhv.errors import KvmhvError
from kvmhv.model import COUNT_MAX, Access
from kvmhv.places import Lun
from tests.fuzz import garble

WAITS = Waits(share_command_s=1.0, share_lock_s=0.02, share_answer_s=20.0)
SOON_S = 10.0
KNOWN = {
    *("file-exists", "disk-missing", "location-full", "ownership-locked", "path-invalid", "location-read-only"),
    *("location-unreachable", "location-silent"),
}
LUN = Lun(portal="p:3260", target="iqn.2024-01.test:vms", lun=1, initiator="iqn.2024-01.test:host1")
OWNER = ownership.encode(Owner(vm_id="id", vm="web01", host="host1", host_id="h", boot_id="b", epoch=3))
RECORD = LunVolume.MAGIC + len(OWNER).to_bytes(2, "big") + OWNER

answers = st.one_of(
    st.binary(max_size=40),
    st.sampled_from(
        (
            *(b"", bytes(12), b"\xff" * 16, bytes(4096), b"\xff" * 4096, (2**63 - 1).to_bytes(8, "big") + bytes(4)),
            *((2**20).to_bytes(8, "big") + (512).to_bytes(4, "big"), bytes(8) + (2**32 - 1).to_bytes(4, "big")),
            *((2**32 - 1).to_bytes(4, "big") + b"\x40" * 60, (24).to_bytes(4, "big") + bytes(28)),
        )
    ),
    st.sampled_from((RECORD, RECORD.ljust(512, b"\0"), LunVolume.MAGIC, LunVolume.MAGIC + b"\xff\xff{")).flatmap(
        garble.spoilt
    ),
)
statuses = st.sampled_from((iscsi.GOOD, iscsi.GOOD, iscsi.GOOD, iscsi.CHECK_CONDITION, iscsi.RESERVATION_CONFLICT, 40))


class LyingIscsi:
    """In the place of libiscsi: each command has the next of the answers."""

    def __init__(self, said: list[tuple[int, int, bytes]], error: bytes) -> None:
        self._said = said
        self._error = error
        self._kept: list[Any] = []

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name == "iscsi_get_error":
            return lambda _context: self._error
        if name.endswith("_sync") and name.removeprefix("iscsi_").removesuffix("_sync") in iscsi._COMMANDS:
            return lambda *_arguments: self._answer()
        return lambda *_arguments: 0

    def _answer(self) -> Any:
        if not self._said:
            return None
        status, key, data = self._said.pop()
        buffer = (ctypes.c_ubyte * max(1, len(data))).from_buffer_copy(data or b"\0")
        task = iscsi._Task(status=status)
        task.sense.key = key
        task.datain.size = len(data)
        task.datain.data = ctypes.cast(buffer, ctypes.POINTER(ctypes.c_ubyte))
        self._kept += [buffer, task]
        return ctypes.pointer(task)


class LyingNfs:
    """In the place of libnfs."""

    def __init__(self, results: list[int], data: bytes, error: bytes | None) -> None:
        self._results = results
        self._data = data
        self._error = error

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *arguments: self._call(name, arguments)

    def _call(self, name: str, arguments: tuple[Any, ...]) -> Any:
        if name == "nfs_get_error":
            return self._error
        if name in ("nfs_init_context", "nfs_mount"):
            return 0
        target = arguments[-1]
        if name in ("nfs_statvfs", "nfs_stat64", "nfs_pread"):
            where = target if name != "nfs_stat64" else target._obj
            ctypes.memmove(ctypes.addressof(where), self._data, min(len(self._data), ctypes.sizeof(where)))
            if name == "nfs_pread":
                return min(len(self._data), ctypes.sizeof(where))
        if name == "nfs_pwrite":  # never more than was asked for, as pwrite(2)
            return max(-1, min(self._next(), 1))
        return self._next()

    def _next(self) -> int:
        return self._results.pop() if self._results else 0


def _ask(volume: Any, name: str, content: bytes | None) -> None:
    """Ask all that kvmhv asks; each answer is taken or a known error, and what is shown of it is JSON."""
    asked: tuple[Callable[[], Any], ...] = (
        volume.space,
        lambda: volume.read_record(name),
        lambda: volume.swap_record(name, content, b"new"),
        lambda: volume.swap_record(name, None, None),
        lambda: volume.identity("2"),
        lambda: volume.exists("2"),
        lambda: volume.used("2"),
        lambda: volume.reserve("2", b"head", 4096),
        lambda: volume.remove("2"),
    )

    async def ask() -> None:
        with tempfile.TemporaryDirectory() as directory:
            config = from_data({"state_dir": directory, "waits": msgspec.to_builtins(WAITS)}, "test")
            storage = Storage(config)
            storage.attach("share", Attached("nfs", volume, "hint", Access.USER, "share"))
            for one in asked:
                try:
                    msgspec.json.encode(await storage.ask("share", one))
                except KvmhvError as error:
                    assert error.code in KNOWN
            (shown,) = (location for location in await storage.locations() if location.name == "share")
            assert max(shown.free_bytes, shown.total_bytes) <= COUNT_MAX
            storage.detach("share")

    begun_s = time.monotonic()
    asyncio.run(ask())
    assert time.monotonic() - begun_s < SOON_S


@given(st.lists(st.tuples(statuses, st.sampled_from((0, 6, 5)), answers), max_size=30), st.binary(max_size=20))
@settings(max_examples=150 if settings.default.max_examples < 1000 else 2000)
def test_a_target_s_answers(said: list[tuple[int, int, bytes]], error: bytes) -> None:
    with mock.patch.object(iscsi, "_load", lambda: LyingIscsi(said, error)):
        _ask(LunVolume(LUN, "", lambda record: ownership.is_of(record, "h"), WAITS), "7", OWNER)


@given(
    st.lists(
        st.sampled_from((0, 0, 0, 1, -errno.ENOENT, -errno.EEXIST, -errno.EIO, -errno.ENOSPC, -1, -(2**31))),
        max_size=30,
    ),
    st.one_of(answers, st.just(b"\xff" * 600), st.just(OWNER)),
    st.one_of(st.none(), st.binary(max_size=20)),
)
@settings(max_examples=150 if settings.default.max_examples < 1000 else 2000)
def test_an_nfs_server_s_answers(results: list[int], data: bytes, error: bytes | None) -> None:
    with mock.patch.object(nfs, "_load", lambda: (LyingNfs(results, data, error), False)):
        _ask(NfsVolume("server", "/vms", WAITS), "web01/disk0.raw.owner", OWNER)
