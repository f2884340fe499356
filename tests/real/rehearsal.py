"""Puts the agents that a test can hold (held_agent.py) onto a lab's hosts, with short patience, and takes them off."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kvmhv.lab import agents
from kvmhv.lab.lab import Lab
from kvmhv.lab.plan import AGENT_HOSTS

PROGRAM = "/opt/held_agent.py"
CONFIG = "/etc/kvmhv/held.toml"
LAUNCHER = "/usr/local/bin/kvmhv"
KEPT = f"{LAUNCHER}.kept"
HASTY = """
[limits]
qmp_timeout_s = 5.0
[timeouts]
answer_s = 15.0
prepare_s = 40.0
memory_idle_s = 8.0
storage_idle_s = 8.0
switchover_s = 20.0
grant_s = 6.0
reconnect_s = 8.0
undo_s = 10.0
"""
IN_ITS_PLACE = f"""#!/bin/sh
[ "$1" = agent ] || exec {KEPT} "$@"
export PYTHONPATH=/opt/kvmhv/src PYTHONPYCACHEPREFIX=/var/cache/kvmhv/pycache PYTHONUNBUFFERED=1
exec /opt/kvmhv/venv/bin/python {PROGRAM} {CONFIG}
"""
MANY = ("migration.moves_out=20", "migration.moves_in=20", "migration.storage_copies=20")
FEW = ("migration.moves_out=2", "migration.moves_in=2", "migration.storage_copies=2")


@contextmanager
def held_agents(lab: Lab) -> Iterator[None]:
    """Let the lab's hosts run agents that can be held, also after they are killed or the host is."""
    for name in AGENT_HOSTS:
        host = lab.host(name)
        host.agent_stop()
        host.exec(["sh", "-c", f"cat > {CONFIG}"], text=_config(lab, name))
        host.exec(["sh", "-c", f"cat > {PROGRAM}"], text=Path(__file__).with_name("held_agent.py").read_text())
        host.exec(["mv", LAUNCHER, KEPT])
        host.exec(["sh", "-c", f"cat > {LAUNCHER}; chmod 755 {LAUNCHER}"], text=IN_ITS_PLACE)
        host.agent_start()
        host.exec(["kvmhv", "host", "set", *MANY])
    try:
        yield
    finally:
        for name in AGENT_HOSTS:
            host = lab.host(name)
            host.agent_stop()
            host.exec(["sh", "-c", f"mv {KEPT} {LAUNCHER}; rm -rf {PROGRAM} {CONFIG} /run/hold"])
            host.agent_start()
            host.exec(["kvmhv", "host", "set", *FEW])


def _config(lab: Lab, host: str) -> str:
    return agents.config_text(lab.plan, host) + HASTY
