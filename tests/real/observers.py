"""Who looks at a move from outside: frames on the lab's switch, and a Prometheus that scrapes both agents."""

import contextlib
import http.client
import itertools
import json
import socket
import subprocess
import sys
import time
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kvmhv.config import PORT
from kvmhv.lab import plan as plans
from kvmhv.lab.lab import Lab
from tests.real.moving import Side, until

SNIFF = r"""
import socket, struct, sys, time

mac, ports = bytes.fromhex(sys.argv[1].replace(":", "")), sys.argv[2:]
sniffer = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
sniffer.setsockopt(socket.SOL_SOCKET, 35, 1)
sniffer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 24)
print("listening", flush=True)
while True:
    frame, extras, _, where = sniffer.recvmsg(64, 64)
    if where[0] in ports and where[2] != 4 and frame[6:12] == mac and frame[12:14] != b"\x80\x35":
        seconds, nanoseconds = struct.unpack("qq", extras[0][2])
        age_s = time.time() - seconds - nanoseconds / 1e9
        print(f"{(time.monotonic() - age_s) * 1000:.3f}", flush=True)
"""
SETTINGS = Path(__file__).parent.parent.parent / "packaging" / "prometheus"
READY = "http://127.0.0.1:9090"


def scrape(side: Side) -> str:
    """Return what a host's agent says to a scrape now."""
    return get(side, "/metrics")


def get(side: Side, path: str) -> str:
    """Return what a host's agent answers there."""
    asked = http.client.HTTPConnection("localhost", timeout=20)
    asked.sock = socket.socket(socket.AF_UNIX)
    asked.sock.connect(str(side.host.socket))
    with contextlib.closing(asked):
        asked.request("GET", path)
        return asked.getresponse().read().decode()


class Sniffer:
    """When the switch saw frames of a guest, in the clock that all hosts of a lab share. QEMU's RARP does not count."""

    def __init__(self, lab: Lab, mac: str, file: Path) -> None:
        space = plans.namespace(lab.plan.name, plans.SWITCH)
        ports = [plans.port(name, "lan") for name in plans.AGENT_HOSTS]
        self._file = file
        with file.open("wb") as seen:
            self._process = subprocess.Popen(
                ["ip", "netns", "exec", space, sys.executable, "-c", SNIFF, mac, *ports], stdout=seen
            )
        until("the sniffer listens", lambda: file.read_text().startswith("listening"))

    def silence(self, begin_ms: float, end_ms: float) -> tuple[float, float]:
        """Return the last frame before, and the first after the longest silence that lies in or around that time."""
        times = [float(line) for line in self._file.read_text().splitlines()[1:]]
        there = [pair for pair in itertools.pairwise(times) if pair[0] <= end_ms and pair[1] >= begin_ms]
        return max(there, key=lambda pair: pair[1] - pair[0])

    def end(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()


class Prometheus:
    """A Prometheus on the client host, with the example configuration and rules."""

    def __init__(self, lab: Lab) -> None:
        self._space = ["ip", "netns", "exec", plans.namespace(lab.plan.name, "client")]

    def query(self, query: str, at_s: float | None = None) -> list[dict[str, Any]]:
        """Return the result of an instant query."""
        asked = {"query": query} if at_s is None else {"query": query, "time": f"{at_s:.3f}"}
        answer = self._get(f"/api/v1/query?{urllib.parse.urlencode(asked)}")
        assert answer["status"] == "success", (query, answer)
        found: list[dict[str, Any]] = answer["data"]["result"]
        return found

    def value(self, query: str) -> float:
        """Return the one value of a query."""
        (one,) = self.query(query)
        return float(one["value"][1])

    def has_scraped_since(self, unix_s: float) -> bool:
        """Whether every agent has been scraped after that moment."""
        seen = self.query('timestamp(up{job="kvmhv"})')
        return len(seen) == len(plans.AGENT_HOSTS) and all(float(one["value"][1]) > unix_s for one in seen)

    def ready(self) -> bool:
        """Whether it answers."""
        return self._ask("/-/ready").returncode == 0

    def _get(self, path: str) -> Any:
        return json.loads(self._ask(path).stdout)

    def _ask(self, path: str) -> subprocess.CompletedProcess[str]:
        script = "import sys, urllib.request; print(urllib.request.urlopen(sys.argv[1], timeout=20).read().decode())"
        command = [*self._space, sys.executable, "-c", script, READY + path]
        return subprocess.run(command, capture_output=True, text=True, check=False)


@contextmanager
def prometheus(lab: Lab, directory: Path) -> Iterator[Prometheus]:
    """Run a Prometheus in the client's network until the block ends; it scrapes each second."""
    addresses = [f"{lab.plan.host(name).addresses['management']}:{PORT}" for name in plans.AGENT_HOSTS]
    text = (SETTINGS / "prometheus.yml").read_text()
    text = text.replace('["host1:6600", "host2:6600"]', json.dumps(addresses))
    text = text.replace("interval: 5s", "interval: 1s").replace("scrape_timeout: 4s", "scrape_timeout: 1s")
    assert addresses[0] in text
    (directory / "prometheus.yml").write_text(text)
    (directory / "kvmhv.rules.yml").write_text((SETTINGS / "kvmhv.rules.yml").read_text())
    options = [f"--config.file={directory}/prometheus.yml", f"--storage.tsdb.path={directory}/data"]
    here = Prometheus(lab)
    command = ["ip", "netns", "exec", plans.namespace(lab.plan.name, "client"), "prometheus", *options]
    with (directory / "prometheus.log").open("wb") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            until("Prometheus answers", here.ready)
            started_s = time.time()
            until("both agents are scraped", lambda: here.has_scraped_since(started_s))
            yield here
        finally:
            process.terminate()
            process.wait()
