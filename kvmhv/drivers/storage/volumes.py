"""What a location is made of, one class a way to reach it: files of a directory, files of an NFS export, LUNs.

A volume says where QEMU finds an image, makes and removes images, and keeps small *records* beside them (who runs the
VM; what proves that two hosts see the same storage). A record is changed by `swap_record`: only if it still is what the
caller has read, whoever else tries on whichever host. Methods block, end within their clients' deadlines (a directory
has none: the caller watches it) and raise OSError.
"""

import contextlib
import errno
import os
import shutil
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from kvmhv.config import Waits
from kvmhv.drivers.storage import iscsi, nfs
from kvmhv.places import DiskPlace, Lun, NfsImage

RECORD_BYTES_MAX = 500
"""A record fits one block of a LUN."""
LOCK_AGAIN_S = 0.05
OWNER_SUFFIX = ".owner"


class Volume(Protocol):
    """One location's storage. Paths and names of records are relative to it."""

    def place(self, path: str) -> DiskPlace:
        """Return where QEMU finds an image."""
        ...

    def space(self) -> tuple[int, int]:
        """Return (free, total) bytes."""
        ...

    def owner_record(self, path: str) -> str:
        """Return the name of the record that says who owns an image."""
        ...

    def read_record(self, name: str) -> bytes | None:
        """Return a record, None if there is none."""
        ...

    def swap_record(self, name: str, old: bytes | None, new: bytes | None) -> bool:
        """Change a record (None: there is none) if it is still `old`; False: it is not. On stable storage on return."""
        ...

    def break_lock(self, name: str) -> None:
        """Let a record's lock go that a host holds which has died; no error if there is none."""
        ...

    def identity(self, path: str) -> str:
        """Return an image's own name that does not depend on the path to it; empty where there is none."""
        ...


class ImageVolume(Volume, Protocol):
    """A volume whose images are not files of this host."""

    def exists(self, path: str) -> bool:
        """Whether an image is there already (a LUN: whether somebody owns it)."""
        ...

    def reserve(self, path: str, head: bytes, size_bytes: int) -> None:
        """Make an image of this length that begins with `head`. Raises FileExistsError; ENOSPC: a LUN is too small.

        A LUN is there already: whoever makes an image on it owns it before.
        """
        ...

    def used(self, path: str) -> int:
        """Return an image's allocated bytes."""
        ...

    def remove(self, path: str) -> None:
        """Remove an image (a LUN's content stays, and so does a record of another host), no error if it is gone."""
        ...


def _swap_under_lock(
    name: str,
    patience_s: float,
    lock: Callable[[str], bool],
    unlock: Callable[[str], None],
    swap: Callable[[], bool],
) -> bool:
    """Swap while this host alone has the file NAME.lock. Raises OSError EBUSY when another host does not let go."""
    deadline = time.monotonic() + patience_s
    while not lock(f"{name}.lock"):
        if time.monotonic() > deadline:
            raise OSError(errno.EBUSY, f"{name}.lock is held by another host")
        time.sleep(LOCK_AGAIN_S)
    try:
        return swap()
    finally:
        unlock(f"{name}.lock")


class DirectoryVolume:
    """A directory of this host, which may be a mount."""

    def __init__(self, root: Path, waits: Waits) -> None:
        self.root = root
        self._lock_s = waits.share_lock_s

    def place(self, path: str) -> DiskPlace:
        """Return the file."""
        return self.root / path

    def space(self) -> tuple[int, int]:
        """Return (free, total) bytes."""
        found = shutil.disk_usage(self.root)
        return found.free, found.total

    def owner_record(self, path: str) -> str:
        """Beside the image."""
        return path + OWNER_SUFFIX

    def read_record(self, name: str) -> bytes | None:
        """Return a record."""
        try:
            return (self.root / name).read_bytes()[:RECORD_BYTES_MAX]
        except FileNotFoundError:
            return None

    def swap_record(self, name: str, old: bytes | None, new: bytes | None) -> bool:
        """Change a record."""

        def lock(lock_name: str) -> bool:
            return self._create(self.root / lock_name, b"")

        def unlock(lock_name: str) -> None:
            (self.root / lock_name).unlink(missing_ok=True)

        return _swap_under_lock(name, self._lock_s, lock, unlock, lambda: self._swap(name, old, new))

    def break_lock(self, name: str) -> None:
        """Remove the lock file."""
        (self.root / f"{name}.lock").unlink(missing_ok=True)

    def identity(self, path: str) -> str:
        """Files have none."""
        return ""

    def _swap(self, name: str, old: bytes | None, new: bytes | None) -> bool:
        if self.read_record(name) != old:
            return False
        file = self.root / name
        if new is None:
            file.unlink(missing_ok=True)
        else:
            fresh = file.with_name(f"{file.name}.new")
            fresh.unlink(missing_ok=True)
            self._create(fresh, new)
            fresh.replace(file)
        self._sync(file.parent)
        return True

    @staticmethod
    def _create(file: Path, content: bytes) -> bool:
        try:
            descriptor = os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW, 0o600)
        except FileExistsError:
            return False
        try:
            os.write(descriptor, content)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        return True

    @staticmethod
    def _sync(directory: Path) -> None:
        with contextlib.suppress(OSError):  # network file systems do not know it, and do not need it
            descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


