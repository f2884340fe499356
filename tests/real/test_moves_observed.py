"""Moves as others see them: frames on the switch, a probe's answers, TCP's own count, Prometheus, the logs.

A Linux guest beats every 5 ms, so that the switch sees when it is gone. What kvmhv says is compared with that.
"""

import json
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.real.moving import MIB, Pair, Report, Side, until
from tests.real.observers import Prometheus, Sniffer, prometheus

pytestmark = pytest.mark.real

DASHBOARD = Path(__file__).parent.parent.parent / "packaging" / "grafana" / "kvmhv.json"
NOTHING_TO_SHOW = ("kvmhv_migration_findings_total", "kvmhv_peer_refused_total")
"""Queries about what has not happened in these moves."""
LIVE = "kvmhv_migration_(phase|pass|.*remaining_bytes|dirty_.*|throughput_.*|progress_ratio|estimated_.*|expected_.*)"
BEAT_MS = 5.0
SLACK_MS = 20.0


@pytest.fixture
def guest(pair: Pair, tmp_path: Path) -> Iterator[Sniffer]:
    """Boot web01, which beats to the client."""
    client = pair.lab.host("client").plan.addresses["lan"]
    for file in (pair.images.vmlinuz, pair.images.initrd):
        pair.a.sh("mkdir -p /srv")
        pair.a.file(f"/srv/{file.name}").write_bytes(file.read_bytes())
    append = (
        f"{pair.images.cmdline} kvmhv.ip={address(pair)}/24 kvmhv.dirty=2M kvmhv.dirty_set=8M "
        f"kvmhv.beat={client}:7001@{BEAT_MS:.0f}ms"
    )
    files = ("--kernel", "/srv/vmlinuz", "--initrd", "/srv/initrd", "--append", append)
    pair.a.kvmhv("image", "import", "linux", *files)
    pair.create("--image", "linux", "--disk", "size=4M", "--switch", "lan", memory="128M")
    pair.a.kvmhv("image", "remove", "linux")
    sniffer = Sniffer(pair.lab, pair.a.show()["vm"]["nics"][0]["mac"], tmp_path / "frames")
    try:
        until("the guest beats", lambda: (tmp_path / "frames").read_text().count("\n") > 50)
        serve_http(pair.a, pair.vm_id)
        yield sniffer
    finally:
        sniffer.end()


def serve_http(side: Side, vm_id: str) -> None:
    """Have the guest's shell start a web server."""
    until("the guest's shell", lambda: "BusyBox" in side.console())
    with socket.socket(socket.AF_UNIX) as console:
        console.connect(str(side.file(f"/run/kvmhv/vm/{vm_id}/console.sock")))
        console.sendall(b"httpd -p 80 -h /tmp; echo 'serves' web\n")
        until("it serves HTTP", lambda: "serves web" in side.console())  # QEMU drops what it has not read when we leave


def address(pair: Pair) -> str:
    client: str = pair.lab.host("client").plan.addresses["lan"]
    return f"{client.rsplit('.', 1)[0]}.50"


def moved(pair: Pair, source: Side, target: Side, *options: str) -> Report:
    """Move web01 and return its report with what came when the move had ended: the source's, and the target's gap."""
    move_id = pair.moved(source, target, *options)["id"]
    until("the guest has answered", lambda: source.report(move_id)["answer_gap_ms"] is not None)
    until("the guest has said something", lambda: target.report(move_id)["network_gap_ms"] is not None)
    return {**source.report(move_id), "network_gap_ms": target.report(move_id)["network_gap_ms"]}


def test_what_is_reported_is_what_others_see(pair: Pair, guest: Sniffer, tmp_path: Path) -> None:
    reports: list[Report] = []
    probes = (f"ping:{address(pair)}", f"tcp:{address(pair)}:7", f"http://{address(pair)}/")
    with prometheus(pair.lab, tmp_path) as watcher:
        ways = ((pair.a, pair.b), (pair.b, pair.a), (pair.a, pair.b))
        for probe, (source, target) in zip(probes, ways, strict=True):
            source.kvmhv("vm", "set", "web01", "--probe", probe)
            sent_before = sent_bytes(source)
            report = moved(pair, source, target, "--bandwidth", "20M")
            reports.append(report)
            agrees_with_the_switch(report, target.qmp_event_ms(f"vm/{pair.vm_id}", "RESUME"), guest)
            agrees_with_the_network_card(report, sent_bytes(source) - sent_before)
        ended_s = time.time()
        until("both agents are scraped after the moves", lambda: watcher.has_scraped_since(ended_s))
        agrees_with_prometheus(reports, watcher)
        the_dashboard_has_something_to_show(watcher)
        assert watcher.query(f'{{__name__=~"{LIVE}"}}') == [], "series are left over after the moves"
        assert watcher.query("max_over_time(kvmhv:vm_copies_at_once:count[10m])") == []
        assert watcher.value("kvmhv:vm_copies:count") == 1
    assert target.show()["vm"]["probe"]["kind"] == "http"


