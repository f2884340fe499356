"""The agent: everything is put together here, and nowhere else."""

import asyncio
import contextlib
import fcntl
import re
import signal
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import structlog

import kvmhv
from kvmhv.agent import logs
from kvmhv.agent.absent import Absent
from kvmhv.agent.api.host_view import HostView
from kvmhv.agent.api.listener import Listener
from kvmhv.agent.api.services import Services
from kvmhv.agent.api.trusting import Trusting
from kvmhv.agent.metrics import Metrics
from kvmhv.agent.settings import Settings
from kvmhv.config import Config, load
from kvmhv.drivers import systemd
from kvmhv.drivers.auth import certificate
from kvmhv.drivers.auth.invitations import Invitations
from kvmhv.drivers.auth.tokens import Tokens
from kvmhv.drivers.auth.trust import Trust
from kvmhv.drivers.database import Database
from kvmhv.drivers.host import HostClock
from kvmhv.drivers.peer import Peer
from kvmhv.drivers.storage.directory import Directories
from kvmhv.errors import CallerError, HostError, KvmhvError
from kvmhv.model import VM_NAME_PATTERN
from kvmhv.ports import Records

DEFAULT_CONFIG = Path("/etc/kvmhv/agent.toml")

log = structlog.get_logger()


def run(config_file: Path | None) -> int:
    """Run the agent until SIGTERM or SIGINT; return the exit status. Without a file: /etc/kvmhv/agent.toml if any."""
    if config_file is None and DEFAULT_CONFIG.exists():
        config_file = DEFAULT_CONFIG
    try:
        config = load(config_file)
        logs.configure(config.log_format, config.log_level)
        asyncio.run(serve(config))
    except KvmhvError as error:
        sys.stderr.write(f"kvmhv agent: {error.message} ({error.code})\n  {error.todo}\n")
        return error.exit_status
    return 0


async def serve(config: Config) -> None:
    """Run the agent until SIGTERM or SIGINT; every VM runs on afterwards. Raises KvmhvError if it cannot start."""
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    if re.match(VM_NAME_PATTERN, config.name) is None:
        raise CallerError("config-invalid", f"name: {config.name!r} is no name for a host", "letters, digits, . _ -")
    with only_agent(config):
        database = Database(config.state_path / "kvmhv.sqlite", config.run_path / "journal", config.limits.moves_kept)
        with contextlib.closing(database):
            services = compose(config, database)
            listener = Listener(services)
            async with asyncio.TaskGroup() as tasks:
                lag = tasks.create_task(services.metrics.watch_loop_lag())
                try:
                    await listener.start()
                    log.info("agent ready", host=config.name, listen=config.listen, version=kvmhv.__version__)
                    systemd.notify("READY=1")
                    await stopping.wait()
                    systemd.notify("STOPPING=1")
                    log.info("agent stopping; VMs run on")
                finally:
                    lag.cancel()
                    await listener.close()


def compose(config: Config, database: Database) -> Services:
    """Make every part of the agent and join them."""
    clock = HostClock()
    settings = Settings(database, config)
    metrics = Metrics(kvmhv.__version__, config.name)
    identity = certificate.load_or_make(config.state_path / "identity", config.name)
    trust = Trust(database, identity, config.limits.peers)
    peer = Peer(trust, config.limits.peer_frame_bytes)
    disks = Directories(config)
    network: Any = Absent("the network")
    hypervisor: Any = Absent("QEMU")
    moves: Any = Absent("moves")
    return Services(
        config=config,
        settings=settings,
        host=HostView(
            config=config,
            host_id=host_id(database),
            settings=settings,
            trust=trust,
            hypervisor=hypervisor,
            disks=disks,
            network=network,
            moves=moves.list,
        ),
        trusting=Trusting(trust, Invitations(config.name, trust.fingerprint, clock), peer, config.advertise),
        tokens=Tokens(database, clock, config.limits.tokens),
        peer=peer,
        metrics=metrics,
        vms=Absent("VMs"),
        images=Absent("images"),
        moves=moves,
        doctor=Absent("the doctor"),
    )


@contextlib.contextmanager
def only_agent(config: Config) -> Iterator[None]:
    """Hold the lock of the state directory. Raises HostError `agent-runs` if another agent has it."""
    try:
        config.state_path.mkdir(parents=True, exist_ok=True, mode=0o700)
        config.run_path.mkdir(parents=True, exist_ok=True, mode=0o755)
        lock = (config.state_path / "agent.lock").open("w")
    except OSError as error:
        raise HostError("state-dir", str(error), "see state_dir and run_dir in agent.toml") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise HostError(
                "agent-runs", f"another agent works on {config.state_path}", "stop it, or give this one its own"
            ) from error
        yield


def host_id(records: Records) -> str:
    """Return this host's id, made at the first start."""
    kept = records.get("host", "id")
    if kept is None:
        kept = str(uuid.uuid4()).encode()
        records.put("host", "id", kept)
    return kept.decode()
