"""What packaging/ has for Prometheus and Grafana: rules that promtool has tested, names that the agent really has."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from kvmhv.agent.metrics import Metrics, Snapshot
from kvmhv.model import HostSettings

PACKAGING = Path(__file__).parent.parent / "packaging"
PROMETHEUS = PACKAGING / "prometheus"
NAME = re.compile(r"\bkvmhv_[a-z0-9_]+")
SUFFIX = re.compile(r"_(bucket|sum|count|total|info)$")


def promtool(*arguments: str, stdin: bytes | None = None) -> str:
    done = subprocess.run(["promtool", *arguments], cwd=PROMETHEUS, input=stdin, capture_output=True, check=False)
    said = (done.stdout + done.stderr).decode()
    assert done.returncode == 0, said
    return said


def rendered() -> bytes:
    return Metrics("1", "h").render(Snapshot(vms=(), moves=(), settings=HostSettings()))


def panels() -> list[dict[str, Any]]:
    dashboard = json.loads((PACKAGING / "grafana" / "kvmhv.json").read_text())
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


def test_the_rules_do_what_their_tests_say() -> None:
    assert "12 rules found" in promtool("check", "config", "prometheus.yml") + promtool(
        "check", "rules", "kvmhv.rules.yml"
    )
    assert "SUCCESS" in promtool("test", "rules", "kvmhv.rules.test.yml")


def test_promtool_has_nothing_to_say_about_the_metrics() -> None:
    assert promtool("check", "metrics", stdin=rendered()) == ""


@pytest.mark.parametrize("file", ["prometheus/kvmhv.rules.yml", "grafana/kvmhv.json"])
def test_every_metric_that_is_asked_for_is_there(file: str) -> None:
    known = set(re.findall(r"^# TYPE (\S+)", rendered().decode(), re.MULTILINE))
    known |= {SUFFIX.sub("", name) for name in known}
    asked = {SUFFIX.sub("", name) for name in NAME.findall((PACKAGING / file).read_text())}
    assert asked, file
    assert asked - known == set()


def test_the_dashboard_has_room_for_every_panel() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in panels():
        at = panel["gridPos"]
        cells = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        assert not cells & taken, panel["title"]
        assert at["x"] + at["w"] <= 24, panel["title"]
        assert panel["targets"], panel["title"]
        taken |= cells
