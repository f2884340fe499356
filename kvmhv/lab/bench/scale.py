"""How much memory an agent needs for fifty running VMs, in a lab of its own."""

import os
import subprocess
import sys

from kvmhv.errors import HostError
from kvmhv.lab.bench import meters
from kvmhv.lab.lab import Lab
from kvmhv.lab.steps import Progress

VMS = 50


def agent_bytes(name: str, progress: Progress) -> int:
    """Return the resident memory of an agent whose fifty VMs run. HostError `bench-step` when one does not start."""
    progress(f"an agent with {VMS} running VMs")
    lab = Lab.up(name, hosts=("host1",), progress=progress)
    try:
        for number in range(VMS):
            _kvmhv(lab, "vm", "create", f"vm{number:02}", "--memory", "16M", "--disk", "size=1M", "--start")
        _kvmhv(lab, "vm", "list")
        return meters.resident_bytes(meters.agent_pid(lab.host("host1")))
    finally:
        lab.down()


def _kvmhv(lab: Lab, *arguments: str) -> None:
    argv = [sys.executable, "-m", "kvmhv", "--host", "host1", *arguments]
    environment = {**os.environ, "KVMHV_LAB": lab.name}
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode:
        raise HostError("bench-step", f"kvmhv {' '.join(arguments)}: {done.stderr.strip()}")
