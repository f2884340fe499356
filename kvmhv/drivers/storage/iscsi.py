"""LUNs of an iSCSI target through libiscsi, the library that QEMU's own iSCSI driver uses.

Disks are QEMU's to read and write; here are only what a LUN is, and the small records on the records LUN. A record is
changed under a reservation of that LUN (RESERVE(6)), which ends with the session, so a host that dies holds nothing up.
COMPARE AND WRITE would be one step, but tgt does not know it. Every command ends in time; all raise OSError.
"""

import ctypes
import errno
import math
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager

from kvmhv.config import Waits
from kvmhv.model import COUNT_MAX
from kvmhv.places import Lun

LIBRARIES = ("libiscsi.so.7", "libiscsi.so.8", "libiscsi.so.9", "libiscsi.so.10")
SESSION_NORMAL = 2
GOOD, CHECK_CONDITION, RESERVATION_CONFLICT = 0x00, 0x02, 0x18
UNIT_ATTENTION = 0x06
ATTENTIONS_MAX = 4
"""A LUN tells a new session first that something has happened (it was reset, say), once for each event."""
RESERVE_AGAIN_S = 0.05
VPD_IDENTIFICATION = 0x83
INQUIRY_BYTES = 255


BLOCKS = frozenset(512 << doubled for doubled in range(8))
LUN_MASK = 0x3FFF


class _Sense(ctypes.Structure):
    _fields_ = [
        ("error_type", ctypes.c_ubyte),
        ("key", ctypes.c_int),
        ("ascq", ctypes.c_int),
        ("flags", ctypes.c_uint, 3),
        ("bit_pointer", ctypes.c_ubyte),
        ("field_pointer", ctypes.c_uint16),
    ]


class _Data(ctypes.Structure):
    _fields_ = [("size", ctypes.c_int), ("data", ctypes.POINTER(ctypes.c_ubyte))]


class _Task(ctypes.Structure):
    """The beginning of libiscsi's struct scsi_task (scsi-lowlevel.h)."""

    _fields_ = [
        ("status", ctypes.c_int),
        ("cdb_size", ctypes.c_int),
        ("xfer_dir", ctypes.c_int),
        ("expxferlen", ctypes.c_int),
        ("cdb", ctypes.c_ubyte * 16),
        ("residual_status", ctypes.c_int),
        ("residual", ctypes.c_size_t),
        ("sense", _Sense),
        ("datain", _Data),
    ]


_TASK = ctypes.POINTER(_Task)
_COMMANDS = ("inquiry", "read16", "write16", "reserve6", "release6", "reportluns", "readcapacity16")


def _load() -> ctypes.CDLL:
    for name in LIBRARIES:
        try:
            library = ctypes.CDLL(name)
        except OSError:
            continue
        library.iscsi_create_context.restype = ctypes.c_void_p
        library.iscsi_get_error.restype = ctypes.c_char_p
        for command in _COMMANDS:
            getattr(library, f"iscsi_{command}_sync").restype = _TASK
        return library
    raise OSError(errno.ENOPKG, "there is no libiscsi on this host (Debian: qemu-block-extra brings it)")


def _unpacked(form: str, data: bytes, at: int = 0) -> tuple[int, ...]:
    """Read what a target has answered. Raises OSError if it is too short."""
    try:
        return struct.unpack_from(form, data, at)
    except struct.error as error:
        raise OSError(errno.EIO, f"the target's answer cannot be read: {error}") from error


