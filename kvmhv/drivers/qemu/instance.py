"""One VM's QEMU on this host: its process, its QMP, its directory, and what the agent does with them all its life."""

import asyncio
import contextlib
import logging
import signal
from collections.abc import AsyncIterator, Callable

import msgspec

from kvmhv.config import Waits
from kvmhv.drivers.qemu import answers, blocks, exports, keys, memory
from kvmhv.drivers.qemu.argv import qmp_chardev
from kvmhv.drivers.qemu.dirty_rate import FineSample
from kvmhv.drivers.qemu.process import Process
from kvmhv.drivers.qemu.qmp import HANGS, Event, Qmp, QmpLog, QmpLost, QmpRefused
from kvmhv.drivers.qemu.rundir import VmDir, keep_json, read_json
from kvmhv.drivers.qemu.send_queues import SendQueues
from kvmhv.errors import HostError, KvmhvError
from kvmhv.model import Accel, IncomingAddress
from kvmhv.ports import QemuEvent, RunState

CONSOLE_LOG_CHECK_S = 5.0
LAST_EVENTS_S = 1.0
POST_COPY = "postcopy-"
"""How the states of query-migrate begin in which pages follow the guest."""

log = logging.getLogger(__name__)


def marks(directory: VmDir) -> tuple[str, ...]:
    """Return the arguments by which the VM's process is known among all others."""
    return ("-uuid", directory.vm_id, qmp_chardev(directory))


class _Peer(msgspec.Struct, frozen=True, kw_only=True):
    """peer.json: where a move goes."""

    ip: str
    ports: tuple[int, ...]


