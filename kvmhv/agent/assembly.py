"""All parts of the agent, put together here and nowhere else."""

import asyncio
import contextlib
from dataclasses import dataclass

import structlog

import kvmhv
from kvmhv.agent import state_dir
from kvmhv.agent.api.host_view import HostView
from kvmhv.agent.api.listener import Listener
from kvmhv.agent.api.other_hosts import OtherHosts
from kvmhv.agent.api.services import Services
from kvmhv.agent.api.trusting import Trusting
from kvmhv.agent.bases import Bases
from kvmhv.agent.chronicle import Chronicle
from kvmhv.agent.doctor import Doctor
from kvmhv.agent.events import Events
from kvmhv.agent.host_vms import HostVms
from kvmhv.agent.images import Images
from kvmhv.agent.inventory import Inventories
from kvmhv.agent.io_watch import IoWatch
from kvmhv.agent.locations import Locations
from kvmhv.agent.metrics import Metrics
from kvmhv.agent.move_queue import MoveQueue
from kvmhv.agent.moves import Moves
from kvmhv.agent.open_moves import OpenMoves
from kvmhv.agent.owners import Owners
from kvmhv.agent.settings import Settings
from kvmhv.agent.sharing import Sharing
from kvmhv.agent.storage_moves import StorageMoves
from kvmhv.agent.timed_journal import TimedJournal
from kvmhv.agent.vm_states import VmStates
from kvmhv.agent.vms import Vms
from kvmhv.agent.web.sessions import Sessions
from kvmhv.config import Config
from kvmhv.drivers.auth import certificate
from kvmhv.drivers.auth.invitations import Invitations
from kvmhv.drivers.auth.tokens import Tokens
from kvmhv.drivers.auth.trust import Trust
from kvmhv.drivers.database import Database
from kvmhv.drivers.flows import TcpFlows
from kvmhv.drivers.frames import PacketFrames
from kvmhv.drivers.host import HostClock
from kvmhv.drivers.libvirt import Libvirt
from kvmhv.drivers.network import LinuxNetwork, MptcpWays
from kvmhv.drivers.peer import Peer
from kvmhv.drivers.probes import NetworkProbes
from kvmhv.drivers.qemu import Qemu
from kvmhv.drivers.storage.storage import Storage
from kvmhv.errors import HostError
from kvmhv.ports import Journal

STOP_S = 4.5
"""An agent that is told to stop has ended after so long, whatever hangs; the journal holds what it did not finish."""

log = structlog.get_logger()


