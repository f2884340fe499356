"""HTTP to one agent, over its UNIX socket or TLS, by the standard library: importing aiohttp takes longer than asking.

Every request has its own connection and a deadline for each wait. What the agent refuses is raised as the KvmhvError
that it described; when nobody answers properly it is an AgentGone.
"""

import hashlib
import http.client
import socket
import ssl
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import BinaryIO, TypeVar, cast
from urllib.parse import urlencode

import msgspec

from kvmhv.cli import websocket
from kvmhv.cli.address import Address
from kvmhv.errors import CallerError, HostError, Refused, from_body
from kvmhv.model import ErrorBody

T = TypeVar("T")

CONNECT_TIMEOUT_S = 5.0
ANSWER_TIMEOUT_S = 60.0
ANSWER_LIMIT_BYTES = 64 * 1024 * 1024
LINE_LIMIT_BYTES = 4 * 1024 * 1024
CHUNK_BYTES = 256 * 1024


class AgentGone(HostError):
    """No proper answer came: whether the agent did what was asked is not known, except for `agent-unreachable`."""


class _Upgrade(http.client.HTTPResponse):
    """A response that reads not one byte too many: what follows its headers is another protocol's."""

    def __init__(self, sock: socket.socket, *args: object, **kwargs: object) -> None:
        super().__init__(sock, *args, **kwargs)  # type: ignore[arg-type]
        self.fp.close()
        self.fp = cast("BinaryIO", sock.makefile("rb", buffering=0))  # type: ignore[assignment]


class _Connection(http.client.HTTPConnection):
    """HTTP over whatever `connect` gives."""

    def __init__(self, address: Address, timeout_s: float) -> None:
        super().__init__("localhost" if address.server is None else address.server[0], timeout=timeout_s)
        self._address = address
        self._timeout_s = timeout_s

    def connect(self) -> None:
        """Connect. Raises OSError, or Refused `agent-untrusted`."""
        self.sock = _connect(self._address)
        self.sock.settimeout(self._timeout_s)


def _connect(address: Address) -> socket.socket:
    if address.server is not None:
        return _connect_tls(address, address.server)
    plain = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        plain.settimeout(CONNECT_TIMEOUT_S)
        plain.connect(str(address.socket))
    except BaseException:
        plain.close()
        raise
    return plain


def _connect_tls(address: Address, server: tuple[str, int]) -> socket.socket:
    context = ssl.create_default_context()
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    if address.fingerprint is not None:  # the pin says more than any name or authority
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    plain = socket.create_connection(server, timeout=CONNECT_TIMEOUT_S)
    try:
        secure = context.wrap_socket(plain, server_hostname=server[0])
    except BaseException:
        plain.close()
        raise
    found = hashlib.sha256(secure.getpeercert(binary_form=True) or b"").hexdigest()
    if address.fingerprint not in (None, found):
        secure.close()
        raise Refused(
            "agent-untrusted",
            f"the certificate of {address} is not the one that KVMHV_FINGERPRINT names; its SHA-256 is {found}",
            "compare it with `kvmhv host show` on that host; if they differ somebody stands between",
            host=address.host,
        )
    return secure