class NfsVolume:
    """An NFS export without a mount: QEMU and kvmhv both use libnfs."""

    def __init__(self, server: str, export: str, waits: Waits) -> None:
        self._server = server
        self._waits = waits
        self._export = export.rstrip("/") or "/"

    def _connected(self) -> contextlib.AbstractContextManager[nfs.Export]:
        return nfs.connected(self._server, self._export, self._waits.share_command_s)

    def place(self, path: str) -> DiskPlace:
        """Return the file as QEMU's driver finds it."""
        whole = f"{self._export.rstrip('/')}/{path}"
        return NfsImage(server=self._server, path=whole, user=os.getuid(), group=os.getgid())

    def space(self) -> tuple[int, int]:
        """Return (free, total) bytes."""
        with self._connected() as export:
            return export.space()

    def owner_record(self, path: str) -> str:
        """Beside the image."""
        return path + OWNER_SUFFIX

    def read_record(self, name: str) -> bytes | None:
        """Return a record."""
        with self._connected() as export:
            return export.read(f"/{name}", RECORD_BYTES_MAX)

    def swap_record(self, name: str, old: bytes | None, new: bytes | None) -> bool:
        """Change a record."""
        with self._connected() as export:

            def lock(lock_name: str) -> bool:
                try:
                    export.make(f"/{lock_name}", b"")
                except FileExistsError:
                    return False
                return True

            def swap() -> bool:
                if export.read(f"/{name}", RECORD_BYTES_MAX) != old:
                    return False
                if new is None:
                    export.unlink(f"/{name}")
                else:
                    export.unlink(f"/{name}.new")
                    export.make(f"/{name}.new", new)
                    export.rename(f"/{name}.new", f"/{name}")
                return True

            return _swap_under_lock(
                name, self._waits.share_lock_s, lock, lambda lock_name: export.unlink(f"/{lock_name}"), swap
            )

    def break_lock(self, name: str) -> None:
        """Remove the lock file."""
        with self._connected() as export:
            export.unlink(f"/{name}.lock")

    def identity(self, path: str) -> str:
        """Files have none."""
        return ""

    def exists(self, path: str) -> bool:
        """Whether the file is there."""
        with self._connected() as export:
            try:
                export.sizes(f"/{path}")
            except FileNotFoundError:
                return False
            return True

    def reserve(self, path: str, head: bytes, size_bytes: int) -> None:
        """Make the file."""
        with self._connected() as export:
            export.make(f"/{path}", head, size_bytes)

    def used(self, path: str) -> int:
        """Return the file's allocated bytes."""
        with self._connected() as export:
            return export.sizes(f"/{path}")[1]

    def remove(self, path: str) -> None:
        """Remove the file, its record and its directory if that is empty then."""
        with self._connected() as export:
            export.unlink(f"/{path}{OWNER_SUFFIX}")
            export.unlink(f"/{path}")