class Agent:
    """Every part of the agent, joined. `start` takes up what an earlier agent left and opens the doors."""

    def __init__(self, config: Config) -> None:
        ground = _ground(config)
        self._config = config
        self._tasks: list[asyncio.Task[None]] = []
        self._database, self._metrics, self._qemu = ground.database, ground.metrics, ground.qemu
        peer, trust, disks = ground.trusting.peer, ground.trusting.trust, ground.disks
        self._locations = Locations(config, ground.host_id, ground.database, disks, ground.log_of_events.add)
        self._bases = Bases(ground.database, disks, lambda: (*images.disk_layers(), *self._vms.bases()))
        images = Images(config, ground.database, disks, self._bases.look_soon)
        self._runtime = ground.runtime
        self._owners = Owners(config.name, ground.host_id, disks)
        self._sharing = Sharing(disks, ground.database, config.waits.proof_kept_s)
        self._vms = Vms(config, ground.database, ground.qemu, disks, ground.network, images, self._owners, self._bases)
        self._host_vms = HostVms(config, self._vms, ground.runtime, disks)
        journal = TimedJournal(ground.database, ground.metrics.journal_written)
        self._ways = ground.ways
        self._open_moves = OpenMoves(
            config=config,
            vms=self._vms,
            hypervisor=ground.qemu,
            runtime=ground.runtime,
            peer=peer,
            journal=journal,
            clock=ground.clock,
            frames=PacketFrames(ground.clock),
            flows=TcpFlows(),
            probes=NetworkProbes(ground.clock),
            ways=ground.ways,
            chronicle=ground.chronicle,
        )
        self._locations.moving = self._open_moves.touched
        self._queue = _queue(config, ground, journal, self._open_moves)
        moves = Moves(
            config=config,
            settings=ground.settings,
            vms=self._host_vms,
            hypervisor=ground.qemu,
            peer=peer,
            journal=journal,
            clock=ground.clock,
            inventories=_inventories(config, ground, self._host_vms, self._bases),
            sharing=self._sharing,
            owners=self._owners,
            open_moves=self._open_moves,
            queue=self._queue,
            chronicle=ground.chronicle,
        )
        self._vm_states = VmStates(config.name, self._vms, ground.qemu, self._open_moves.moving, runtime=ground.runtime)
        self._io_watch = IoWatch(
            ground.qemu,
            ground.clock,
            ground.log_of_events,
            config.limits.io_stall_s,
            vms=self._vms.defined,
            moves=self._open_moves.reports,
        )
        self._other_hosts = OtherHosts(trust, peer)
        self._listener = Listener(self._services(ground, images, moves, journal))

    def _services(self, ground: "_Ground", images: Images, moves: Moves, journal: Journal) -> Services:
        """Return what the API may use."""
        config, settings, trust = self._config, ground.settings, ground.trusting.trust
        tokens = Tokens(ground.database, ground.clock, config.limits.tokens)
        view = HostView(
            config=config,
            host_id=ground.host_id,
            settings=settings,
            trust=trust,
            hypervisor=ground.qemu,
            disks=ground.disks,
            network=ground.network,
            running_moves=self._open_moves.reports,
        )
        doctor = Doctor(
            config=config,
            settings=settings,
            trust=trust,
            hypervisor=ground.qemu,
            disks=ground.disks,
            network=ground.network,
            runtime=ground.runtime,
        )
        storage_moves = StorageMoves(
            config=config,
            settings=settings,
            vms=self._host_vms,
            hypervisor=ground.qemu,
            disks=ground.disks,
            journal=journal,
            clock=ground.clock,
            open_moves=self._open_moves,
            log_of_events=ground.log_of_events,
        )
        return Services(
            config=config,
            settings=settings,
            host=view,
            trusting=ground.trusting,
            tokens=tokens,
            sessions=Sessions(tokens, ground.clock),
            other_hosts=self._other_hosts,
            metrics=ground.metrics,
            vms=self._host_vms,
            vm_settings=self._vms.settings,
            images=images,
            locations=self._locations,
            vm_states=self._vm_states,
            io_watch=self._io_watch,
            events=ground.log_of_events,
            moves=moves,
            storage_moves=storage_moves,
            running_moves=self._open_moves.reports,
            queued_moves=self._queue,
            recent_moves=ground.chronicle.recent,
            doctor=doctor,
        )

    async def start(self) -> None:
        """Recover moves, then VMs, then answer. Raises HostError; `stop` is still to be called."""
        await self._locations.start()
        await self._ways.sweep()
        await self._open_moves.recover()
        self._queue.recover()
        await self._vms.recover()
        self._sharing.recover()
        await self._listener.start()
        work = (
            self._metrics.watch_loop_lag(),
            self._vm_states.watch(),
            self._io_watch.watch(),
            self._queue.keep(),
            self._probe(),
            self._bases.keep(),
            self._runtime.keep(),
        )
        self._tasks = [asyncio.create_task(one) for one in work]
        log.info("agent ready", host=self._config.name, listen=self._config.listen, version=kvmhv.__version__)

    async def stop(self) -> None:
        """Close the doors, let go of moves and VMs as they are; ends within 4.5 s."""
        for task in self._tasks:
            task.cancel()
        try:
            async with asyncio.timeout(STOP_S):
                await self._listener.close()
                await self._other_hosts.close()
                await self._open_moves.close()
                await self._locations.close()
                await self._owners.close()
                await self._sharing.close()
                await self._vms.close()
                await self._qemu.close()
        except TimeoutError:
            log.warning("something did not end in time and was left")
        finally:
            self._database.close()

    async def _probe(self) -> None:
        """Learn what QEMU can do before somebody asks: the answer is kept, and asking takes a while."""
        with contextlib.suppress(HostError):
            await self._qemu.probe()


@dataclass(frozen=True, kw_only=True)
class _Ground:
    """What the parts stand on: the outside of this host, and what is kept and counted of it."""

    clock: HostClock
    database: Database
    host_id: str
    settings: Settings
    metrics: Metrics
    log_of_events: Events
    chronicle: Chronicle
    trusting: Trusting
    qemu: Qemu
    runtime: Libvirt
    disks: Storage
    network: LinuxNetwork
    ways: MptcpWays


def _inventories(config: Config, ground: _Ground, vms: HostVms, bases: Bases) -> Inventories:
    network = ground.network, ground.ways
    return Inventories(config, ground.host_id, ground.settings, vms, ground.qemu, ground.disks, *network, bases)


def _queue(config: Config, ground: _Ground, journal: Journal, open_moves: OpenMoves) -> MoveQueue:
    return MoveQueue(
        config=config,
        settings=ground.settings,
        records=ground.database,
        journal=journal,
        clock=ground.clock,
        open_moves=open_moves,
        chronicle=ground.chronicle,
    )


def _ground(config: Config) -> _Ground:
    clock, database = HostClock(), _database(config)
    metrics = Metrics(kvmhv.__version__, config.name)
    log_of_events = Events(database, clock, config.name)
    return _Ground(
        clock=clock,
        database=database,
        host_id=state_dir.host_id(database),
        settings=Settings(database, config),
        metrics=metrics,
        log_of_events=log_of_events,
        chronicle=Chronicle(metrics, log_of_events, database.reports()),
        trusting=_trusting(config, database, clock),
        qemu=Qemu(config, clock, metrics.qmp_answered),
        runtime=Libvirt(config, clock, log.info),
        disks=Storage(config),
        network=LinuxNetwork(config),
        ways=MptcpWays(config),
    )


def _database(config: Config) -> Database:
    return Database(config.state_path / "kvmhv.sqlite", config.run_path / "journal", config.limits.moves_kept)


def _trusting(config: Config, database: Database, clock: HostClock) -> Trusting:
    identity = certificate.load_or_make(config.state_path / "identity", config.name)
    trust = Trust(database, identity, config.limits.peers)
    invitations = Invitations(config.name, trust.fingerprint, clock)
    peer = Peer(trust, config.limits.peer_frame_bytes, config.waits)
    return Trusting(trust, invitations, peer, config.advertise)
