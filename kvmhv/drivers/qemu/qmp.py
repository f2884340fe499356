"""One VM's QMP connection: connects as long as the process lives, every command with a deadline, every event passed on.

`execute` needs no open connection: it waits for one within its deadline, so a restarted agent and a QEMU that is just
starting look the same to the caller. All that is said goes to the VM's qmp.log.
"""

import asyncio
import contextlib
import json
import logging
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TypeVar

import msgspec
from qemu.qmp import ExecuteError, Message, QMPClient, QMPError, Runstate

from kvmhv.drivers.qemu import answers
from kvmhv.drivers.qemu.process import Process
from kvmhv.errors import HostError

RECONNECT_DELAY_S = 0.05
RECONNECT_DELAY_MAX_S = 1.0
DYING_S = 1.0
"""A connection ends a moment before its process: so long the process is waited for to tell the one from the other."""
LOG_MAX_BYTES = 4 * 1024 * 1024
LOG_LINE_MAX_CHARACTERS = 4096
HANGS = "do its disks' servers answer (`kvmhv storage list`)? else see the VM's qemu.log"
"""What to do about a QEMU that does not answer."""

# Every failure reaches the caller as an exception with QEMU's words; the library's own lines would say it twice.
logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL)
log = logging.getLogger(__name__)

Command = tuple[str, Mapping[str, object]]
Event = dict[str, Any]
Caught = asyncio.Future[tuple[Event, float]]
Kind = TypeVar("Kind")


class QmpRefused(HostError):
    """QEMU answered with an error: `description` has its words. Nothing was changed, as QMP promises."""

    def __init__(self, vm_name: str, command: str, description: str) -> None:
        super().__init__("qemu-error", f"{vm_name}: QEMU refused {command}: {description}", "see the VM's qemu.log")
        self.description = description


class QmpLost(HostError):
    """No answer, so whether the command was done is unknown.

    The process is gone (`qemu-gone`), hangs (`qemu-hangs`), or says what cannot be read (`qemu-garbled`).
    """


