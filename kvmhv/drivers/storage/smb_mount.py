"""An SMB share as a directory, for hosts whose kernel has no cifs: `python -m kvmhv.drivers.storage.smb_mount FILE`.

FILE is a MountFile as JSON. The program serves the mount (FUSE) until it is unmounted; it is a process of its own, so
that mount and VMs outlive the agent. Nothing is cached anywhere: every read and write of QEMU is one at the server
(direct_io, no attribute cache), a write is on the server's disk when it is done (write-through: a flush on a new
connection could not tell that the server's host lost it), a flush is an SMB2 FLUSH. The connection is signed and
encrypted (SMB 3).

When the server is away, operations wait and are tried again on a new connection, for `patience_s`; then they fail with
EIO, and QEMU stops the guest. All of them can be repeated: a write names its place, and what was made or removed by the
lost attempt is taken for success. A QEMU that is killed meanwhile stays until its last operation has ended, so that no
write can reach the share after its process is gone.
"""

import errno
import os
import stat
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import mfusepy
import msgspec
import smbclient
from smbprotocol.exceptions import SMBException, SMBOSError
from smbprotocol.open import CreateOptions

from kvmhv.drivers.storage.smb_connection import MountFile
from kvmhv.drivers.storage.smb_share import Share, say

BLOCK_BYTES = 4096
CREDIT_BYTES = 64 * 1024
"""What one credit of the server's allows in one request (MS-SMB2 3.1.5.2)."""


class Handle:
    """An open file, opened again on a new connection."""

    def __init__(self, path: str, mode: str) -> None:
        self.path = path
        self.mode = mode
        self.lock = threading.Lock()
        self.raw: Any = None
        self.generation = -1