class Agent:
    """One agent's HTTP interface. Paths are relative to the API's base, their names quoted by the caller."""

    def __init__(self, address: Address) -> None:
        self.address = address

    def call(
        self,
        method: str,
        path: str,
        kind: type[T],
        *,
        body: object = None,
        timeout_s: float = ANSWER_TIMEOUT_S,
    ) -> T:
        """Send a request, its body as JSON, and return the answer as `kind`; an empty answer counts as null.

        Raises what the agent answers, or AgentGone.
        """
        data = None if body is None else encoded(body)
        headers = {"Content-Type": "application/json"} if data is not None else {}
        with closing(_Connection(self.address, timeout_s)) as connection:
            response = self._exchange(connection, method, path, data, headers)
            return self._decode(self._read(response) or b"null", kind)

    def upload(
        self, path: str, file: BinaryIO, size_bytes: int, query: dict[str, str], sent: Callable[[int], None]
    ) -> None:
        """PUT a file's content; `sent` hears of each chunk. Raises what the agent answers, or AgentGone."""
        headers = {"Content-Type": "application/octet-stream", "Content-Length": str(size_bytes)}
        target = f"{path}?{urlencode(query)}" if query else path
        with closing(_Connection(self.address, timeout_s=600.0)) as connection:
            response = self._exchange(connection, "PUT", target, _chunks(file, size_bytes, sent), headers)
            self._read(response)

    def events(self, path: str, kind: type[T], idle_s: float) -> Iterator[T]:
        """Yield each server-sent event's data until the agent ends the stream; an event `error` is raised.

        Raises AgentGone also when nothing at all comes for `idle_s`.
        """
        with closing(_Connection(self.address, idle_s)) as connection:
            response = self._exchange(connection, "GET", path, None, {"Accept": "text/event-stream"})
            event, data = b"", b""
            while line := self._line(response, idle_s):
                name, _, value = line.rstrip(b"\r\n").partition(b":")
                if name == b"data":
                    data += value.removeprefix(b" ")
                elif name == b"event":
                    event = value.removeprefix(b" ")
                elif not line.strip() and data:
                    if event == b"error":
                        raise from_body(self._decode(data, ErrorBody))
                    yield self._decode(data, kind)
                    event, data = b"", b""
                if len(data) > LINE_LIMIT_BYTES:
                    raise self._gone("agent-lost", "sent an event without end")

    def open_websocket(self, path: str) -> socket.socket:
        """Return a connection on which WebSocket frames follow. The caller closes it."""
        key = websocket.new_key()
        connection = _Connection(self.address, ANSWER_TIMEOUT_S)
        connection.response_class = _Upgrade
        headers = {
            "Connection": "Upgrade",
            "Upgrade": "websocket",
            "Sec-WebSocket-Version": "13",
            "Sec-WebSocket-Key": key,
        }
        try:
            response = self._exchange(connection, "GET", path, None, headers)
            if response.status != 101 or response.headers["Sec-WebSocket-Accept"] != websocket.accept_of(key):
                raise self._gone("agent-answer", f"does not speak WebSocket at {path} (HTTP {response.status})")
            raw, connection.sock = connection.sock, None
            response.close()
            return raw
        finally:
            connection.close()

    # --- one exchange ---------------------------------------------------------------------------------------------

    def _exchange(
        self,
        connection: _Connection,
        method: str,
        path: str,
        data: bytes | Iterator[bytes] | None,
        headers: dict[str, str],
    ) -> http.client.HTTPResponse:
        if self.address.token:
            headers["Authorization"] = f"Bearer {self.address.token}"
        try:
            connection.connect()
        except ssl.SSLCertVerificationError as error:
            raise Refused(
                "agent-untrusted",
                f"the certificate of {self.address} cannot be verified: {error.verify_message}",
                "set KVMHV_FINGERPRINT to the fingerprint that `kvmhv host show` prints on that host",
                host=self.address.host,
            ) from error
        except (OSError, UnicodeError) as error:  # the latter: a name that cannot be looked up
            raise self._unreachable(error) from error
        try:
            # An agent that refuses an upload answers and closes before it has read all of it: the answer counts.
            with suppress(BrokenPipeError, ConnectionResetError):
                connection.request(method, f"{self.address.base}/{path}", body=data, headers=headers)
            response = connection.getresponse()
        except TimeoutError as error:
            raise self._gone("agent-silent", f"did not answer within {connection.timeout:.0f} s") from error
        except (OSError, http.client.HTTPException) as error:
            raise self._gone("agent-lost", f"ended the connection without an answer ({_why(error)})") from error
        if response.status >= 400:
            raise self._refusal(response.status, self._read(response))
        return response

    def _read(self, response: http.client.HTTPResponse) -> bytes:
        try:
            data = response.read(ANSWER_LIMIT_BYTES + 1)
        except (OSError, http.client.HTTPException) as error:
            raise self._gone("agent-lost", f"broke off its answer ({_why(error)})") from error
        if len(data) > ANSWER_LIMIT_BYTES:
            raise self._gone("agent-answer", "gave an answer without end")
        return data

    def _line(self, response: http.client.HTTPResponse, idle_s: float) -> bytes:
        try:
            return response.readline(LINE_LIMIT_BYTES)
        except TimeoutError as error:
            raise self._gone("agent-silent", f"said nothing for {idle_s:.0f} s") from error
        except (OSError, http.client.HTTPException) as error:
            raise self._gone("agent-lost", f"broke off ({_why(error)})") from error

    def _decode(self, data: bytes, kind: type[T]) -> T:
        try:
            return msgspec.json.decode(data, type=kind)
        except msgspec.MsgspecError as error:
            raise HostError(
                "agent-answer",
                f"the answer of the agent at {self.address} is not understood: {error}",
                "use the same version of kvmhv here and there (kvmhv --version, kvmhv host show)",
                host=self.address.host,
            ) from error

    def _refusal(self, status: int, data: bytes) -> Exception:
        try:
            return from_body(msgspec.json.decode(data, type=ErrorBody))
        except msgspec.MsgspecError:
            said = data[:200].decode(errors="replace").strip().replace("\n", " ")
            kind = CallerError if status < 500 else HostError
            text = f"the agent at {self.address} answered HTTP {status}: {said or 'nothing more'}"
            return kind("agent-answer", text, "see the agent's log: journalctl -u kvmhv", host=self.address.host)

    def _unreachable(self, error: Exception) -> AgentGone:
        if isinstance(error, PermissionError):
            todo = "run it as root or as a member of the group kvmhv"
        elif self.address.server is not None:
            todo = "on that host: systemctl start kvmhv; and let its port through the firewall"
        elif self.address.host is not None and self.address.base == "/v1":
            todo = "look at the lab with: kvmhv lab status; start it with: kvmhv lab up"
        else:
            todo = "start it with: systemctl start kvmhv; or make a lab (kvmhv lab up) and name a host: --host host1"
        text = f"no agent answers at {self.address}: {_why(error)}"
        return AgentGone("agent-unreachable", text, todo, host=self.address.host)

    def _gone(self, code: str, text: str) -> AgentGone:
        todo = "see the agent's log: journalctl -u kvmhv; it may have done what was asked"
        return AgentGone(code, f"the agent at {self.address} {text}", todo, host=self.address.host)