class Target:
    """A session with one target. Make it with `connected`."""

    def __init__(self, library: ctypes.CDLL, context: ctypes.c_void_p, reserve_s: float) -> None:
        """`reserve_s`: so long another host may have the records LUN, which it holds for some milliseconds."""
        self._library = library
        self._context = context
        self._reserve_s = reserve_s

    def _error(self) -> str:
        said = self._library.iscsi_get_error(self._context)
        return (said or b"no answer").decode(errors="replace").strip()

    def _run(self, command: str, *arguments: object) -> bytes:
        """Return what a command read. Raises PermissionError when another initiator has reserved the LUN."""
        for _ in range(ATTENTIONS_MAX):
            task = getattr(self._library, f"iscsi_{command}_sync")(self._context, *arguments)
            if not task:
                break
            try:
                found = task.contents
                if found.status == GOOD:
                    there = found.datain.size > 0 and found.datain.data
                    return bytes(found.datain.data[: found.datain.size]) if there else b""
                if found.status == RESERVATION_CONFLICT:
                    raise PermissionError(errno.EACCES, f"{command}: another initiator has reserved the LUN")
                if found.status != CHECK_CONDITION or found.sense.key != UNIT_ATTENTION:
                    break
            finally:
                self._library.scsi_free_scsi_task(task)
        raise OSError(errno.EIO, f"{command}: {self._error()}")

    def capacity(self, lun: int) -> tuple[int, int]:
        """Return (bytes, bytes of a block) of a LUN."""
        last, block = _unpacked(">QI", self._run("readcapacity16", lun))
        if block not in BLOCKS or (last + 1) * block > COUNT_MAX:
            raise OSError(errno.EIO, f"readcapacity16: {last + 1} blocks of {block} bytes are no LUN")
        return (last + 1) * block, block

    def luns(self) -> tuple[int, ...]:
        """Return the numbers of the target's LUNs (flat addressing)."""
        data = self._run("reportluns", 0, 4096)
        (length,) = _unpacked(">I", data)
        length -= length % 8
        places = range(8, min(length, len(data) - 8) + 8, 8)
        numbers = {_unpacked(">H", data, at)[0] & LUN_MASK for at in places}
        return tuple(sorted(numbers))

    def identity(self, lun: int) -> str:
        """Return the LUN's own name, the same through every path and from every host (VPD page 0x83)."""
        data = self._run("inquiry", lun, 1, VPD_IDENTIFICATION, INQUIRY_BYTES)
        return data[4:].hex()

    def read(self, lun: int, block: int, block_bytes: int) -> bytes:
        """Return one block, after whoever has the LUN reserved for a moment."""
        return self._patiently("read16", lun, ctypes.c_uint64(block), block_bytes, block_bytes, 0, 0, 0, 0, 0)

    def swap(self, lun: int, block: int, old: bytes, new: bytes) -> bool:
        """Write one block if it holds `old`, else return False: nobody else writes to the LUN meanwhile."""
        self._patiently("reserve6", lun)
        try:
            if self.read(lun, block, len(old)) != old:
                return False
            content = (ctypes.c_ubyte * len(new)).from_buffer_copy(new)
            force_unit_access = 1
            self._run(
                "write16", lun, ctypes.c_uint64(block), content, len(new), len(new), 0, 0, force_unit_access, 0, 0
            )
            return True
        finally:
            self._run("release6", lun)

    def _patiently(self, command: str, *arguments: object) -> bytes:
        deadline = time.monotonic() + self._reserve_s
        while True:
            try:
                return self._run(command, *arguments)
            except PermissionError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(RESERVE_AGAIN_S)


@contextmanager
def connected(lun: Lun, secret: str, waits: Waits) -> Iterator[Target]:
    """Log in for a few commands. Raises OSError."""
    library = _load()
    context = ctypes.c_void_p(library.iscsi_create_context(lun.initiator.encode()))
    try:
        library.iscsi_set_targetname(context, lun.target.encode())
        library.iscsi_set_session_type(context, SESSION_NORMAL)
        if lun.user:
            library.iscsi_set_initiator_username_pwd(context, lun.user.encode(), secret.encode())
        library.iscsi_set_timeout(context, math.ceil(waits.share_command_s))
        library.iscsi_set_noautoreconnect(context, 1)
        target = Target(library, context, waits.share_lock_s)
        if library.iscsi_full_connect_sync(context, lun.portal.encode(), lun.lun):
            raise OSError(errno.ECONNREFUSED, f"{lun.target} at {lun.portal} cannot be used: {target._error()}")
        yield target
        library.iscsi_logout_sync(context)
    finally:
        library.iscsi_destroy_context(context)
