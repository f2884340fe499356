"""The connection to libvirt: made when its socket is there, made again when it broke, with its events in our loop.

Every call of the library blocks, so each runs in a thread of its own, at most THREADS at a time; a thread that hangs
with libvirt holds nothing up but its own call, and an agent that ends does not wait for it. Events come from a thread
that runs the library's own loop: its asyncio loop (libvirtaio) may not be used from such threads.
"""

import asyncio
import contextlib
import importlib.util
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from kvmhv.errors import HostError

SOCKETS = ("/run/libvirt/libvirt-sock", "/run/libvirt/virtqemud-sock")
RETRY_S = 1.0
THREADS = 16
KEEPALIVE_S = 5
KEEPALIVES = 3

Answer = TypeVar("Answer")
Domain = Any
"""virDomain; the library has no types."""


class Connection:
    """libvirt of this host. Without it every call raises HostError `libvirt-silent`."""

    def __init__(self, uri: str, call_s: float, told: Callable[[str], None]) -> None:
        """`call_s` bounds a call; `told` hears in words when libvirt answers and when it does no longer."""
        self._uri = uri
        self._call_s = call_s
        self._told = told
        self._threads = asyncio.Semaphore(THREADS)
        self._connection: Any = None
        self._broken = asyncio.Event()
        self._events = False
        self.generation = 0
        """Counts connections: another one means that events may have been missed between."""

    @property
    def stands(self) -> bool:
        """Whether libvirt answers now."""
        return self._connection is not None

    @property
    def library(self) -> ModuleType:
        """The library; only where a connection stands or stood."""
        import libvirt  # noqa: PLC0415 - only where libvirt is

        return libvirt  # type: ignore[no-any-return]

    @staticmethod
    def socket() -> Path | None:
        """Return libvirt's socket on this host, None where there is none."""
        return next((path for path in map(Path, SOCKETS) if path.exists()), None)

    @staticmethod
    def installed() -> bool:
        """Whether the library is here; does not import it."""
        return importlib.util.find_spec("libvirt") is not None

    async def keep(self, prepare: Callable[[Any], Any], lost: Callable[[], None]) -> None:
        """Connect, call `prepare` with the connection in a thread; again whenever it broke. Ends by cancellation."""
        told = ""
        while True:
            if self.socket() is not None and self.installed():
                try:
                    await self._connect(prepare)
                except HostError as error:
                    if told != error.message:
                        self._told(error.message)
                    told = error.message
                else:
                    told = ""
                    self._told(f"libvirt answers ({self._uri})")
                    await self._broken.wait()
                    self._told("the connection to libvirt was lost")
                    self._connection = None
                    lost()
            await asyncio.sleep(RETRY_S)

    async def _connect(self, prepare: Callable[[Any], Any]) -> None:
        if not self._events:
            self._events = True
            self.library.virEventRegisterDefaultImpl()
            # The library prints every error by itself too.
            self.library.registerErrorHandler(lambda _context, _error: None, None)
            threading.Thread(target=self._run_events, name="libvirt: events", daemon=True).start()
        connection = await self._in_thread("connecting", lambda: self.library.open(self._uri), self._call_s)
        broken = self._broken = asyncio.Event()
        loop = asyncio.get_running_loop()
        try:
            await self._in_thread("its events", lambda: self._hear(connection, loop, broken), self._call_s)
            self._connection = connection
            self.generation += 1
            await self._in_thread("its domains", lambda: prepare(connection), self._call_s)
        except BaseException:
            self._connection = None
            with contextlib.suppress(self.library.libvirtError):
                connection.close()
            raise

    def _run_events(self) -> None:
        while True:
            self.library.virEventRunDefaultImpl()

    def _hear(self, connection: Any, loop: asyncio.AbstractEventLoop, broken: asyncio.Event) -> None:
        def closed(_connection: Any, _reason: int, _opaque: object) -> None:
            loop.call_soon_threadsafe(broken.set)

        connection.registerCloseCallback(closed, None)
        connection.setKeepAlive(KEEPALIVE_S, KEEPALIVES)

    async def call(self, what: str, ask: Callable[[Any], Answer], timeout_s: float | None = None) -> Answer:
        """Return ask(connection), run in a thread. Raises HostError `libvirt-silent`, `libvirt` with its words."""
        connection = self._connection
        if connection is None:
            raise silent(what)
        return await self._in_thread(what, lambda: ask(connection), timeout_s or self._call_s)

    async def apart(self, what: str, ask: Callable[[Any], Answer]) -> Answer:
        """Like `call` on a connection of its own and without a deadline, for what takes as long as a move."""
        if self._connection is None:
            raise silent(what)

        def alone() -> Answer:
            connection = self.library.open(self._uri)
            try:
                connection.setKeepAlive(KEEPALIVE_S, KEEPALIVES)
                return ask(connection)
            finally:
                with contextlib.suppress(self.library.libvirtError):
                    connection.close()

        return await self._in_thread(what, alone, None)

    async def _in_thread(self, what: str, work: Callable[[], Answer], timeout_s: float | None) -> Answer:
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Answer] = loop.create_future()

        def settle(value: Any, error: BaseException | None) -> None:
            self._threads.release()
            if answer.done():
                return
            if error is not None:
                answer.set_exception(error)
            else:
                answer.set_result(value)

        def run() -> None:
            value, error = None, None
            try:
                value = work()
            except BaseException as caught:
                error = caught
            with contextlib.suppress(RuntimeError):  # the loop has ended, and nobody waits any more
                loop.call_soon_threadsafe(settle, value, error)

        try:
            async with asyncio.timeout(timeout_s):
                await self._threads.acquire()
                threading.Thread(target=run, name=f"libvirt: {what}", daemon=True).start()
                return await answer
        except TimeoutError:
            raise silent(what) from None
        except self.library.libvirtError as error:
            raise HostError("libvirt", f"libvirt, {what}: {error}", "see `virsh list` and libvirt's log") from error


def silent(what: str) -> HostError:
    """Return the error of a libvirt that does not answer."""
    return HostError("libvirt-silent", f"libvirt does not answer ({what})", "start libvirtd (or virtqemud)")
