"""The directory of what must survive a reboot: one agent at a time works on it."""

import contextlib
import fcntl
import uuid
from collections.abc import Iterator

from kvmhv.config import Config
from kvmhv.errors import HostError
from kvmhv.ports import Records


@contextlib.contextmanager
def locked(config: Config) -> Iterator[None]:
    """Make the state and run directories and hold their lock until the end.

    Raises HostError `agent-runs` if another agent has it, `state-dir` if they cannot be made. The kernel drops the lock
    with the agent, however it ends; QEMU processes do not inherit it.
    """
    try:
        config.state_path.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not config.run_path.exists():
            config.run_path.mkdir(parents=True)
            config.run_path.chmod(0o755)  # whoever may use the socket must reach it
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