def agrees_with_the_switch(report: Report, resume_ms: float, guest: Sniffer) -> None:
    """The first frame and the answer come when the switch sees them; the guest was silent as long as it says."""
    told_ms = resume_ms - report["blackout_ms"]
    last_ms, first_ms = guest.silence(told_ms, resume_ms)
    steps = {step["name"]: step["at_ms"] for step in report["blackout_steps"]}
    slack_ms = SLACK_MS + report["blackout_uncertainty_ms"]
    assert abs(told_ms + report["network_gap_ms"] - first_ms) < slack_ms, (told_ms, last_ms, first_ms, report)
    assert last_ms <= told_ms + steps["stopped"] + slack_ms, (told_ms, last_ms, first_ms, report)
    assert report["answer_gap_ms"] >= report["blackout_ms"] - slack_ms, report
    assert told_ms + report["answer_gap_ms"] >= first_ms - slack_ms, "an answer is a frame"
    assert steps["first-answer"] == report["answer_gap_ms"]


def sent_bytes(side: Side) -> int:
    return int(side.sh("cat /sys/class/net/migration/statistics/tx_bytes"))


def agrees_with_the_network_card(report: Report, sent: int) -> None:
    """TCP's count is more than QEMU's of the memory (of the disk zeros do not travel), and about what the card sent."""
    assert report["memory_bytes"] < report["wire_bytes"], report
    assert 0.9 * sent < report["wire_bytes"] < 1.1 * sent + MIB, (sent, report)


def agrees_with_prometheus(reports: list[Report], watcher: Prometheus) -> None:
    def total(metric: str) -> float:
        return watcher.value(f"sum({metric})")

    count = len(reports)
    assert total('kvmhv_migrations_total{direction="out",outcome="done"}') >= count
    for metric, key in (
        ("blackout", "blackout_ms"),
        ("network_gap", "network_gap_ms"),
        ("answer_gap", "answer_gap_ms"),
    ):
        assert total(f"kvmhv_migration_{metric}_seconds_count") >= count, metric
        expected_s = sum(report[key] for report in reports) / 1000
        if total(f"kvmhv_migration_{metric}_seconds_count") == count:
            assert total(f"kvmhv_migration_{metric}_seconds_sum") == pytest.approx(expected_s), metric
    assert total('kvmhv_migration_bytes_total{kind="wire"}') >= sum(report["wire_bytes"] for report in reports)


def the_dashboard_has_something_to_show(watcher: Prometheus) -> None:
    empty = []
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        for target in panel.get("targets", ()):
            query = target["expr"].replace("$__range", "10m").replace("$__rate_interval", "10s")
            if not watcher.query(f"last_over_time(({query})[10m:1s])"):
                empty.append(target["expr"])
    assert [query for query in empty if not any(name in query for name in NOTHING_TO_SHOW)] == []


def test_every_line_of_the_log_of_a_move_has_its_id(pair: Pair) -> None:
    for side in pair.sides:
        side.sh('sed -i \'1i log_format = "json"\\nlog_level = "debug"\' /etc/kvmhv/agent.toml')
        side.restart_agent()
    try:
        pair.boot("--switch", "lan")
        before = [side.host.agent_log.stat().st_size for side in pair.sides]
        report = pair.moved(pair.a, pair.b)
        for side, size in zip(pair.sides, before, strict=True):
            until("the move has ended", side.has_no_move)
            lines = [json.loads(line) for line in read_from(side.host.agent_log, size).splitlines()]
            assert len([line for line in lines if line.get("move") == report["id"]]) > 10, lines
            assert [line for line in lines if line.get("move") != report["id"] and not begins_a_move(line)] == []
    finally:
        for side in pair.sides:
            side.sh("sed -i '/^log_/d' /etc/kvmhv/agent.toml")
            side.restart_agent()


def read_from(file: Path, offset: int) -> str:
    with file.open() as log:
        log.seek(offset)
        return log.read()


def begins_a_move(line: dict[str, Any]) -> bool:
    """The requests in which a move gets its id, and in which another host's agent says it first."""
    return line["event"] == "request" and re.fullmatch(r"/v1/vms/web01(/move)?|/peer/move", line["path"]) is not None
