"""One connection to an SMB server, as safe for writes as smbprotocol alone does not make it.

- Nothing is sent by halves. smbprotocol takes a message id for each part of a compound before it looks whether the next
  part has credit, and gives up in the middle. The server waits for those ids for ever: its window ends some 8192
  messages after the first of them, and no request is granted any more.
- No connection is made by the way: smbclient would make one without our password when it finds its own closed.
- A session that follows another one ends it first: what the server still had of it cannot be written afterwards.
"""

import contextlib
import errno
import math
import socket
import threading
import time
from collections.abc import Sequence
from typing import Any
from uuid import UUID

import msgspec
from smbprotocol.connection import Connection
from smbprotocol.exceptions import SMBConnectionClosed, SMBException
from smbprotocol.header import Commands, NtStatus
from smbprotocol.session import Session

PROBES = 2
CREDIT_AGAIN_S = 0.002


class MountFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the program has to know; the password stands in a file of its own."""

    server: str
    port: int
    share: str
    user: str
    secret_file: str
    mountpoint: str
    connect_s: float
    silence_s: float
    """A server that acknowledges nothing for so long is taken for gone."""
    patience_s: float
    """So long a request waits for a server that is away."""


class Connections(dict[str, Any]):
    """smbclient's cache of connections, which has the one that it was given or none."""

    def get(self, key: str, default: Any = None) -> Any:
        """Return the connection. Raises SMBConnectionClosed when it is lost."""
        found = super().get(key, default)
        if found is None or not found.transport.connected:
            raise SMBConnectionClosed("the connection is lost")
        return found

    def close(self) -> None:
        """Close the connection without a word over it, and wake all that wait for its answers."""
        for connection in self.values():
            _close(connection)


class Sender:
    """In the place of a connection's `_send`: waits until there is credit for all that is to be sent at once."""

    def __init__(self, connection: Any, previous_session: int) -> None:
        self._connection = connection
        self._send = connection._send
        self._previous_session = previous_session
        self._lock = threading.Lock()

    def __call__(self, messages: Sequence[Any], *arguments: Any, **options: Any) -> Any:
        """Send. Raises SMBException when the connection is lost or of no use any more."""
        if threading.current_thread() is self._connection._t_worker:  # which brings the credit
            return self._send(messages, *arguments, **options)
        for message in messages:
            if message.COMMAND == Commands.SMB2_SESSION_SETUP:
                message["previous_session_id"] = self._previous_session
        with self._lock:
            self._wait_for(sum(max(1, self._connection._calculate_credit_charge(message)) for message in messages))
            return self._send(messages, *arguments, **options)

    def _wait_for(self, credit: int) -> None:
        while self._connection.transport.connected:
            answers_to_come = self._answers_to_come()  # an answer's credit is there before the answer
            window = self._connection.sequence_window
            if window["high"] - window["low"] >= credit:
                return
            if not answers_to_come:
                raise SMBException(f"the server gives no credit for {credit} messages")
            time.sleep(CREDIT_AGAIN_S)

    def _answers_to_come(self) -> bool:
        answers = [request.response for request in list(self._connection.outstanding_requests.values())]
        return any(answer is None or answer["status"].get_value() == NtStatus.STATUS_PENDING for answer in answers)


def connect(to: MountFile, password: str, client: UUID, previous_session: int) -> tuple[Connections, int]:
    """Connect and log in, signed and encrypted; returns the connection and its session's id (0: there was none before).

    Raises OSError, SMBException or ValueError; then nothing is left.
    """
    connection = Connection(client, to.server, to.port, require_signing=True)
    try:
        connection.connect(timeout=to.connect_s)
        _give_up_in_time(connection.transport._sock, to.silence_s)
        connection._send = Sender(connection, previous_session)
        session = Session(
            connection, username=to.user, password=password, require_encryption=True, auth_protocol="ntlm"
        )
        session.connect()
    except BaseException as error:
        if connection.transport is not None:
            _close(connection)
        if isinstance(error, OSError | SMBException | ValueError) or not isinstance(error, Exception):
            raise
        # smbprotocol trips over an answer that is none: KeyError, TypeError, struct.error, ...
        raise ConnectionError(errno.EPROTO, f"{to.server} port {to.port} answers what is no SMB: {error!r}") from error
    return Connections({f"{to.server.lower()}:{to.port}": connection}), session.session_id


def _give_up_in_time(connected: socket.socket, silence_s: float) -> None:
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(silence_s * 1000))
    step_s = math.ceil(silence_s / (PROBES + 1))
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    times = (socket.TCP_KEEPIDLE, step_s), (socket.TCP_KEEPINTVL, step_s), (socket.TCP_KEEPCNT, PROBES)
    for option, value in times:
        connected.setsockopt(socket.IPPROTO_TCP, option, value)


def _close(connection: Any) -> None:
    with contextlib.suppress(SMBException, OSError, ValueError):
        connection.disconnect(close=False)
    # smbprotocol does so itself, unless a request comes in between.
    for request in list(connection.outstanding_requests.values()):
        request.response_event.set()
