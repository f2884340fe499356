"""drivers/network on a real host: taps on bridges, and what is refused."""

import json
from typing import Any

import pytest

from kvmhv.lab.lab import Lab

pytestmark = pytest.mark.real

PYTHON = ["env", "PYTHONPATH=/opt/kvmhv/src", "/opt/kvmhv/venv/bin/python", "-W", "error", "-"]
PROGRAM = """
import asyncio, json, sys
from kvmhv.config import Config
from kvmhv.drivers.network import LinuxNetwork
from kvmhv.errors import KvmhvError

async def main():
    said = []
    for switches, method, *arguments in {calls!r}:
        network = LinuxNetwork(Config(switches=tuple(switches)))
        try:
            said.append(await getattr(network, method)(*arguments))
        except KvmhvError as error:
            said.append(error.code)
    print(json.dumps(said))

asyncio.run(main())
"""
TAP = "kv0123456789n0"


def run(lab: Lab, *calls: tuple[Any, ...]) -> list[Any]:
    """Call the driver's methods on host1, each as (allowed switches, method, arguments...)."""
    done = lab.host("host1").exec(PYTHON, text=PROGRAM.format(calls=calls))
    answer: list[Any] = json.loads(done.stdout)
    return answer


def link(lab: Lab, name: str) -> dict[str, Any] | None:
    done = lab.host("host1").exec(["ip", "-j", "-d", "link", "show", name], check=False)
    return dict(json.loads(done.stdout)[0]) if done.returncode == 0 else None


def test_a_tap_comes_onto_its_switch_and_goes_again(bare_lab: Lab) -> None:
    assert run(bare_lab, ([], "add_tap", TAP, "lan"), ([], "add_tap", TAP, "lan"), ([], "taps")) == [None, None, [TAP]]
    made, switch = link(bare_lab, TAP), link(bare_lab, "lan")
    assert made is not None
    assert switch is not None
    assert (made["master"], made["mtu"], "UP" in made["flags"]) == ("lan", switch["mtu"], True)
    assert made["linkinfo"]["info_data"]["type"] == "tap"
    assert run(bare_lab, ([], "remove_tap", TAP), ([], "remove_tap", TAP), ([], "taps")) == [None, None, []]
    assert link(bare_lab, TAP) is None


def test_switches_are_the_bridges_that_are_allowed(bare_lab: Lab) -> None:
    every, some, none = run(bare_lab, ([], "switches"), (["lan"], "switches"), (["dmz"], "switches"))
    assert "lan" in every
    assert (some, none) == (["lan"], [])


def test_what_is_not_allowed_leaves_no_tap(bare_lab: Lab) -> None:
    calls = [
        ([], "add_tap", TAP, "nowhere"),
        (["dmz"], "add_tap", TAP, "lan"),
        ([], "add_tap", TAP, "lo"),
        ([], "add_tap", "eth0", "lan"),
        ([], "remove_tap", "lan"),
        ([], "add_tap", "kv" + "0" * 14, "lan"),
        ([], "taps"),
    ]
    missing, network = "switch-missing", "network"
    assert run(bare_lab, *calls) == [missing, missing, missing, network, network, network, []]
    assert link(bare_lab, "lan") is not None


def test_addresses_that_others_can_reach(bare_lab: Lab) -> None:
    (found,) = run(bare_lab, ([], "addresses"))
    expected = set(bare_lab.status()["hosts"][0]["addresses"].values())
    assert expected <= {ip for ip, _ in found}
    assert not any(ip.startswith(("127.", "fe80")) or ip == "::1" for ip, _ in found)
    assert all(prefix == 24 for ip, prefix in found if ip in expected)
