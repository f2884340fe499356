"""Whole agents' APIs in one process: real TLS on loopback ports, real sockets, real database; small doubles behind."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest
import pytest_asyncio

from kvmhv.agent.api.host_view import HostView
from kvmhv.agent.api.listener import Listener
from kvmhv.agent.api.other_hosts import OtherHosts
from kvmhv.agent.api.services import CheckReport, Services
from kvmhv.agent.api.trusting import Trusting
from kvmhv.agent.events import Events
from kvmhv.agent.io_watch import IoWatch
from kvmhv.agent.locations import Locations
from kvmhv.agent.metrics import Metrics
from kvmhv.agent.settings import Settings
from kvmhv.agent.web.sessions import Sessions
from kvmhv.config import Config, from_data
from kvmhv.drivers.auth import certificate
from kvmhv.drivers.auth.invitations import Invitations
from kvmhv.drivers.auth.tokens import Tokens
from kvmhv.drivers.auth.trust import Trust
from kvmhv.drivers.database import Database
from kvmhv.drivers.peer import Peer
from kvmhv.drivers.storage.storage import Storage
from kvmhv.errors import CallerError, HostError
from kvmhv.model import (
    Asked,
    Image,
    MoveReport,
    MoveRequest,
    Outcome,
    Phase,
    PhaseTime,
    Problem,
    Severity,
    StorageMoveRequest,
    Vm,
    VmDetails,
    VmSpec,
    VmState,
    VmSummary,
)
from kvmhv.ports import PeerConnection


def report(move_id: str, **changes: Any) -> MoveReport:
    base = MoveReport(
        id=move_id,
        vm="web01",
        vm_id="id-1",
        source="host1",
        target="host2",
        direction="out",
        mode=None,
        outcome=Outcome.RUNNING,
        reason=None,
        error=None,
        phase=Phase.SETUP,
        phases=(PhaseTime(phase=Phase.SETUP, seconds=0.5),),
        passes=(),
        switchover=None,
        blackout_ms=None,
        blackout_uncertainty_ms=None,
        memory_bytes=0,
        disk_bytes=0,
        findings=(),
        progress=0.0,
        remaining_bytes=0,
        storage_total_bytes=0,
        storage_copied_bytes=0,
        warnings=(),
        started_at=1.0,
        ended_at=None,
    )
    return msgspec.structs.replace(base, **changes)


class Clock:
    now_ms = 0.0

    def monotonic_ms(self) -> float:
        return self.now_ms

    def wall_s(self) -> float:
        return 1_700_000_000.0


@dataclass
class Vms:
    console: Path | None = None
    calls: list[tuple[Any, ...]] = field(default_factory=list)

    def _details(self, name: str, state: VmState) -> VmDetails:
        return VmDetails(
            vm=Vm(id=f"id-{name}", name=name, memory_bytes=1 << 20, cpus=1),
            state=state,
            host="here",
            pid=None,
            accel=None,
            qemu_version=None,
            started_at=None,
            move=None,
            console=None,
        )

    async def create(self, spec: VmSpec) -> VmDetails:
        self.calls.append(("create", spec))
        return self._details(spec.name, VmState.STOPPED)

    async def start(self, name: str, *, take_over: bool = False) -> VmDetails:
        return self._details(name, VmState.RUNNING)

    async def stop(self, name: str, *, force: bool, timeout_s: float | None) -> VmDetails:
        self.calls.append(("stop", name, force, timeout_s))
        return self._details(name, VmState.STOPPED)

    async def remove(self, name: str, *, keep_disks: bool) -> None:
        self.calls.append(("remove", name, keep_disks))

    async def list(self) -> tuple[VmSummary, ...]:
        return self.summaries()

    def summaries(self) -> tuple[VmSummary, ...]:
        return (VmSummary(name="web01", id="id-1", state=VmState.RUNNING, host="here", memory_bytes=1, cpus=1),)

    async def set_probe(self, name: str, text: str | None) -> Vm:
        self.calls.append(("probe", name, text))
        return (await self.show(name)).vm

    async def set_free_page_reporting(self, name: str, on: bool) -> Vm:
        self.calls.append(("free_page_reporting", name, on))
        return (await self.show(name)).vm

    def running_since(self) -> dict[str, float]:
        return {"id-1": 1000.0}

    async def show(self, name: str) -> VmDetails:
        if name == "boom":
            raise RuntimeError("a secret inside")
        if name != "web01":
            raise CallerError("vm-unknown", f"no VM {name}", http_status=404)
        return self._details(name, VmState.RUNNING)

    async def console_socket(self, name: str) -> Path:
        assert self.console is not None
        return self.console


@dataclass
class Images:
    stored: dict[str, bytes] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)

    async def store(self, name: str, part: str, chunks: AsyncIterator[bytes], **options: Any) -> Image:
        self.stored[f"{name}/{part}"] = b"".join([chunk async for chunk in chunks])
        self.options = options
        return Image(name=name, kernel_bytes=len(self.stored[f"{name}/{part}"]))

    async def list(self) -> tuple[Image, ...]:
        return ()

    async def remove(self, name: str) -> None:
        self.stored.clear()


@dataclass
class StorageMoves:
    moves: "Moves"

    async def start(self, request: StorageMoveRequest, asked: Asked) -> MoveReport:
        self.moves.callers.append(str(asked))
        return report("s1", vm=request.vm)


@dataclass
class Moves:
    reports: list[MoveReport] = field(default_factory=list)
    ended: list[MoveReport] = field(default_factory=list)
    callers: list[str] = field(default_factory=list)
    files: dict[tuple[str, str, str], bytes] = field(default_factory=dict)
    has: set[str] = field(default_factory=set)
    served: asyncio.Queue[PeerConnection] = field(default_factory=asyncio.Queue)
    serving_ends: asyncio.Event = field(default_factory=asyncio.Event)

    async def check(self, request: MoveRequest) -> CheckReport:
        return CheckReport(findings=())

    async def start(self, request: MoveRequest, asked: Asked) -> MoveReport:
        self.callers.append(str(asked))
        return report("m1", vm=request.vm)

    async def list(self) -> tuple[MoveReport, ...]:
        return tuple(self.reports)

    async def show(self, move_id: str) -> MoveReport:
        for entry in self.reports:
            if entry.id.startswith(move_id):
                return entry
        raise CallerError("move-unknown", f"no move {move_id}", http_status=404)

    async def cancel(self, move_id: str, asked: Asked) -> MoveReport:
        return msgspec.structs.replace(await self.show(move_id), outcome=Outcome.CANCELLED)

    async def choices(self, move_id: str) -> tuple[Any, ...]:
        await self.show(move_id)
        return ()

    async def resolve(self, move_id: str, run_at: str, asked: Asked) -> MoveReport:
        return await self.show(move_id)

    async def watch(self, move_id: str) -> AsyncIterator[MoveReport]:
        yield await self.show(move_id)
        yield msgspec.structs.replace(await self.show(move_id), outcome=Outcome.DONE, progress=1.0)

    async def serve_peer(self, connection: PeerConnection) -> None:
        self.served.put_nowait(connection)
        await self.serving_ends.wait()

    async def receive_file(self, peer_name: str, move_id: str, name: str, chunks: AsyncIterator[bytes]) -> None:
        self.files[peer_name, move_id, name] = b"".join([chunk async for chunk in chunks])

    async def take_file(self, peer_name: str, move_id: str, name: str) -> bool:
        return name in self.has


class Queue:
    waiting: tuple[MoveReport, ...] = ()

    def reports(self) -> tuple[MoveReport, ...]:
        return self.waiting

    def lengths(self) -> dict[str, int]:
        return {"moves_out": 0}


class Doctor:
    async def problems(self) -> tuple[Problem, ...]:
        return (Problem(id="kvm", severity=Severity.WARNING, text="no KVM", todo="nothing"),)


class Outside:
    """Hypervisor, disks and network of a host without QEMU."""

    async def probe(self) -> None:
        raise HostError("qemu-missing", "no QEMU here")

    async def locations(self) -> tuple[Any, ...]:
        return ()

    async def switches(self) -> tuple[str, ...]:
        return ("lan",)


@dataclass
class Host:
    name: str
    config: Config
    services: Services
    trust: Trust
    vms: Vms
    images: Images
    moves: Moves
    clock: Clock
    listener: Listener
    database: Database

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.listener.port}"

    @property
    def peer(self) -> Peer:
        return self.services.trusting.peer

    def local(self) -> aiohttp.ClientSession:
        """A session on the UNIX socket."""
        connector = aiohttp.UnixConnector(path=str(self.config.socket_path))
        return aiohttp.ClientSession("http://local", connector=connector)

    def remote(self, token: str | None = None, as_host: "Host | None" = None) -> aiohttp.ClientSession:
        """A session over TLS: with a token, as another host, or as nobody."""
        if as_host is not None:
            known = as_host.trust.find(self.name)
            assert known is not None
            context = as_host.trust.client_context(known)
        else:
            context = self.trust.introduction_context(self.trust.fingerprint)
        headers = {"Authorization": f"Bearer {token}"} if token is not None else {}
        return aiohttp.ClientSession(
            f"https://{self.address}", connector=aiohttp.TCPConnector(ssl=context), headers=headers
        )


MakeHost = Callable[..., Awaitable[Host]]


@pytest_asyncio.fixture
async def make_host(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[MakeHost]:
    async with contextlib.AsyncExitStack() as stack:

        async def make(name: str, **config: Any) -> Host:
            root = tmp_path_factory.mktemp(name)
            host = compose(
                from_data(
                    {
                        "name": name,
                        "listen": "127.0.0.1:0",
                        "advertise": "127.0.0.1:1",
                        "state_dir": str(root / "state"),
                        "run_dir": str(root / "run"),
                        "socket_group": "no-such-group",
                        **config,
                    },
                    "test",
                )
            )
            stack.callback(host.database.close)
            await host.listener.start()
            stack.push_async_callback(host.listener.close)
            stack.callback(host.moves.serving_ends.set)
            return host

        yield make


def compose(config: Config) -> Host:
    database = Database(config.state_path / "kvmhv.sqlite", config.run_path / "journal", 10)
    clock = Clock()
    settings = Settings(database, config)
    trust = Trust(database, certificate.load_or_make(config.state_path / "identity", config.name), config.limits.peers)
    peer = Peer(trust, config.limits.peer_frame_bytes, config.waits)
    outside: Any = Outside()
    vms, images, moves = Vms(), Images(), Moves()
    tokens = Tokens(database, clock, config.limits.tokens)
    log_of_events = Events(database, clock, config.name)
    services = Services(
        config=config,
        settings=settings,
        host=HostView(
            config=config,
            host_id="an-id",
            settings=settings,
            trust=trust,
            hypervisor=outside,
            disks=outside,
            network=outside,
            running_moves=lambda: tuple(moves.reports),
        ),
        trusting=Trusting(trust, Invitations(config.name, trust.fingerprint, clock), peer, config.advertise),
        tokens=tokens,
        sessions=Sessions(tokens, clock),
        other_hosts=OtherHosts(trust, peer),
        metrics=Metrics("0", config.name),
        vms=vms,
        vm_settings=vms,
        images=images,
        locations=Locations(config, "host-id", database, Storage(config), log_of_events.add),
        vm_states=vms,
        io_watch=IoWatch(outside, clock, log_of_events, 10.0, vms=lambda: (), moves=lambda: ()),
        events=log_of_events,
        moves=moves,
        storage_moves=StorageMoves(moves),
        running_moves=lambda: tuple(moves.reports),
        queued_moves=Queue(),
        recent_moves=lambda: tuple(moves.ended),
        doctor=Doctor(),
    )
    listener = Listener(services)
    return Host(config.name, config, services, trust, vms, images, moves, clock, listener, database)


@pytest.fixture
def befriend() -> Callable[[Host, Host], Awaitable[None]]:
    """Make two hosts trust each other by invitation."""

    async def introduce(inviting: Host, joining: Host) -> None:
        code = inviting.services.trusting.invite(inviting.address)
        await joining.services.trusting.join(code, joining.address)

    return introduce


@pytest.fixture
def move_report() -> Callable[..., MoveReport]:
    return report