class QmpLog:
    """A bounded log of what was said over QMP: two files of LOG_MAX_BYTES at most. It never fails its caller."""

    def __init__(self, path: Path, now_ms: Callable[[], float]) -> None:
        self._path = path
        self._now_ms = now_ms
        self._file: IO[bytes] | None = None
        self._stays_open = True

    def write(self, sign: str, what: object) -> None:
        """Append a line: `>` sent, `<` answered, `*` event. The file stays open until `close`."""
        with contextlib.suppress(OSError):
            text = json.dumps(what, separators=(",", ":"), default=str)[:LOG_LINE_MAX_CHARACTERS]
            if self._file is None:
                self._file = self._path.open("ab", buffering=0)
            self._file.write(f"{self._now_ms():.3f} {sign} {text}\n".encode())
            full = self._file.tell() > LOG_MAX_BYTES
            if full or not self._stays_open:
                self._let_go()
            if full:
                self._path.replace(self._path.with_name(self._path.name + ".1"))

    def close(self) -> None:
        """Let go of the file. Last words are still written."""
        self._stays_open = False
        self._let_go()

    def _let_go(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


class Qmp:
    """QMP to one process."""

    def __init__(
        self,
        vm_name: str,
        process: Process,
        socket: Path,
        log: QmpLog,
        *,
        now_ms: Callable[[], float],
        deliver: Callable[[Event, float], None],
        tail: Callable[[], str],
        timeout_s: float,
        connect_s: float,
        on_answer: Callable[[float], None] = lambda seconds: None,
    ) -> None:
        """Begin to connect. `deliver` gets every event with its arrival time; `tail` is QEMU's last words.

        `on_answer` hears how long QEMU took for each command that it answered.
        """
        self.version: tuple[int, int, int] = (0, 0, 0)
        self._vm_name = vm_name
        self._process = process
        self._socket = socket
        self._log = log
        self._now_ms = now_ms
        self._deliver = deliver
        self._tail = tail
        self._timeout_s = timeout_s
        self._connect_s = connect_s
        self._on_answer = on_answer
        self._client: QMPClient | None = None
        self._connected = asyncio.Event()
        self._waiters: list[tuple[Callable[[Event], bool], Caught]] = []
        self._task = asyncio.create_task(self._serve(), name=f"qmp {vm_name}")

    async def execute(
        self,
        command: str,
        arguments: Mapping[str, object] | None = None,
        *,
        timeout_s: float | None = None,
        oob: bool = False,
        logged: bool = True,
    ) -> Any:
        """Run a command and return its answer; `logged`: what is asked again and again would fill the log.

        Raises QmpRefused with QEMU's words, QmpLost when there is no answer in time or the process has ended.
        """
        if logged:
            self._log.write(">", {"execute": command, "arguments": arguments or {}})
        limit_s = self._timeout_s if timeout_s is None else timeout_s
        try:
            async with asyncio.timeout(limit_s):
                client = await self._connection()
                begun_ms = self._now_ms()
                answer = await client.execute(command, arguments or {}, oob=oob)
        except TimeoutError:
            raise self._lost(command, f"no answer in {limit_s:g} s") from None
        except ExecuteError as error:
            description = str(error)
            self._log.write("<", {"error": description, "of": command})
            raise QmpRefused(self._vm_name, command, description) from None
        except (QMPError, OSError, EOFError) as error:
            await self._process.wait_gone(DYING_S)
            raise self._lost(command, f"connection lost: {error}") from error
        self._on_answer((self._now_ms() - begun_ms) / 1000)
        if logged:
            self._log.write("<", {"return": answer, "of": command})
        return answer

    async def ask(
        self, kind: type[Kind], command: str, arguments: Mapping[str, object] | None = None, **bound: Any
    ) -> Kind:
        """Run a command whose answer is of this type (drivers/qemu/answers.py). Raises as execute() and read()."""
        return self.read(kind, await self.execute(command, arguments, **bound), command)

    def read(self, kind: type[Kind], answer: object, command: str) -> Kind:
        """Return an answer as what it must be. Raises QmpLost `qemu-garbled`."""
        try:
            return msgspec.convert(answer, kind)
        except msgspec.ValidationError as error:
            text = f"{self._vm_name}: QEMU answered {command} with what cannot be read: {error}"
            raise QmpLost("qemu-garbled", text, "see the VM's qmp.log") from error

    async def together(self, *commands: Command, timeout_s: float | None = None, logged: bool = True) -> list[Any]:
        """Send several commands at once, in order; QEMU runs them in order. Raises the first one's error, if any."""
        answers = await asyncio.gather(
            *(self.execute(name, arguments, timeout_s=timeout_s, logged=logged) for name, arguments in commands),
            return_exceptions=True,
        )
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
        return answers

    @contextmanager
    def catch(self, matches: Callable[[Event], bool]) -> Iterator[Caught]:
        """Catch the first event that matches from here on, for `wait`; opened before the command that causes it."""
        entry = (matches, asyncio.get_running_loop().create_future())
        self._waiters.append(entry)
        try:
            yield entry[1]
        finally:
            self._waiters.remove(entry)
            entry[1].cancel()

    async def wait(self, caught: Caught, what: str, timeout_s: float | None = None) -> tuple[Event, float]:
        """Return the caught event and its arrival time. Raises QmpLost when it does not come in time."""
        limit_s = self._timeout_s if timeout_s is None else timeout_s
        await self._either(asyncio.wait({caught}), self._process.wait_gone(limit_s))
        if not caught.done():
            raise self._lost(what, f"no event in {limit_s:g} s")
        return caught.result()

    async def wait_connected(self, timeout_s: float) -> bool:
        """Wait until QMP answers; False if the process ended or the time is over first."""
        await self._either(self._connected.wait(), self._process.wait_gone(timeout_s))
        return self._connected.is_set()

    async def drain(self, timeout_s: float) -> None:
        """Wait for the end of the connection, so that the last events of an ended process are delivered."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await asyncio.shield(self._task)

    async def close(self) -> None:
        """End the connection; QEMU goes on."""
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        self._log.close()

    # ---

    async def _connection(self) -> QMPClient:
        while self._client is None:
            await self._either(self._connected.wait(), self._process.wait_gone(None))
            if self._process.gone:
                raise EOFError("the process has ended")
        return self._client

    @staticmethod
    async def _either(*waits: Coroutine[Any, Any, Any]) -> None:
        """Wait until one of them is done; the others are cancelled."""
        tasks = [asyncio.create_task(wait) for wait in waits]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()

    def _lost(self, command: str, why: str) -> QmpLost:
        tail = self._tail()
        words = f"; QEMU's last words: {tail}" if tail else ""
        self._log.write("<", {"lost": why, "of": command})
        if self._process.gone:
            status = self._process.exit_status
            ended = "" if status is None else f" with status {status}"
            return QmpLost(
                "qemu-gone", f"{self._vm_name}: its QEMU ended{ended} during {command}{words}", "see the VM's qemu.log"
            )
        return QmpLost("qemu-hangs", f"{self._vm_name}: QEMU does not answer {command}: {why}{words}", HANGS)

    async def _serve(self) -> None:
        """Keep one connection as long as the process lives."""
        delay_s = RECONNECT_DELAY_S
        while not self._process.gone:
            client = QMPClient(self._vm_name)
            # Handled in the moment it is read: the true time of arrival, and no queue or history that could grow.
            client.events.event_filter = self._keep_no_event
            try:
                async with asyncio.timeout(self._connect_s):
                    await client.connect(str(self._socket))
                self._greeted(client)
            except Exception as error:  # the library passes on whatever a garbled greeting made it stumble over
                if not isinstance(error, QMPError | OSError | EOFError | TimeoutError):
                    log.warning("%s: QMP does not begin as it should: %r", self._vm_name, error)
                await self._end(client)
                await self._process.wait_gone(delay_s)
                delay_s = min(delay_s * 2, RECONNECT_DELAY_MAX_S)
                continue
            delay_s = RECONNECT_DELAY_S
            try:
                await self._attend(client)
            finally:
                self._connected.clear()
                self._client = None
                await self._end(client)
            await self._process.wait_gone(RECONNECT_DELAY_S)

    async def _end(self, client: QMPClient) -> None:
        """End a connection, which raises again whatever has ended it: any exception that a message could provoke."""
        with contextlib.suppress(Exception):
            async with asyncio.timeout(self._connect_s):
                await client.disconnect()

    def _greeted(self, client: QMPClient) -> None:
        assert client.greeting is not None
        number = self.read(answers.Version, client.greeting.QMP.version, "with its greeting").qemu
        self.version = (number.major, number.minor, number.micro)

    async def _attend(self, client: QMPClient) -> None:
        """Serve commands and events until the connection ends."""
        self._client = client
        self._connected.set()
        while client.runstate is Runstate.RUNNING:
            await client.runstate_changed()

    def _keep_no_event(self, event: Message) -> bool:
        name, data = event["event"], event.get("data")
        if isinstance(name, str):
            self._handle({"event": name, "data": data if isinstance(data, dict) else {}})
        return False

    def _handle(self, event: Event) -> None:
        arrived_ms = self._now_ms()
        self._log.write("*", event)
        for matches, future in self._waiters:
            if not future.done() and matches(event):
                future.set_result((event, arrived_ms))
        try:
            self._deliver(event, arrived_ms)
        except Exception:  # a bug of the receiver must not cost the connection
            log.exception("%s: the receiver of %s failed", self._vm_name, event.get("event"))