def encoded(body: object) -> bytes:
    """Return a request's body as JSON. Raises CallerError `request-invalid` where it is not Unicode."""
    try:
        return msgspec.json.encode(_asked(body))
    except UnicodeEncodeError as error:
        raise CallerError("request-invalid", f"what was given is not valid Unicode: {error}", "write UTF-8") from None


def _asked(body: object) -> object:
    """Return a record without the fields that are as if nobody had asked for them.

    An agent refuses a field that it does not know: so an older one refuses what it cannot do, and nothing else.
    """
    if not isinstance(body, msgspec.Struct):
        return body
    return {
        field.encode_name: value
        for field in msgspec.structs.fields(body)
        if (value := getattr(body, field.name)) != field.default
    }


def _why(error: Exception) -> str:
    strerror = getattr(error, "strerror", None)
    return str(strerror or error or type(error).__name__)


def _chunks(file: BinaryIO, size_bytes: int, sent: Callable[[int], None]) -> Iterator[bytes]:
    """Exactly as many bytes as were announced."""
    left = size_bytes
    while left and (chunk := file.read(min(CHUNK_BYTES, left))):
        left -= len(chunk)
        yield chunk
        sent(len(chunk))
    if left:
        raise CallerError("file-changed", "the file became shorter while it was sent", "send it again when it rests")


def file_size(path: Path) -> int:
    """Return the size of a regular file. Raises CallerError `file-unreadable`."""
    try:
        if not path.is_file():
            raise CallerError("file-unreadable", f"{path} is not a regular file", "name a file on this machine")
        return path.stat().st_size
    except OSError as error:
        raise CallerError("file-unreadable", f"{path}: {_why(error)}", "name a file on this machine") from error
