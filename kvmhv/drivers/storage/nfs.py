"""Small files of an NFS export through libnfs, the library that QEMU's own NFS driver uses.

Disks are QEMU's to read and write; here are only their making and removal, space, and the small records beside them.
Every call makes a connection of its own, ends in time, and raises OSError. Paths begin with `/`.
"""

import ctypes
import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

from kvmhv.model import COUNT_MAX

LIBRARIES = ("libnfs.so.14", "libnfs.so.13", "libnfs.so.16")
NEW_ORDER = "libnfs.so.16"
"""From libnfs 6 on the buffer stands before count and offset."""
STATVFS_BYTES = 512
MODE_DIRECTORY, MODE_FILE = 0o700, 0o600

_Handle = ctypes.c_void_p


class _Stat(ctypes.Structure):
    _fields_ = [
        *[(name, ctypes.c_uint64) for name in ("dev", "ino", "mode", "nlink", "uid", "gid", "rdev")],
        *[(name, ctypes.c_uint64) for name in ("size", "blksize", "blocks", "atime", "mtime", "ctime")],
        *[(name, ctypes.c_uint64) for name in ("atime_ns", "mtime_ns", "ctime_ns", "used")],
    ]


def _load() -> tuple[ctypes.CDLL, bool]:
    for name in LIBRARIES:
        try:
            library = ctypes.CDLL(name)
        except OSError:
            continue
        library.nfs_init_context.restype = ctypes.c_void_p
        library.nfs_get_error.restype = ctypes.c_char_p
        return library, name == NEW_ORDER
    raise OSError(errno.ENOPKG, "there is no libnfs on this host (Debian: qemu-block-extra brings it)")


class Export:
    """A connection to one export of one server. Make it with `connected`."""

    def __init__(self, library: ctypes.CDLL, context: ctypes.c_void_p, new_order: bool) -> None:
        self._library = library
        self._context = context
        self._new_order = new_order

    def _call(self, function: str, *arguments: object) -> int:
        result = int(getattr(self._library, function)(self._context, *arguments))
        if result < 0:
            said = self._library.nfs_get_error(self._context)
            number = -result if -result in errno.errorcode else errno.EIO
            raise OSError(number, (said or os.strerror(number).encode()).decode(errors="replace"))
        return result

    @contextmanager
    def _open(self, path: str, flags: int) -> Iterator[ctypes.c_void_p]:
        handle = _Handle()
        self._call("nfs_open2", path.encode(), flags, MODE_FILE, ctypes.byref(handle))
        try:
            yield handle
        finally:
            self._library.nfs_close(self._context, handle)

    def space(self) -> tuple[int, int]:
        """Return (free, total) bytes."""
        found = ctypes.create_string_buffer(STATVFS_BYTES)
        self._call("nfs_statvfs", b"/", found)
        _bsize, fragment, blocks, _free, available = (ctypes.c_ulong * 5).from_buffer(found)
        return available * fragment, blocks * fragment

    def sizes(self, path: str) -> tuple[int, int]:
        """Return (length, allocated bytes) of a file."""
        found = _Stat()
        self._call("nfs_stat64", path.encode(), ctypes.byref(found))
        if max(found.size, found.used) > COUNT_MAX:
            raise OSError(errno.EIO, f"{path}: no file has {found.size} bytes")
        return found.size, found.used

    def make(self, path: str, content: bytes, size_bytes: int = 0) -> None:
        """Make a file that is not there yet (FileExistsError), with its directories; on the server's disk on return."""
        parents = path.strip("/").split("/")[:-1]
        for depth in range(len(parents)):
            try:
                self._call("nfs_mkdir2", ("/" + "/".join(parents[: depth + 1])).encode(), MODE_DIRECTORY)
            except FileExistsError:
                continue
        with self._open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR) as handle:
            if size_bytes:
                self._call("nfs_ftruncate", handle, ctypes.c_uint64(size_bytes))
            self._write(handle, content)

    def _write(self, handle: ctypes.c_void_p, content: bytes) -> None:
        done = 0
        while done < len(content):
            chunk = content[done : done + 65536]
            offset, count = ctypes.c_uint64(done), ctypes.c_uint64(len(chunk))
            order = (chunk, count, offset) if self._new_order else (offset, count, chunk)
            written = self._call("nfs_pwrite", handle, *order)
            if not 0 < written <= len(chunk):
                raise OSError(errno.EIO, f"the server says that it has written {written} of {len(chunk)} bytes")
            done += written
        self._call("nfs_fsync", handle)

    def read(self, path: str, limit_bytes: int) -> bytes | None:
        """Return a small file's content, None if it is not there."""
        buffer = ctypes.create_string_buffer(limit_bytes)
        offset, count = ctypes.c_uint64(0), ctypes.c_uint64(limit_bytes)
        order = (buffer, count, offset) if self._new_order else (offset, count, buffer)
        try:
            with self._open(path, os.O_RDONLY) as handle:
                read_bytes = self._call("nfs_pread", handle, *order)
                return buffer.raw[:read_bytes]
        except FileNotFoundError:
            return None

    def rename(self, source: str, target: str) -> None:
        """rename(2), which replaces."""
        self._call("nfs_rename", source.encode(), target.encode())

    def unlink(self, path: str) -> None:
        """Remove a file, and its directories as far as they are empty then; no error if it is not there."""
        try:
            self._call("nfs_unlink", path.encode())
        except FileNotFoundError:
            return
        parents = path.strip("/").split("/")[:-1]
        while parents:
            try:
                self._call("nfs_rmdir", ("/" + "/".join(parents)).encode())
            except OSError:  # not empty
                return
            parents.pop()


@contextmanager
def connected(server: str, export: str, timeout_s: float) -> Iterator[Export]:
    """Mount an export for a few calls, each of which ends within `timeout_s`. Raises OSError."""
    library, new_order = _load()
    context = ctypes.c_void_p(library.nfs_init_context())
    try:
        library.nfs_set_uid(context, os.getuid())
        library.nfs_set_gid(context, os.getgid())
        library.nfs_set_autoreconnect(context, 0)
        library.nfs_set_timeout(context, int(timeout_s * 1000))
        mounted = Export(library, context, new_order)
        try:
            mounted._call("nfs_mount", server.encode(), export.encode())
        except OSError as error:  # whatever its number: the export cannot be used at all
            said = error.strerror or "it does not answer"
            raise ConnectionError(errno.ECONNREFUSED, f"{server}:{export} cannot be mounted: {said}") from error
        yield mounted
    finally:
        library.nfs_destroy_context(context)
