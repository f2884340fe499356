"""The agents of a lab: their configuration, and the trust between them, made with the product's own two commands."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from kvmhv.config import PORT
from kvmhv.errors import HostError
from kvmhv.lab.control import ask, tail
from kvmhv.lab.plan import LabPlan
from kvmhv.lab.state import data_dir, run_dir

CONFIG_PATH = "/etc/kvmhv/agent.toml"
START_TIMEOUT_S = 60.0


def config_text(plan: LabPlan, host: str) -> str:
    """Return agent.toml of a host."""
    subnet = {network.name: network.subnet for network in plan.networks}
    return (
        f'name = "{host}"\n'
        f'listen = "0.0.0.0:{PORT}"\n'
        f'advertise = "{plan.host(host).addresses["management"]}:{PORT}"\n'
        'state_dir = "/var/lib/kvmhv"\n'
        'run_dir = "/run/kvmhv"\n'
        f'migration_networks = ["{subnet["migration"]}"]\n'
        f'metrics_subnets = ["{subnet["management"]}", "{subnet["lan"]}"]\n'
        'switches = ["lan"]\n'
    )


def introduce(hosts: Sequence[str], run: Callable[[str, list[str]], str]) -> None:
    """Make the hosts trust the first one, and it them, and allow moves on all, as an operator would.

    `run` runs a command on a host and returns what it printed; its errors pass through.
    """
    for host in hosts[1:]:
        invitation = run(hosts[0], ["kvmhv", "host", "trust", "invite", "--json"])
        code = msgspec.json.decode(invitation, type=dict[str, Any])["code"]
        run(host, ["kvmhv", "host", "trust", "join", code])
    for host in hosts:
        run(host, ["kvmhv", "host", "set", "migration.enabled=true"])


def agent_log(lab: str, host: str) -> Path:
    """Return the agent's log, as the machine sees it; it is there also when the host does not run."""
    return data_dir(lab, host) / "upper/var/log/kvmhv/agent.log"


def wait_agent(lab: str, host: str) -> None:
    """Wait until an agent answers on its socket; HostError `lab-agent` with the end of its log when it does not."""
    deadline = time.monotonic() + START_TIMEOUT_S
    path = run_dir(lab, host) / "agent.sock"
    while not _listens(path):
        late = time.monotonic() > deadline
        if late or ask(lab, host, "status").gave_up:
            why = f"does not answer within {START_TIMEOUT_S:.0f} s" if late else "ends as soon as it is started"
            log = agent_log(lab, host)
            raise HostError("lab-agent", f"the agent of {host!r} {why}:\n{tail(log)}", f"its log: {log}", host=host)
        time.sleep(0.05)


def _listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        try:
            connection.connect(str(path))
        except OSError:
            return False
    return True
