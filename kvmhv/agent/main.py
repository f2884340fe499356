"""The agent as a process: configuration, log, lock, signals. What it consists of stands in `assembly.py`."""

import asyncio
import concurrent.futures.thread
import logging
import os
import re
import signal
import sys
import threading
from pathlib import Path

import structlog

from kvmhv.agent import logs, state_dir
from kvmhv.agent.assembly import Agent
from kvmhv.config import Config, load
from kvmhv.drivers import systemd
from kvmhv.errors import CallerError, KvmhvError
from kvmhv.model import VM_NAME_PATTERN

DEFAULT_CONFIG = Path("/etc/kvmhv/agent.toml")

IDLE = concurrent.futures.thread._worker.__code__
"""Where a thread of an executor is that has nothing to do."""

log = structlog.get_logger()


def run(config_file: Path | None) -> int:
    """Run the agent until SIGTERM or SIGINT; return the exit status. Without a file: /etc/kvmhv/agent.toml if any."""
    if config_file is None and DEFAULT_CONFIG.exists():
        config_file = DEFAULT_CONFIG
    os.umask(0o077)  # disks, journal and sockets are root's; what others may reach is opened where it is made
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
    if re.match(VM_NAME_PATTERN, config.name) is None:
        raise CallerError("config-invalid", f"name: {config.name!r} is no name for a host", "letters, digits, . _ -")
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    with state_dir.locked(config):
        agent = Agent(config)
        try:
            await agent.start()
            systemd.notify("READY=1")
            await stopping.wait()
            systemd.notify("STOPPING=1")
            log.info("agent stopping; VMs run on")
        finally:
            await agent.stop()
    if _thread_hangs():
        log.warning("a storage is silent; the agent ends without the threads that wait for it")
        logging.shutdown()
        os._exit(0)


def _thread_hangs() -> bool:
    """Whether a thread is at work still; Python would wait for it, and it waits for a share that is away."""
    frames = sys._current_frames()
    ours = (thread for thread in threading.enumerate() if thread.name.startswith(("location-", "asyncio_")))
    tops = (frames.get(thread.ident or 0) for thread in ours)
    return any(top is not None and top.f_code is not IDLE for top in tops)
