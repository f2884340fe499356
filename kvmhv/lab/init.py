"""PID 1 of a host: reaps what others leave, and keeps the agent running as systemd would.

Runs in the host's tree, standard library only. The agent is started at boot where /etc/kvmhv/agent.toml is, and again
0.2 s after it ended, unless it was stopped on request. QEMU processes belong to nobody here: they outlive the agent
and die with the host. An agent that gives up by itself ten times in a row, each time within a second, is left alone.

Requests come over a UNIX socket, one JSON object a line: {"do": "status"} or agent-start, agent-stop, agent-kill;
the answer is {"agent": {"wanted", "pid", "starts", "gave_up"}}, for a stop or a kill when the agent has ended.
"""

import json
import os
import selectors
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

CONTROL = Path("/run/lab/init.sock")
AGENT_CONFIG = Path("/etc/kvmhv/agent.toml")
AGENT = ["/usr/local/bin/kvmhv", "agent", "--config", str(AGENT_CONFIG)]
LOG = Path("/var/log/kvmhv/agent.log")
LOG_LIMIT_BYTES = 16 * 1024 * 1024
RESTART_DELAY_S = 0.2
STOP_TIMEOUT_S = 10.0
QUICK_END_S = 20.0  # on a busy machine Python alone takes seconds
MAX_QUICK_ENDS = 4
REQUEST_LIMIT_BYTES = 4096
REQUEST_TIMEOUT_S = 5.0


class Agent:
    """The supervised agent: whether it is wanted, its process, and when to start or to kill it next."""

    def __init__(self) -> None:
        self.wanted = False
        self.pid: int | None = None
        self.starts = 0
        self.started_at = 0.0
        self.start_at: float | None = None
        self.kill_at: float | None = None
        self.quick_ends = 0

    def want(self) -> None:
        """Start the agent unless it runs, and from now on again whenever it ends."""
        self.wanted = True
        self.quick_ends = 0
        if self.pid is None:
            self.start_at = time.monotonic()

    def stop(self) -> None:
        """Ask the agent to end and do not start it again; it is killed when it takes longer than 10 s."""
        self.wanted = False
        self.start_at = None
        if self.pid is not None:
            os.kill(self.pid, signal.SIGTERM)
            self.kill_at = time.monotonic() + STOP_TIMEOUT_S

    def kill(self) -> None:
        """Kill the agent as a crash would; it is started again when it is wanted."""
        if self.pid is not None:
            os.kill(self.pid, signal.SIGKILL)

    def ended(self, status: int) -> None:
        """Take note of the end of the process."""
        now = time.monotonic()
        note(f"agent {self.pid} ended with {os.waitstatus_to_exitcode(status)}")
        gave_up_quickly = os.WIFEXITED(status) and now - self.started_at < QUICK_END_S
        self.quick_ends = self.quick_ends + 1 if gave_up_quickly else 0
        self.pid = self.kill_at = None
        if not self.wanted:
            return
        if self.quick_ends < MAX_QUICK_ENDS:
            self.start_at = now + RESTART_DELAY_S
        else:
            note(f"agent ended {self.quick_ends} times in a row as soon as it was started: not started again")

    def due(self) -> None:
        """Do what the time has come for."""
        now = time.monotonic()
        if self.start_at is not None and now >= self.start_at:
            self.start_at = None
            self.start()
        if self.kill_at is not None and now >= self.kill_at:
            self.kill_at = None
            self.kill()

    def start(self) -> None:
        """Start the process in a session of its own, its output into the log."""
        LOG.parent.mkdir(parents=True, exist_ok=True)
        if LOG.exists() and LOG.stat().st_size > LOG_LIMIT_BYTES:
            LOG.replace(LOG.with_suffix(".log.1"))
        log = os.open(LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o640)
        null = os.open(os.devnull, os.O_RDONLY)
        actions = [(os.POSIX_SPAWN_DUP2, null, 0), (os.POSIX_SPAWN_DUP2, log, 1), (os.POSIX_SPAWN_DUP2, log, 2)]
        try:
            self.pid = os.posix_spawn(
                AGENT[0], AGENT, os.environ, file_actions=actions, setsid=True, setsigmask=[], setsigdef=signal_set()
            )
        finally:
            os.close(log)
            os.close(null)
        self.starts += 1
        self.started_at = time.monotonic()

    def seconds_to_next(self) -> float | None:
        """Return the seconds until `due` has something to do, None for never."""
        times = [moment for moment in (self.start_at, self.kill_at) if moment is not None]
        return max(0.0, min(times) - time.monotonic()) if times else None

    def status(self) -> dict[str, Any]:
        """Return the answer to every request."""
        return {
            "agent": {
                "wanted": self.wanted,
                "pid": self.pid,
                "starts": self.starts,
                "gave_up": self.quick_ends >= MAX_QUICK_ENDS,
            }
        }


def signal_set() -> list[signal.Signals]:
    """Return the signals whose handling a child must not inherit."""
    return [signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGPIPE]


def note(text: str) -> None:
    """Say something in the boot log."""
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} {text}\n")
    sys.stderr.flush()


class Init:
    """The one loop: children, requests and times."""

    def __init__(self) -> None:
        self.agent = Agent()
        self.waiting: list[socket.socket] = []
        self.selector = selectors.DefaultSelector()
        self.requests = self._listen()

    def _listen(self) -> socket.socket:
        CONTROL.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(str(CONTROL))
        listener.listen(16)
        listener.setblocking(False)
        self.selector.register(listener, selectors.EVENT_READ)
        return listener

    def run(self) -> None:
        """Serve until the kernel ends this host."""
        wake_read, wake_write = os.pipe()
        for end in (wake_read, wake_write):
            os.set_blocking(end, False)
        signal.signal(signal.SIGCHLD, lambda _number, _frame: None)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        self.selector.register(wake_read, selectors.EVENT_READ)
        if AGENT_CONFIG.exists():
            self.agent.want()
        while True:
            self.reap()
            self.agent.due()
            self.answer_waiting()
            for key, _events in self.selector.select(self.agent.seconds_to_next()):
                if key.fileobj is self.requests:
                    self.serve()
                else:
                    os.read(wake_read, 512)

    def reap(self) -> None:
        """Take the exit status of every child that ended, ours or inherited, or it stays a zombie."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid == self.agent.pid:
                self.agent.ended(status)

    def serve(self) -> None:
        """Answer one request; a caller that says nothing for 5 s is let go."""
        connection, _ = self.requests.accept()
        connection.settimeout(REQUEST_TIMEOUT_S)
        try:
            request = json.loads(connection.makefile("rb").readline(REQUEST_LIMIT_BYTES))["do"]
        except (OSError, ValueError, KeyError, TypeError):
            connection.close()
            return
        actions = {"agent-start": self.agent.want, "agent-stop": self.agent.stop, "agent-kill": self.agent.kill}
        if request in actions:
            actions[request]()
        if request in {"agent-stop", "agent-kill"} and self.agent.pid is not None:
            self.waiting.append(connection)
        else:
            self.answer(connection)

    def answer_waiting(self) -> None:
        """Answer those who wait for the agent's end, when it has ended."""
        if self.agent.pid is None:
            for connection in self.waiting:
                self.answer(connection)
            self.waiting.clear()

    def answer(self, connection: socket.socket) -> None:
        """Send the status; a caller who went away misses it."""
        try:
            connection.sendall(json.dumps(self.agent.status()).encode() + b"\n")
        except OSError as error:
            note(f"an answer was not taken: {error}")
        connection.close()


def main() -> None:
    """Be PID 1."""
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    Init().run()


if __name__ == "__main__":
    main()
