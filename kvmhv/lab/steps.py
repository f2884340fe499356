"""Runs one step of a build: progress while it runs, its log when it fails, and nothing left when we are killed."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from kvmhv.errors import HostError
from kvmhv.lab.control import tail

Progress = Callable[[str], None]
_TICK_S = 10.0
# The step dies with us: unshare with this process, and all that it started with its PID namespace. What it mounts is
# in a mount namespace of its own, so nothing stays mounted either.
_CAGE = ("setpriv", "--pdeathsig", "KILL", "unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")


def silent(_message: str) -> None:
    """Show no progress."""


def run_step(
    what: str,
    argv: Sequence[str],
    *,
    log: Path,
    progress: Progress,
    todo: str,
    timeout_s: float,
    env: Mapping[str, str] | None = None,
) -> None:
    """Run a command as the step `what`; HostError `lab-step` with the end of its log when it fails or is too slow."""
    started = time.monotonic()
    progress(f"{what} ...")
    with log.open("ab") as output:
        step = subprocess.Popen(
            [*_CAGE, *argv], stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=env
        )
        try:
            status = _wait(step, what, progress, started, timeout_s)
        finally:
            if step.poll() is None:
                step.kill()
                step.wait()
    if status != 0:
        why = f"ended with status {status}" if status is not None else f"took longer than {timeout_s:.0f} s"
        raise HostError("lab-step", f"{what}: {argv[0]} {why}; the end of {log}:\n{tail(log)}", todo)
    progress(f"{what}: done in {time.monotonic() - started:.0f} s")


def _wait(step: subprocess.Popen[bytes], what: str, progress: Progress, started: float, timeout_s: float) -> int | None:
    while True:
        left_s = started + timeout_s - time.monotonic()
        if left_s <= 0:
            return None
        try:
            return step.wait(min(_TICK_S, left_s))
        except subprocess.TimeoutExpired:
            progress(f"{what} ... {time.monotonic() - started:.0f} s")
