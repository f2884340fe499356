"""The share that smb_mount.py serves: its operations are repeated on a new connection when theirs is lost.

An answer that says no is no lost connection.
"""

import errno
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

from smbprotocol.exceptions import SMBOSError, SMBResponseException

from kvmhv.drivers.storage.smb_connection import Connections, MountFile, connect

AGAIN_S = 0.5
SESSION_LOST = frozenset({0xC0000203, 0xC000035C, 0xC00000C9, 0xC0000128, 0xC000020C, 0xC0000008})
"""USER_SESSION_DELETED, NETWORK_SESSION_EXPIRED, NETWORK_NAME_DELETED, FILE_CLOSED, CONNECTION_DISCONNECTED, ..."""

ERRNO = {
    0xC0000022: errno.EACCES,  # ACCESS_DENIED, also of a share that is read-only for this user
    0xC00000A2: errno.EROFS,  # MEDIA_WRITE_PROTECTED
    0xC000007F: errno.ENOSPC,  # DISK_FULL
    0xC0000044: errno.EDQUOT,  # QUOTA_EXCEEDED
    0xC0000043: errno.EBUSY,  # SHARING_VIOLATION
    0xC0000056: errno.EBUSY,  # DELETE_PENDING
    0xC0000101: errno.ENOTEMPTY,  # DIRECTORY_NOT_EMPTY
    0xC0000033: errno.ENOENT,  # OBJECT_NAME_INVALID: no file can have this name
}
"""Answers for which smbclient has no number (MS-ERREF 2.3.1)."""

Result = TypeVar("Result")


class Share:
    """The connection to the server, made anew when it is lost."""

    def __init__(self, config: MountFile) -> None:
        self._config = config
        self._lock = threading.Lock()
        self._connections = Connections()
        self._client = uuid4()
        self._session_id = 0
        self.generation = 0

    def connect(self) -> None:
        """Connect and log in. Raises OSError, SMBException or ValueError."""
        config = self._config
        password = Path(config.secret_file).read_text()
        made = connect(config, password, self._client, self._session_id)
        self._connections, self._session_id = made

    def remote(self, path: str) -> str:
        """Return the UNC path of a path below the mount point."""
        return f"\\\\{self._config.server}\\{self._config.share}" + path.rstrip("/").replace("/", "\\")

    def options(self) -> dict[str, Any]:
        """What every call of smbclient needs to use this connection."""
        return {"port": self._config.port, "connection_cache": self._connections}

    def again(self, operation: Callable[[bool], Result]) -> Result:
        """Do it, on new connections for as long as the patience lasts; `operation` is told whether it is a repeat."""
        deadline = time.monotonic() + self._config.patience_s
        repeated = False
        while True:
            with self._lock:  # not while the connection is being made
                generation = self.generation
            try:
                return operation(repeated)
            except (SMBOSError, SMBResponseException) as error:  # the server has answered
                status = error.ntstatus if isinstance(error, SMBOSError) else error.status
                if status not in SESSION_LOST:
                    raise _answered(error, status) from error
                said: Exception = error
            except Exception as error:  # a connection that ends under smbprotocol can be any error
                said = error
            if time.monotonic() > deadline:
                say(f"given up: {said!r}")
                raise OSError(errno.EIO, str(said))
            if repeated:
                time.sleep(AGAIN_S)
            repeated = True
            self._reconnect(generation, said)

    def _reconnect(self, generation: int, why: Exception) -> None:
        with self._lock:
            if self.generation != generation:
                return  # somebody else has
            say(f"connection lost: {why!r}")
            self._connections.close()
            try:
                self.connect()
            except Exception:
                time.sleep(AGAIN_S)
                return
            self.generation += 1
            say("connected again")


def _answered(error: Exception, status: int) -> OSError:
    """Return the error number of a server's answer."""
    number = ERRNO.get(status) or getattr(error, "errno", None)
    if not number:
        say(f"the server's answer: {error}")
    return OSError(number or errno.EIO, str(error))


def say(text: str) -> None:
    """Write a line to the log."""
    sys.stderr.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
    sys.stderr.flush()
