"""The demo between two real hosts: a small VM moves to another host and back, by the commands that people type.

Runs on one of the hosts, as root: it reads the guest's console where the agent keeps it. The guest is the boot-sector
guest of vm-images/: it dirties memory, and verifies every page that it comes back to.
"""

import json
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kvmhv.errors import CallerError, HostError
from kvmhv.lab.guest_images import write_boot_guest

GUEST = Path("/usr/local/share/kvmhv/demo.img")
"""Where packaging/install-host --demo puts the guest."""
VM = "kvmhv-demo"
MEMORY = "64M"
WORKING_SET_BYTES = 16 * 1024**2
RATE_BYTES_PER_S = 4 * 1024**2
READY_S = 180.0
"""A guest's start may take so long; hosts that are guests themselves, without KVM, are slow."""
_BEAT = re.compile(r"^beat (\d+) passes \d+ errors (\d+)", re.MULTILINE)


class HostDemo:
    """One run from this host to `target` and back, the disk on `location` ("": on the hosts' own disks)."""

    def __init__(self, target: str, location: str, guest: Path, say: Callable[[str], None]) -> None:
        self._target = target
        self._location = location
        self._guest = guest
        self._say = say

    def run(self) -> list[dict[str, Any]]:
        """Return the reports of the moves that were made; the VM is gone afterwards, whatever happened.

        Raises CallerError `demo-guest` (no guest's disk), `demo-vm-exists`; HostError `demo-step` with what a command
        said, `demo-damaged` when the guest found its memory damaged or was booted anew.
        """
        if not self._guest.is_file():
            todo = "packaging/install-host --demo builds it; or name one with --guest"
            raise CallerError("demo-guest", f"there is no {self._guest}", todo)
        here = self._ask("host", "show")["name"]
        for host in (here, self._target):
            if any(vm["name"] == VM for vm in self._ask("--host", host, "vm", "list")):
                todo = f"kvmhv --host {host} vm stop {VM} --force; kvmhv --host {host} vm remove {VM}"
                raise CallerError("demo-vm-exists", f"{host} has a VM {VM}, perhaps of a demo before", todo)
        try:
            self._create()
            first = self._beats()[0]
            reports = [self._move(here, self._target)]
            if reports[0]["outcome"] == "done":
                reports.append(self._move(self._target, here))
                self._verify(first)
            return reports
        finally:
            self._remove(here)

    def _create(self) -> None:
        location = f",location={self._location}" if self._location else ""
        with tempfile.TemporaryDirectory() as directory:
            disk = Path(directory) / "boot.raw"
            write_boot_guest(disk, self._guest, working_set_bytes=WORKING_SET_BYTES, rate_bytes_per_s=RATE_BYTES_PER_S)
            spec = f"file={disk},format=raw{location}"
            self._run("vm", "create", VM, "--memory", MEMORY, "--disk", spec, "--start")
        deadline = time.monotonic() + READY_S
        while not self._beats():
            if time.monotonic() > deadline:
                raise HostError("demo-step", f"the guest did not start within {READY_S:.0f} s", "kvmhv vm console")
            time.sleep(0.2)

    def _move(self, source: str, target: str) -> dict[str, Any]:
        options = [] if self._location else ["--include-storage"]
        self._run("--host", source, "vm", "move", VM, "--to", target, *options, check=False)
        newest: dict[str, Any] = self._ask("--host", source, "move", "list")[-1]
        return newest

    def _verify(self, first: int) -> None:
        """Look at what the guest has said since it came back."""
        deadline = time.monotonic() + READY_S
        while not (beats := self._beats()) and time.monotonic() < deadline:
            time.sleep(0.2)
        said = self._console()
        errors = [int(found[2]) for found in _BEAT.finditer(said)]
        if "BOOT " in said or not beats or beats[-1] <= first or any(errors):
            raise HostError("demo-damaged", f"the guest is not as it was: {said[-200:]!r}", "report this, please")
        self._say(f"the guest goes on: beat {beats[-1]} (it left at {first}), no damaged page, not booted anew")

    def _beats(self) -> list[int]:
        return [int(found[1]) for found in _BEAT.finditer(self._console())]

    def _console(self) -> str:
        log = Path(self._ask("vm", "show", VM)["console"]).with_name("console.log")
        return log.read_text(errors="replace") if log.exists() else ""

    def _remove(self, here: str) -> None:
        for host in (here, self._target):
            if any(vm["name"] == VM for vm in self._ask("--host", host, "vm", "list")):
                self._run("--host", host, "vm", "stop", VM, "--force", check=False)
                self._run("--host", host, "vm", "remove", VM, check=False)

    def _ask(self, *arguments: str) -> Any:
        done = subprocess.run(_argv("--json", *arguments), capture_output=True, text=True, check=False)
        if done.returncode:
            raise HostError("demo-step", f"`kvmhv {shlex.join(arguments)}`: {done.stderr.strip()}", "try it by hand")
        return json.loads(done.stdout)

    def _run(self, *arguments: str, check: bool = True) -> None:
        """Show a command and run it on the terminal."""
        self._say(f"$ kvmhv {shlex.join(arguments)}")
        done = subprocess.run(_argv(*arguments), check=False)
        if check and done.returncode:
            text = f"`kvmhv {shlex.join(arguments)}` ended with status {done.returncode}"
            raise HostError("demo-step", text, "see what it said; try it by hand")


def _argv(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "kvmhv", *arguments]