class SmbFiles(mfusepy.Operations):
    """The file system: what QEMU, qemu-img and the agent need of one, and no more."""

    use_ns = True

    def __init__(self, share: Share) -> None:
        self._share = share
        self._handles: dict[int, Handle] = {}
        self._next = 1
        self._lock = threading.Lock()

    # --- names

    def getattr(self, path: str, fh: int | None = None) -> dict[str, Any]:
        """stat(2)."""
        return self._share.again(lambda _again: self._attributes(path))

    def _attributes(self, path: str) -> dict[str, Any]:
        found = smbclient.stat(self._share.remote(path) or "\\", **self._share.options())
        directory = stat.S_ISDIR(found.st_mode)
        return {
            "st_mode": (stat.S_IFDIR | 0o700) if directory else (stat.S_IFREG | 0o600),
            "st_nlink": 1,
            "st_size": 0 if directory else found.st_size,
            "st_blocks": -(-getattr(found, "st_allocation_size", found.st_size) // 512),
            "st_blksize": BLOCK_BYTES,
            "st_uid": os.getuid(),
            "st_gid": os.getgid(),
            "st_mtime": int(found.st_mtime * 10**9),
            "st_ctime": int(found.st_mtime * 10**9),
            "st_atime": int(found.st_mtime * 10**9),
        }

    def readdir(self, path: str, fh: int) -> Iterator[str]:
        """List a directory."""
        remote = self._share.remote(path)
        names = self._share.again(lambda _again: smbclient.listdir(remote, **self._share.options()))
        yield from (".", "..", *names)

    def mkdir(self, path: str, mode: int) -> int:
        """mkdir(2)."""
        return self._make(lambda: smbclient.mkdir(self._share.remote(path), **self._share.options()), errno.EEXIST)

    def rmdir(self, path: str) -> int:
        """rmdir(2)."""
        return self._make(lambda: smbclient.rmdir(self._share.remote(path), **self._share.options()), errno.ENOENT)

    def unlink(self, path: str) -> int:
        """unlink(2)."""
        return self._make(lambda: smbclient.remove(self._share.remote(path), **self._share.options()), errno.ENOENT)

    def rename(self, old: str, new: str) -> int:
        """rename(2), which replaces."""
        source, target = self._share.remote(old), self._share.remote(new)
        return self._make(lambda: smbclient.replace(source, target, **self._share.options()), errno.ENOENT)

    def _make(self, act: Callable[[], object], done_before: int) -> int:
        """Do it; repeated on a new connection, its having been done already is success."""

        def attempt(again: bool) -> int:
            try:
                act()
            except SMBOSError as error:
                if not (again and error.errno == done_before):
                    raise
            return 0

        return self._share.again(attempt)

    def chmod(self, path: str, mode: int) -> int:
        """Modes are the server's to say."""
        return 0

    def chown(self, path: str, uid: int, gid: int) -> int:
        """Owners are the server's to say."""
        return 0

    def utimens(self, path: str, times: tuple[int, int] | None = None) -> int:
        """Times are the server's to say."""
        return 0

    def statfs(self, path: str) -> dict[str, int]:
        """Space of the share."""
        remote = self._share.remote("")
        found = self._share.again(lambda _again: smbclient.stat_volume(remote, **self._share.options()))
        return {
            "f_bsize": BLOCK_BYTES,
            "f_frsize": BLOCK_BYTES,
            "f_blocks": found.total_size // BLOCK_BYTES,
            "f_bfree": found.actual_available_size // BLOCK_BYTES,
            "f_bavail": found.caller_available_size // BLOCK_BYTES,
            "f_namemax": 255,
        }

    # --- contents

    def create(self, path: str, mode: int, fi: Any = None) -> int:
        """Make a file: it must not be there (the kernel has looked; two hosts may try at once)."""
        handle = Handle(path, "r+b")

        def attempt(again: bool) -> None:
            try:
                made = self._open_raw(path, "xb")
            except SMBOSError as error:
                if not (again and error.errno == errno.EEXIST):
                    raise
            else:
                made.close()

        self._share.again(attempt)
        return self._keep(handle)

    def open(self, path: str, flags: int) -> int:
        """Open a file that is there."""
        writes = flags & os.O_ACCMODE != os.O_RDONLY
        handle = Handle(path, "r+b" if writes else "rb")
        self._share.again(lambda _again: self._opened(handle))
        if flags & os.O_TRUNC:
            self.truncate(path, 0, None)
        return self._keep(handle)

    def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
        """pread(2)."""
        handle = self._handles[fh]
        parts = []
        for at in range(offset, offset + size, CREDIT_BYTES):
            part = self._share.again(partial(self._read, handle, at, min(CREDIT_BYTES, offset + size - at)))
            parts.append(part)
            if not part:
                break
        return b"".join(parts)

    def _read(self, handle: Handle, offset: int, size: int, _again: bool) -> bytes:
        raw = self._opened(handle)
        end = raw.fd.end_of_file
        if offset + size > end:  # the file may have grown since it was opened
            end = self._attributes(handle.path)["st_size"]
        wanted = min(size, end - offset)
        return bytes(raw.fd.read(offset, wanted)) if wanted > 0 else b""

    def write(self, path: str, data: bytes, offset: int, fh: int) -> int:
        """pwrite(2): at the server when it returns."""
        handle = self._handles[fh]
        for at in range(0, len(data), CREDIT_BYTES):
            self._share.again(partial(self._write, handle, data[at : at + CREDIT_BYTES], offset + at))
        return len(data)

    def _write(self, handle: Handle, data: bytes, offset: int, _again: bool) -> None:
        self._opened(handle).fd.write(data, offset, write_through=True)

    def truncate(self, path: str, length: int, fh: int | None = None) -> int:
        """truncate(2); others may have the file open."""

        def attempt(_again: bool) -> int:
            raw = self._open_raw(path, "r+b")
            try:
                raw.truncate(length)
            finally:
                raw.close()
            return 0

        return self._share.again(attempt)

    def fsync(self, path: str, datasync: int, fh: int) -> int:
        """SMB2 FLUSH: on the server's disk when it returns.

        After a lost connection the new one flushes the same file: what the server had taken is flushed too.
        """
        handle = self._handles[fh]
        self._share.again(lambda _again: self._opened(handle).fd.flush())
        return 0

    def flush(self, path: str, fh: int) -> int:
        """Nothing is held back that a close could write."""
        return 0

    def release(self, path: str, fh: int) -> int:
        """Close; the server closes what is lost with a connection."""
        handle = self._handles.pop(fh)
        with handle.lock:
            if handle.raw is not None and handle.generation == self._share.generation:
                try:
                    handle.raw.close()
                except (SMBException, OSError, ValueError) as error:
                    say(f"close of {path}: {error!r}")
        return 0

    def _keep(self, handle: Handle) -> int:
        with self._lock:
            number = self._next
            self._next += 1
            self._handles[number] = handle
        return number

    def _opened(self, handle: Handle) -> Any:
        with handle.lock:
            if handle.raw is None or handle.generation != self._share.generation:
                generation = self._share.generation
                handle.raw = self._open_raw(handle.path, handle.mode)
                handle.generation = generation
            return handle.raw

    def _open_raw(self, path: str, mode: str) -> Any:
        return smbclient.open_file(
            self._share.remote(path),
            mode=mode,
            buffering=0,
            share_access="rwd",
            create_options=CreateOptions.FILE_WRITE_THROUGH,
            **self._share.options(),
        )


def main() -> int:
    """Connect once, so that a wrong password is an error here and now; then serve the mount."""
    config = msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=MountFile)
    share = Share(config)
    try:
        share.connect()
        smbclient.stat(share.remote(""), **share.options())
    except (SMBException, OSError, ValueError) as error:
        say(f"cannot use //{config.server}/{config.share} as {config.user}: {error}")
        return 1
    mfusepy.FUSE(
        SmbFiles(share),
        config.mountpoint,
        foreground=True,
        fsname=f"//{config.server}/{config.share}",
        subtype="kvmhv-smb",
        direct_io=True,
        attr_timeout=0,
        entry_timeout=0,
        negative_timeout=0,
        default_permissions=True,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
