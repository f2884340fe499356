"""Lab and LabHost: what the CLI, the tests, the demo and the benchmarks use."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import msgspec

from kvmhv.errors import CallerError, HostError
from kvmhv.lab import agents, control, network, processes, tree
from kvmhv.lab import state as states
from kvmhv.lab.plan import (
    DEFAULT_HOSTS,
    STORAGE_HOST,
    STORAGE_TREE,
    SWITCH,
    LabPlan,
    check_lab_name,
    etc_hosts,
    make_plan,
    namespace,
)
from kvmhv.lab.state import LabState, data_dir, lab_lock, run_dir
from kvmhv.lab.steps import Progress, silent
from kvmhv.lab.storage_host import StorageHost

EXEC_TIMEOUT_S = 60.0


class Lab:
    """A lab that is up. Make one with `Lab.up`, find one with `Lab.open`."""

    def __init__(self, state: LabState) -> None:
        self.state = state
        self.plan: LabPlan = state.plan
        self.name: str = state.plan.name

    @classmethod
    def up(
        cls,
        name: str = "lab",
        *,
        rate: str | None = None,
        suites: Mapping[str, str] | None = None,
        hosts: Sequence[str] = DEFAULT_HOSTS,
        agents: bool = True,
        storage: bool = False,
        progress: Progress = silent,
    ) -> Lab:
        """Build what is missing and bring up a lab; `rate` (`400mbit`) is the speed of its migration network.

        `storage`: with the file server (storage_host.py). CallerError `lab-up` when it is up already. After any other
        error nothing of the lab is left.
        """
        if storage:
            hosts, suites = (*hosts, STORAGE_HOST), {**(suites or {}), STORAGE_HOST: STORAGE_TREE}
        plan = make_plan(name, rate=rate, suites=suites, hosts=hosts, agents=agents)
        _need_root()
        with lab_lock(name):
            if _is_up(name):
                raise CallerError("lab-up", f"lab {name!r} is up already", f"end it with: kvmhv lab down --lab {name}")
            _remove(name)
            try:
                lab = cls(_begin(plan, progress))
                lab._start(progress)
            except BaseException:
                _remove(name)
                raise
        return lab

    @classmethod
    def open(cls, name: str | None = None) -> Lab:
        """Return the lab of that name (KVMHV_LAB, or `lab`); CallerError `lab-down` when it is not up."""
        return cls(states.load(name or states.default_lab()))

    @property
    def hosts(self) -> list[LabHost]:
        """All hosts, in their order."""
        return [LabHost(self, host.name) for host in self.plan.hosts]

    def host(self, name: str) -> LabHost:
        """Return one host; CallerError `lab-host-unknown` when there is none of that name."""
        return LabHost(self, self.plan.host(name).name)

    def down(self) -> None:
        """End the lab and remove all of it."""
        down(self.name)

    def leftovers(self) -> list[str]:
        """Return what is still there of the lab, one sentence each; empty after `down`."""
        return leftovers(self.name)

    def status(self) -> dict[str, Any]:
        """Return the lab as `lab status --json` shows it."""
        hosts = [
            {"name": host.name, "state": host.state, "suite": host.plan.suite, "addresses": host.plan.addresses}
            for host in self.hosts
        ]
        networks = {net.name: {"subnet": net.subnet, "rate": net.rate} for net in self.plan.networks}
        return {"name": self.name, "state": "up", "hosts": hosts, "networks": networks}

    def evidence(self, directory: Path) -> None:
        """Copy what tells of the past into `directory`: logs, consoles and QMP logs of every host, running or not."""
        for host in self.hosts:
            place = data_dir(self.name, host.name)
            sources = [place / "upper/var/log/kvmhv", place / "data", run_dir(self.name, host.name)]
            for source in sources:
                _copy_logs(source, directory / host.name / source.name)
        for log in run_dir(self.name).glob("*.boot.log"):
            shutil.copy(log, directory / log.name)

    def _start(self, progress: Progress) -> None:
        started = time.monotonic()
        network.make_switch(self.plan)
        for host in self.hosts:
            host._launch()
        for host in self.hosts:
            control.wait_ready(self.name, host.name)
        if any(host.name == STORAGE_HOST for host in self.hosts):
            StorageHost(self).start(progress)
        with_agents = [host.name for host in self.hosts if host.plan.agent]
        if with_agents:
            progress("waiting for the agents, and making them trust each other ...")
            for name in with_agents:
                agents.wait_agent(self.name, name)
            agents.introduce(with_agents, lambda name, argv: self.host(name).exec(argv).stdout)
        self.state = msgspec.structs.replace(self.state, complete=True)
        states.write_state(self.state)
        names = ", ".join(host.name for host in self.hosts)
        progress(f"lab {self.name!r} is up in {time.monotonic() - started:.1f} s: {names}")


class LabHost:
    """One host of a lab. It has disk contents as long as the lab is up, and runs until it is killed."""

    def __init__(self, lab: Lab, name: str) -> None:
        self.lab = lab
        self.name = name
        self.plan = lab.plan.host(name)
        self.namespace: str = namespace(lab.name, name)

    @property
    def state(self) -> str:
        """`running`, `frozen` or `off`."""
        pid = processes.init_of(self.namespace)
        if pid is None:
            return "off"
        return "frozen" if processes.is_frozen(pid) else "running"

    @property
    def socket(self) -> Path:
        """The agent's UNIX socket, as the machine sees it."""
        return run_dir(self.lab.name, self.name) / "agent.sock"

    @property
    def agent_log(self) -> Path:
        """The agent's log, as the machine sees it."""
        return agents.agent_log(self.lab.name, self.name)

    def argv(self, argv: Sequence[str]) -> list[str]:
        """Return the command line that runs `argv` on this host; HostError `lab-host-off`, `lab-host-frozen`."""
        return control.enter_argv(self.lab.name, self.name, argv)

    def exec(
        self, argv: Sequence[str], timeout_s: float = EXEC_TIMEOUT_S, *, check: bool = True, text: str = ""
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on this host and return what it said; `text` is its standard input.

        HostError `lab-exec` when `check` and its exit status is not 0, and when it takes longer than `timeout_s` (it
        is then killed).
        """
        try:
            done = subprocess.run(
                self.argv(argv), input=text, capture_output=True, text=True, timeout=timeout_s, check=False
            )
        except subprocess.TimeoutExpired as error:
            message = f"`{' '.join(argv)}` took longer than {timeout_s:.0f} s on {self.name}"
            raise HostError("lab-exec", message, host=self.name) from error
        if check and done.returncode:
            said = (done.stderr or done.stdout).strip()
            message = f"`{' '.join(argv)}` ended with status {done.returncode} on {self.name}: {said}"
            raise HostError("lab-exec", message, host=self.name)
        return done

    def popen(
        self,
        argv: Sequence[str],
        *,
        stdin: int | IO[bytes] | None = subprocess.DEVNULL,
        stdout: int | IO[bytes] | None = None,
        stderr: int | IO[bytes] | None = None,
    ) -> subprocess.Popen[bytes]:
        """Start a command on this host; to kill the returned process kills the command (with SIGKILL) too."""
        return subprocess.Popen(self.argv(argv), stdin=stdin, stdout=stdout, stderr=stderr)

    def path(self, inside: str) -> Path:
        """Return the machine's path to a file of this running host. Absolute links in it lead astray."""
        return Path(f"/proc/{control.init_pid(self.lab.name, self.name)}/root") / inside.lstrip("/")

    def kill(self) -> None:
        """Take the power away: its cables are dead first, so that its peers hear nothing, then all of it is killed."""
        with lab_lock(self.lab.name):
            if self.state != "off":
                self._set_ports([net.name for net in self.lab.plan.networks], up=False)
            processes.kill_all(self.namespace)
            network.unplug(self.lab.plan, self.name)

    def boot(self) -> None:
        """Boot again with the same disk contents and addresses; CallerError `lab-host-on` when it runs."""
        with lab_lock(self.lab.name):
            if self.state != "off":
                raise CallerError("lab-host-on", f"host {self.name!r} runs already", "kill it first", host=self.name)
            network.unplug(self.lab.plan, self.name)
            self._launch()
            control.wait_ready(self.lab.name, self.name)
        if self.plan.agent:
            agents.wait_agent(self.lab.name, self.name)

    def freeze(self) -> None:
        """Stop all its processes, as a host that hangs; its kernel still answers pings and acknowledges TCP."""
        processes.freeze_all(self.namespace)

    def thaw(self) -> None:
        """Let all its processes go on."""
        processes.thaw_all(self.namespace)

    def cut(self, name: str) -> None:
        """Pull its cable out of a network; CallerError `lab-network-unknown`."""
        self._set_ports([self.lab.plan.network(name).name], up=False)

    def mend(self, name: str) -> None:
        """Put its cable back into a network."""
        self._set_ports([self.lab.plan.network(name).name], up=True)

    def agent_status(self) -> control.AgentStatus:
        """Return how PID 1 sees the agent."""
        return control.ask(self.lab.name, self.name, "status")

    def agent_kill(self) -> None:
        """Kill the agent as a crash would; it is dead on return and started again 0.2 s later. Its VMs run on."""
        control.ask(self.lab.name, self.name, "agent-kill")

    def agent_wait(self) -> None:
        """Wait until the agent answers on its socket; HostError `lab-agent` when it does not in 60 s."""
        agents.wait_agent(self.lab.name, self.name)

    def agent_stop(self) -> None:
        """Stop the agent and wait for its end (it is killed after 10 s); it stays stopped. Its VMs run on."""
        control.ask(self.lab.name, self.name, "agent-stop")

    def agent_start(self) -> None:
        """Start the agent unless it runs, and wait until it answers; HostError `lab-agent` when it does not."""
        control.ask(self.lab.name, self.name, "agent-start")
        agents.wait_agent(self.lab.name, self.name)

    def _set_ports(self, networks: Sequence[str], *, up: bool) -> None:
        network.set_ports(self.lab.plan, self.name, networks, up=up)

    def _launch(self) -> None:
        """Plug the host in and start its PID 1 in a session of its own, with fresh runtime files."""
        plan = self.lab.plan
        runtime = run_dir(plan.name, self.name)
        if runtime.exists():
            shutil.rmtree(runtime)
        runtime.mkdir(mode=0o700)
        network.plug(plan, self.name)
        spec = run_dir(plan.name) / f"{self.name}.json"
        spec.write_text(json.dumps(self._spec()))
        stage = [sys.executable, "-I", "-S", str(tree.package_dir() / "lab/root.py"), str(spec)]
        own = ["unshare", "--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child"]
        enter = ["nsenter", f"--net={states.NETNS_DIR / self.namespace}"]
        with states.boot_log(plan.name, self.name).open("ab") as log:
            subprocess.run(
                ["setsid", "--fork", *enter, *own, *stage],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                check=True,
            )

    def _spec(self) -> dict[str, Any]:
        plan = self.lab.plan
        files = {
            "/etc/hostname": f"{self.name}\n",
            "/etc/machine-id": f"{self.plan.machine_id}\n",
            "/etc/hosts": etc_hosts(plan),
        }
        first = {agents.CONFIG_PATH: agents.config_text(plan, self.name)} if self.plan.agent else {}
        return {
            "tree": self.lab.state.trees[self.plan.suite],
            "directory": str(data_dir(plan.name, self.name)),
            "run_dir": str(run_dir(plan.name, self.name)),
            "package": str(tree.package_dir()),
            "hostname": self.name,
            "files": files,
            "files_of_first_boot": first,
        }


def down(name: str | None = None, progress: Progress = silent) -> bool:
    """End a lab, whatever state it is in, and remove all of it; return whether there was anything to remove."""
    name = name or states.default_lab()
    _need_root()
    with lab_lock(name):
        found = bool(leftovers(name))
        _remove(name, progress)
    return found


def status(name: str) -> dict[str, Any]:
    """Return a lab as `lab status --json` shows it; `state` is `up`, `half-made` or `down` (then without hosts)."""
    check_lab_name(name)
    if _is_up(name):
        return Lab.open(name).status()
    state = "half-made" if leftovers(name) else "down"
    return {"name": name, "state": state, "hosts": [], "networks": {}}


def leftovers(name: str) -> list[str]:
    """Return what is there of a lab, one sentence each: processes, namespaces, files."""
    found: list[str] = []
    for space in network.namespaces_of(name):
        found.append(f"network namespace {space}")
        found += [f"process {pid} in {space}: {_command(pid)}" for pid in processes.in_namespace(space)]
    found += [f"files in {directory}" for directory in (run_dir(name), data_dir(name)) if directory.exists()]
    mounts = Path("/proc/self/mounts").read_text().splitlines()
    prefixes = (f"{run_dir(name)}/", f"{data_dir(name)}/")
    found += [f"mount {line.split()[1]}" for line in mounts if line.split()[1].startswith(prefixes)]
    return found


def _begin(plan: LabPlan, progress: Progress) -> LabState:
    """Write down what is to be made, before anything is, with its trees (built when they are missing)."""
    suites = {host.suite for host in plan.hosts}
    with tree.cache_lock():
        trees = tree.ensure_trees(suites, progress)
        boot_id = states.machine_boot_id()
        state = LabState(plan, {suite: str(path) for suite, path in trees.items()}, boot_id)
        states.write_state(state)
    return state


def _is_up(name: str) -> bool:
    try:
        states.load(name)
    except CallerError:
        return False
    return True


def _remove(name: str, progress: Progress = silent) -> None:
    spaces = network.namespaces_of(name)
    _each(spaces, processes.kill_all)
    # The hosts first: their ends of the links go, and then the switch has nothing left to tell them.
    _each(sorted(spaces, key=lambda space: space.endswith(f"-{SWITCH}")), network.remove_namespace)
    states.remove_files(name)
    progress(f"lab {name!r} is down")


def _each(spaces: Sequence[str], act: Callable[[str], None]) -> None:
    for space in spaces:
        act(space)


def _copy_logs(source: Path, target: Path) -> None:
    for path in source.rglob("*"):
        if path.suffix in {".log", ".1"} and path.is_file() and not path.is_symlink():
            copy = target / path.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy)


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return "ended just now"


def _need_root() -> None:
    if os.geteuid() != 0:
        raise CallerError("lab-root", "a lab needs root: it makes namespaces and mounts", "run it with sudo")