class LunVolume:
    """An iSCSI target: an image is a LUN, its path the LUN's number. One small LUN keeps the records, a block each."""

    MAGIC = b"KVMHV1"
    FIRST_NONCE, NONCES = 4096, 1024
    """Blocks below are owners' records, by LUN."""

    def __init__(self, lun: Lun, secret: str, is_own: Callable[[bytes], bool], waits: Waits) -> None:
        """`lun`: the records LUN; `is_own`: whether a record is of this host."""
        self._records = lun
        self._secret = secret
        self._waits = waits
        self._is_own = is_own

    @contextmanager
    def _connected(self) -> Iterator[iscsi.Target]:
        with iscsi.connected(self._records, self._secret, self._waits) as target:
            yield target

    def _lun(self, path: str) -> int:
        number = int(path) if path.isascii() and path.isdecimal() and len(path) <= 5 else -1
        if not 0 <= number < self.FIRST_NONCE or number == self._records.lun:
            raise OSError(errno.EINVAL, f"{path!r} is no number of a LUN for disks")
        return number

    def place(self, path: str) -> DiskPlace:
        """Return the LUN."""
        it = self._records
        return Lun(
            portal=it.portal,
            target=it.target,
            lun=self._lun(path),
            initiator=it.initiator,
            user=it.user,
            secret_file=it.secret_file,
        )

    def space(self) -> tuple[int, int]:
        """Return (bytes of LUNs that nobody owns, bytes of all)."""
        free = total = 0
        with self._connected() as target:
            block_bytes = target.capacity(self._records.lun)[1]
            for lun in target.luns():
                if lun in (0, self._records.lun):
                    continue
                capacity = target.capacity(lun)[0]
                total += capacity
                block = target.read(self._records.lun, lun, block_bytes)
                free += capacity if self._content(block) is None else 0
        return free, total

    def owner_record(self, path: str) -> str:
        """Its number is the block of its record."""
        return path

    def _block(self, name: str) -> int:
        return int(name) if name.isdecimal() else self.FIRST_NONCE + zlib.crc32(name.encode()) % self.NONCES

    def _content(self, block: bytes) -> bytes | None:
        if not block.startswith(self.MAGIC):
            return None
        start = len(self.MAGIC) + 2
        length = int.from_bytes(block[len(self.MAGIC) : start], "big")
        return block[start : start + length]

    def _packed(self, content: bytes | None, block_bytes: int) -> bytes:
        if content is None:
            return bytes(block_bytes)
        assert len(content) <= RECORD_BYTES_MAX
        return (self.MAGIC + len(content).to_bytes(2, "big") + content).ljust(block_bytes, b"\0")

    def read_record(self, name: str) -> bytes | None:
        """Return a record."""
        with self._connected() as target:
            block_bytes = target.capacity(self._records.lun)[1]
            return self._content(target.read(self._records.lun, self._block(name), block_bytes))

    def swap_record(self, name: str, old: bytes | None, new: bytes | None) -> bool:
        """Change a record."""
        lun, block = self._records.lun, self._block(name)
        with self._connected() as target:
            block_bytes = target.capacity(lun)[1]
            there = target.read(lun, block, block_bytes)
            if self._content(there) != old:
                return False
            return target.swap(lun, block, there, self._packed(new, block_bytes))

    def break_lock(self, name: str) -> None:
        """A reservation ends with the session of the host that had it."""

    def identity(self, path: str) -> str:
        """Return the LUN's own name."""
        with self._connected() as target:
            return target.identity(self._lun(path))

    def capacity(self, path: str) -> int:
        """Return the LUN's bytes."""
        with self._connected() as target:
            return target.capacity(self._lun(path))[0]

    def exists(self, path: str) -> bool:
        """Whether somebody owns the LUN."""
        return self.read_record(path) is not None

    def reserve(self, path: str, head: bytes, size_bytes: int) -> None:
        """Check that the LUN is large enough; what is to stand on it is QEMU's to write."""
        if self.capacity(path) < max(size_bytes, len(head)):
            raise OSError(errno.ENOSPC, f"LUN {path} has {self.capacity(path)} bytes, {size_bytes} are needed")

    def used(self, path: str) -> int:
        """A LUN is allocated whole."""
        return self.capacity(path)

    def remove(self, path: str) -> None:
        """Let the LUN go: its content stays, its record goes if it is this host's."""
        name = str(self._lun(path))
        old = self.read_record(name)
        if old is not None and self._is_own(old):
            self.swap_record(name, old, None)