class Instance:
    """A QEMU process and everything that belongs to it."""

    def __init__(
        self,
        directory: VmDir,
        found: Process,
        argv: list[str],
        *,
        now_ms: Callable[[], float],
        emit: Callable[[QemuEvent], None],
        timeout_s: float,
        waits: Waits,
        on_answer: Callable[[float], None] = lambda seconds: None,
    ) -> None:
        """Take a live process with these arguments over and begin to watch it."""
        self.directory = directory
        self.process = found
        self._waits = waits
        self.mirrors = blocks.Mirrors()
        self.dirty_sample = FineSample()
        self.may_send_bytes_per_s: int | None = None
        """While the guest runs and its memory is sent: how fast that may go by the plan."""
        self.queues: SendQueues | None = None
        """And what the kernel holds of it."""
        self.migration = ""
        """The newest status of the migration that this agent has heard of."""
        self._lacks_pages = False
        """Its guest runs here in post-copy: what the move needed is needed until the last page is there."""
        self.name = _argument(argv, "-name").removeprefix("guest=").split(",")[0] or directory.vm_id
        self.accel = Accel.KVM if f"accel={Accel.KVM}" in _argument(argv, "-machine") else Accel.TCG
        self._now_ms = now_ms
        self._emit = emit
        self._shutdown: dict[str, object] | None = None
        self.qmp = Qmp(
            self.name,
            found,
            directory.qmp_socket,
            QmpLog(directory.qmp_log, now_ms),
            now_ms=now_ms,
            deliver=self._deliver,
            tail=directory.log_tail,
            timeout_s=timeout_s,
            connect_s=waits.qmp_connect_s,
            on_answer=on_answer,
        )
        self._settling: asyncio.Task[None] | None = None
        self._watch = asyncio.create_task(self._watch_process(), name=f"watch {self.name}")

    @contextlib.asynccontextmanager
    async def bounded(self, what: str, limit_s: float) -> AsyncIterator[None]:
        """Bound what is told to QEMU while the guest stands still. Raises QmpLost `qemu-hangs`."""
        try:
            async with asyncio.timeout(limit_s):
                yield
        except TimeoutError:
            text = f"{self.name}: QEMU was told to {what} in the switchover and has not done it in {limit_s:g} s"
            raise QmpLost("qemu-hangs", text, HANGS) from None

    async def state(self) -> RunState:
        """Return what QEMU says now; `answers` False when it says nothing in time."""
        if self.process.gone:
            return RunState(process=False)
        state = RunState(process=True, accel=self.accel, pid=self.process.pid, ever_ran=self.may_have_run)
        try:
            said = await self.qmp.together(
                ("query-status", {}), ("query-migrate", {}), timeout_s=self._waits.qemu_state_s
            )
            status = self.qmp.read(answers.Status, said[0], "query-status")
            migration = self.qmp.read(answers.Migration, said[1], "query-migrate")
        except (QmpLost, QmpRefused):
            if self.process.gone:
                return RunState(process=False)
            return msgspec.structs.replace(state, answers=False, qemu_version=self._version_text())
        self._lacks_pages = self._lacks_pages or (status.running and migration.status.startswith(POST_COPY))
        return msgspec.structs.replace(
            state,
            status=status.status,
            migration=migration.status,
            ever_ran=self.may_have_run or status.running,
            qemu_version=self._version_text(),
        )

    @property
    def may_have_run(self) -> bool:
        """Whether the guest may have run in this process: False only if it is incoming and `cont` was never sent."""
        return not self.directory.incoming_mark.exists() or self.directory.cont_mark.exists()

    async def cont(self) -> float:
        """Let the guest run; returns when QEMU's RESUME arrived (now, if it ran already)."""
        incoming = self.directory.incoming_mark.exists()
        if incoming:
            self.directory.cont_mark.touch()
        with self.qmp.catch(lambda event: event["event"] == "RESUME") as resume:
            # One trip: the answer to the first command says whether there will be an event.
            said = await self.qmp.together(("query-status", {}), ("cont", {}))
            before = self.qmp.read(answers.Status, said[0], "query-status")
            at_ms = self._now_ms() if before.running else (await self.qmp.wait(resume, "cont"))[1]
        self._lacks_pages = incoming and self.migration.startswith(POST_COPY)
        if incoming and not self._lacks_pages:
            self._settling = asyncio.create_task(self._settle(), name=f"settle {self.name}")
        return at_ms

    async def _settle(self) -> None:
        """After a move in: take away what only the move needed. The guest runs already, so a failure is only told."""
        try:
            await exports.unexport(self.qmp)
            await keys.remove_object(self.qmp)
            await exports.seal(self.qmp, self.directory)
        except KvmhvError as error:
            log.warning("%s: cleaning up after the move in: %s", self.name, error)
        finally:
            self.directory.remove_keys()

    async def kill(self) -> None:
        """End the process: `quit`, then SIGKILL; it is gone when this returns. Raises HostError `qemu-unkillable`."""
        if not self.process.gone:
            ends = False
            with contextlib.suppress(QmpLost, QmpRefused):
                await self.qmp.execute("quit", timeout_s=self._waits.qemu_quit_s)
                ends = await self.process.wait_gone(self._waits.qemu_quit_s)
            if not ends:
                self.process.send(signal.SIGKILL)
            if not await self.process.wait_gone(self._waits.qemu_kill_s):
                raise HostError(
                    "qemu-unkillable",
                    f"{self.name}: process {self.process.pid} does not end after SIGKILL",
                    "it hangs in the kernel, on its storage most likely",
                )
        await asyncio.wait({self._watch})
        self.directory.remove()

    def remember_peer(self, ip: str, address: IncomingAddress) -> None:
        """Keep where a move goes, for `cut`, also after a restart of the agent."""
        ports = [port for port in (address.memory_port, address.disk_port) if port is not None]
        keep_json(self.directory.peer, _Peer(ip=ip, ports=tuple(ports)))

    def cut(self) -> None:
        """Cut the move's connections from outside, whatever QEMU's main loop is doing; no error if there are none."""
        peer = read_json(self.directory.peer, _Peer)
        if peer is not None:
            count = self.process.cut(peer.ip, peer.ports)
            log.warning("%s: QEMU hangs in the move; cut %d connections to %s", self.name, count, peer.ip)

    async def hold(self, bytes_per_s: int | None) -> bool:
        """Send memory no faster than this, or as the plan says again; False where no running guest is sent."""
        planned = self.may_send_bytes_per_s
        if planned is None:
            return False
        await memory.limit(self.qmp, planned if bytes_per_s is None else min(planned, bytes_per_s))
        return True

    def guest_stops(self) -> None:
        """What belongs to a running guest that is sent ends before it is told to stop: no limit may come after that."""
        self.dirty_sample.end()
        self.may_send_bytes_per_s = self.queues = None

    def forget_peer(self) -> None:
        """The move has ended."""
        self.may_send_bytes_per_s = self.queues = None
        self.directory.peer.unlink(missing_ok=True)

    async def close(self) -> None:
        """Let go of the process, which runs on."""
        for task in (self._watch, self._settling):
            if task is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        await self.mirrors.close()
        await self.qmp.close()
        self.process.release()

    # ---

    def _version_text(self) -> str:
        return ".".join(str(part) for part in self.qmp.version) if any(self.qmp.version) else ""

    def _deliver(self, event: Event, at_ms: float) -> None:
        data = event.get("data", {})
        if event["event"] == "SHUTDOWN":
            self._shutdown = data
        if event["event"] == "MIGRATION":
            self.migration = str(data.get("status", ""))
            if self._lacks_pages and self.migration == "completed":
                self._lacks_pages = False
                self._settling = asyncio.create_task(self._settle(), name=f"settle {self.name}")
        self._emit(QemuEvent(vm_id=self.directory.vm_id, name=event["event"], data=data, at_ms=at_ms))

    async def _watch_process(self) -> None:
        """Say GONE when the process has ended and its last events are delivered."""
        while not await self.process.wait_gone(CONSOLE_LOG_CHECK_S):
            self.directory.trim_console_log()
        at_ms = self._now_ms()
        await self.qmp.drain(LAST_EVENTS_S)
        await self.qmp.close()
        await self.mirrors.close()
        self.directory.remove_keys()
        data: dict[str, object] = {
            "reason": _reason(self.process.exit_status, self._shutdown, self.directory.log_tail()),
            "exit_status": self.process.exit_status,
            "shutdown": self._shutdown,
            "log": self.directory.log_tail(),
        }
        self._emit(QemuEvent(vm_id=self.directory.vm_id, name="GONE", data=data, at_ms=at_ms))


def _reason(exit_status: int | None, shutdown: dict[str, object] | None, tail: str) -> str:
    """Say in one line why a process ended."""
    if shutdown is not None:
        return "the guest switched itself off" if shutdown.get("guest") else f"QEMU was told to end: {shutdown}"
    if exit_status is None:
        how = "QEMU ended"
    else:
        how = f"QEMU was ended by signal {-exit_status}" if exit_status < 0 else f"QEMU ended with status {exit_status}"
    return f"{how}: {tail.splitlines()[-1]}" if tail else how


def _argument(argv: list[str], option: str) -> str:
    return argv[argv.index(option) + 1] if option in argv[:-1] else ""
