"""What an agent with much to look after costs: memory with fifty running VMs, answers with 500 VMs and 1,000 moves.

Each in a lab of its own. The past moves are copies of one that was made: an agent reads them as it reads any other.
"""

import http.client
import json
import socket
import time
import uuid
from statistics import median
from typing import Any

from kvmhv.errors import HostError
from kvmhv.lab.bench import figures, meters
from kvmhv.lab.bench.product import kvmhv
from kvmhv.lab.lab import Lab, LabHost
from kvmhv.lab.steps import Progress

VMS = 50
DEFINED = 500
PAST = 1000
TIMES = 9
ASKED = {"vms": "list of VMs", "moves": "list of moves", "/metrics": "metrics"}
COPY_MOVES = """
import json, sqlite3, sys
database = sqlite3.connect("/var/lib/kvmhv/kvmhv.sqlite")
(report,) = database.execute("SELECT report FROM moves ORDER BY number DESC LIMIT 1").fetchone()
move = json.loads(report)["id"]
for other in sys.stdin.read().split():
    database.execute(
        "INSERT INTO moves (move, role, report) VALUES (?, 'source', ?)",
        (other, report.replace(move.encode(), other.encode())),
    )
database.commit()
"""


def measure(name: str, progress: Progress) -> tuple[list[dict[str, Any]], dict[str, list[float]]]:
    """Return what was measured, each with its limit, and every answer's time. Raises HostError `bench-step`."""
    memory_mib = agent_bytes(name, progress) / 1048576
    found = [figures.limit(f"resident memory of an agent with {VMS} running VMs", memory_mib, "MiB", 90.0)]
    what = f"of an agent with {DEFINED} VMs and {PAST} past moves"
    answers = answers_s(name, progress)
    for path, seconds in answers.items():
        found.append(figures.limit(f"{ASKED[path]} {what}", median(seconds) * 1000, "ms", 100.0))
    return found, answers


def agent_bytes(name: str, progress: Progress) -> int:
    """Return the resident memory of an agent whose fifty VMs run. HostError `bench-step` when one does not start."""
    progress(f"an agent with {VMS} running VMs")
    lab = Lab.up(name, hosts=("host1",), progress=progress)
    try:
        for number in range(VMS):
            kvmhv(lab, "host1", "vm", "create", f"vm{number:02}", "--memory", "16M", "--disk", "size=1M", "--start")
        kvmhv(lab, "host1", "vm", "list")
        return meters.resident_bytes(meters.agent_pid(lab.host("host1")))
    finally:
        lab.down()


def answers_s(name: str, progress: Progress) -> dict[str, list[float]]:
    """Return how long the agent takes to answer, by what it is asked."""
    progress(f"an agent with {DEFINED} VMs and {PAST} past moves")
    lab = Lab.up(name, progress=progress)
    try:
        host = lab.host("host1")
        kvmhv(lab, "host1", "vm", "create", "vm", "--memory", "16M", "--disk", "size=1M", "--start")
        kvmhv(lab, "host1", "vm", "move", "vm", "--to", "host2", "--include-storage")
        host.agent_stop()
        host.exec(["python3", "-c", COPY_MOVES], text=" ".join(str(uuid.uuid4()) for _ in range(PAST - 1)))
        host.agent_start()
        for number in range(DEFINED):
            _answer(host, "vms", {"name": f"vm{number:03}", "memory_bytes": 16 << 20})
        return {path: [_answer(host, path) for _ in range(TIMES)] for path in ASKED}
    finally:
        lab.down()


class _Connection(http.client.HTTPConnection):
    """HTTP over the agent's socket."""

    def __init__(self, host: LabHost) -> None:
        super().__init__("localhost", timeout=60)
        self._path = str(host.socket)

    def connect(self) -> None:
        """Connect to the socket."""
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(self._path)


def _answer(host: LabHost, path: str, body: object = None) -> float:
    """Return how long a whole answer takes, which must not be an error."""
    connection = _Connection(host)
    started_s = time.monotonic()
    content = None if body is None else json.dumps(body)
    where = path if path.startswith("/") else f"/v1/{path}"
    connection.request("GET" if body is None else "POST", where, content, {"Content-Type": "application/json"})
    response = connection.getresponse()
    said = response.read()
    seconds = time.monotonic() - started_s
    connection.close()
    if response.status >= 400:
        raise HostError("bench-step", f"{path}: {said.decode(errors='replace')[:500]}")
    return seconds
