"""The lab itself, with real namespaces: what its hosts promise to everyone who builds on them."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kvmhv.errors import CallerError, HostError
from kvmhv.lab import lab as labs
from kvmhv.lab import network, processes, tree
from kvmhv.lab import state as states
from kvmhv.lab.control import AgentStatus
from kvmhv.lab.lab import Lab, LabHost
from kvmhv.lab.plan import namespace
from kvmhv.lab.steps import run_step

pytestmark = pytest.mark.real

CLI = [sys.executable, "-m", "kvmhv", "lab"]
LISTENER = """
import socket, time
listener = socket.create_server(("0.0.0.0", 7000))
print("listening", flush=True)
connection, _ = listener.accept()
while data := connection.recv(65536):
    connection.sendall(data)
"""
SENDER = """
import socket, sys, time
connection = socket.create_connection(("host2-migration", 7000))
started = time.monotonic()
sent = echoed = 0
while sent < 5_000_000:
    connection.sendall(b"x" * 50_000)
    sent += 50_000
    while echoed < sent:
        echoed += len(connection.recv(65536))
print(time.monotonic() - started)
"""


def until(what: str, is_so: Callable[[], bool], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        time.sleep(0.02)


def pings(host: LabHost, target: str) -> bool:
    return host.exec(["ping", "-n", "-c1", "-W1", target], check=False).returncode == 0


def machine_facts() -> list[str]:
    links = subprocess.run(["ip", "-o", "link"], capture_output=True, text=True, check=True).stdout
    addresses = subprocess.run(["ip", "-o", "address"], capture_output=True, text=True, check=True).stdout
    mounts = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
    return [links.replace("\n", " "), addresses, *sorted(mount for mount in mounts if "netns" not in mount)]


def test_hosts_are_up_with_addresses_names_and_identities(bare_lab: Lab) -> None:
    assert [host.state for host in bare_lab.hosts] == ["running"] * 3
    for host in bare_lab.hosts:
        assert host.exec(["hostname"]).stdout.strip() == host.name
        assert host.exec(["cat", "/etc/machine-id"]).stdout.strip() == host.plan.machine_id
        for other in bare_lab.hosts:
            for name in (other.name, f"{other.name}-migration", f"{other.name}-lan"):
                assert pings(host, name), f"{host.name} does not reach {name}"
    assert bare_lab.status()["networks"]["migration"] == {"subnet": "10.77.2.0/24", "rate": "100mbit"}


def test_exec_gives_status_output_and_input(bare_lab: Lab) -> None:
    host = bare_lab.host("host1")
    assert host.exec(["sh", "-c", "exit 7"], check=False).returncode == 7
    assert host.exec(["sh", "-c", "cat; echo oops >&2"], text="word").stdout == "word"
    with pytest.raises(HostError, match="status 3 on host1: oops"):
        host.exec(["sh", "-c", "echo oops >&2; exit 3"])
    assert host.exec(["no-such-program"], check=False).returncode == 127


def test_a_command_that_is_too_slow_is_killed_inside_too(bare_lab: Lab) -> None:
    host = bare_lab.host("host1")
    with pytest.raises(HostError, match="longer than 1 s"):
        host.exec(["sleep", "98765"], timeout_s=1)
    until("the sleep is gone", lambda: "98765" not in host.exec(["ps", "-eo", "args"]).stdout)


def test_the_command_line_does_the_same(bare_lab: Lab) -> None:
    environment = {**os.environ, "KVMHV_LAB": bare_lab.name}
    done = subprocess.run(
        [*CLI, "exec", "client", "--", "sh", "-c", "cat; exit 9"],
        input=b"through",
        capture_output=True,
        env=environment,
        check=False,
    )
    assert (done.returncode, done.stdout) == (9, b"through")
    again = subprocess.run([*CLI, "up"], capture_output=True, text=True, env=environment, check=False)
    assert again.returncode == 2
    assert "is up already" in again.stderr


def test_disks_take_direct_io_and_devices_are_there(bare_lab: Lab) -> None:
    host = bare_lab.host("host1")
    host.exec(["qemu-img", "create", "-q", "-f", "raw", "/var/lib/kvmhv/direct.img", "1M"])
    host.exec(["qemu-io", "-f", "raw", "-t", "none", "-c", "write 0 64k", "/var/lib/kvmhv/direct.img"])
    host.exec(["rm", "/var/lib/kvmhv/direct.img"])
    host.exec(["ip", "tuntap", "add", "tap0", "mode", "tap"])
    host.exec(["ip", "link", "set", "tap0", "master", "lan"])
    host.exec(["ip", "link", "del", "tap0"])


def test_orphans_are_reaped(bare_lab: Lab) -> None:
    host = bare_lab.host("host1")
    host.exec(["sh", "-c", "for i in 1 2 3; do (sleep 0.1 &) ; done"])
    until("no zombies", lambda: "Z" not in host.exec(["ps", "-eo", "state"]).stdout)


def test_two_labs_do_not_see_each_other(bare_lab: Lab) -> None:
    other = Lab.up(f"{bare_lab.name[:18]}-b", hosts=("host1", "host2"), agents=False)
    try:
        other.host("host1").exec(["touch", "/var/lib/kvmhv/here"])
        assert not bare_lab.host("host1").path("/var/lib/kvmhv/here").exists()
        assert not pings(other.host("host1"), "10.77.1.13"), "the other lab's client"
        assert bare_lab.host("host1").plan.machine_id != other.host("host1").plan.machine_id
    finally:
        other.down()
    assert other.leftovers() == []
    assert pings(bare_lab.host("host1"), "client")


def test_a_killed_host_is_silent_and_boots_with_its_disks(bare_lab: Lab) -> None:
    host, client = bare_lab.host("host1"), bare_lab.host("client")
    host.exec(["sh", "-c", "echo kept > /var/lib/kvmhv/disk; echo kept > /root/file; echo lost > /run/kvmhv/volatile"])
    with host.popen(["python3", "-c", LISTENER], stdout=subprocess.PIPE) as listener:
        assert listener.stdout is not None
        listener.stdout.readline()
        script = """
import socket
connection = socket.create_connection(("host1", 7000))
print("connected", flush=True)
connection.settimeout(3)
try:
    print("heard", connection.recv(1))
except TimeoutError:
    print("silence")
"""
        with client.popen(["python3", "-c", script], stdout=subprocess.PIPE) as asker:
            assert asker.stdout is not None
            assert asker.stdout.readline() == b"connected\n"
            host.kill()
            assert asker.stdout.read() == b"silence\n"
    assert host.state == "off"
    assert not pings(client, "host1")
    with pytest.raises(HostError, match="does not run"):
        host.exec(["true"])
    host.boot()
    assert host.state == "running"
    assert host.exec(["cat", "/var/lib/kvmhv/disk", "/root/file"]).stdout == "kept\nkept\n"
    assert not host.path("/run/kvmhv/volatile").exists()
    assert pings(client, "host1")
    with pytest.raises(CallerError, match="runs already"):
        host.boot()


def test_a_frozen_host_does_nothing_until_it_is_thawed(bare_lab: Lab) -> None:
    host = bare_lab.host("host2")
    counter = "i=0; while :; do i=$((i+1)); echo $i > /root/count; sleep 0.02; done"

    def count() -> str:
        return host.path("/root/count").read_text().strip()

    with host.popen(["sh", "-c", counter]) as counting:
        until("it counts", lambda: host.path("/root/count").exists() and count() > "1")
        host.freeze()
        assert host.state == "frozen"
        frozen = count()
        with pytest.raises(HostError, match="frozen"):
            host.exec(["true"])
        time.sleep(0.3)
        assert count() == frozen
        host.thaw()
        until("it counts on", lambda: count() not in {"", frozen})
        assert host.state == "running"
        counting.kill()


def test_one_network_can_be_cut_and_mended(bare_lab: Lab) -> None:
    host, client = bare_lab.host("host1"), bare_lab.host("client")
    for name in ("migration", "lan"):
        host.cut(name)
        assert not pings(client, f"host1-{name}")
        assert pings(client, "host1")
        host.mend(name)
        until(f"{name} is back", lambda name=name: pings(client, f"host1-{name}"))  # type: ignore[misc]
    with pytest.raises(CallerError, match="no network 'storage'"):
        host.cut("storage")


def test_the_migration_network_is_as_fast_as_asked(bare_lab: Lab) -> None:
    assert "rate 100Mbit" in bare_lab.host("host1").exec(["tc", "qdisc", "show", "dev", "migration"]).stdout
    assert "tbf" not in bare_lab.host("host1").exec(["tc", "qdisc", "show", "dev", "management"]).stdout
    with bare_lab.host("host2").popen(["python3", "-c", LISTENER], stdout=subprocess.PIPE) as listener:
        assert listener.stdout is not None
        listener.stdout.readline()
        seconds = float(bare_lab.host("host1").exec(["python3", "-c", SENDER]).stdout)
    # 5 MB at 12.5 MB/s, echoed in turns of 50 kB: at least 0.4 s there, less what one burst lets through.
    assert seconds > 0.35


def test_a_host_of_debian_12_has_its_qemu(_lab_ground: None) -> None:
    lab = Lab.up(f"pytest-old-{os.getpid()}", hosts=("host1", "host2"), suites={"host2": "bookworm"}, agents=False)
    try:
        versions = [host.exec(["qemu-system-x86_64", "--version"]).stdout.split()[3] for host in lab.hosts]
        assert [version.split(".")[0] for version in versions] == ["10", "7"]
        lab.host("host2").exec(["/opt/kvmhv/venv/bin/python", "-c", "import aiohttp, msgspec, qemu.qmp, cryptography"])
        assert pings(lab.host("host1"), "host2")
    finally:
        lab.down()
    assert lab.leftovers() == []


def test_up_and_down_leave_the_machine_as_it_was(_lab_ground: None) -> None:
    before = machine_facts()
    lab = Lab.up(f"pytest-trace-{os.getpid()}", rate="1gbit", agents=False)
    try:
        assert machine_facts() == before
        assert len(lab.leftovers()) > 8
        with lab.host("host1").popen(["sleep", "1000"]) as sleeper:
            lab.down()
            assert sleeper.wait(10) != 0
    finally:
        lab.down()
    assert lab.leftovers() == []
    assert machine_facts() == before


def kvmhv(host: LabHost, *arguments: str) -> Any:
    return msgspec.json.decode(host.exec(["kvmhv", *arguments, "--json"]).stdout)


def test_the_agents_answer_trust_each_other_and_allow_moves(lab: Lab) -> None:
    assert lab.host("client").agent_status() == AgentStatus(wanted=False, pid=None, starts=0, gave_up=False)
    for name, other in (("host1", "host2"), ("host2", "host1")):
        report = kvmhv(lab.host(name), "host", "show")
        assert report["name"] == name
        assert [trusted["name"] for trusted in report["trusted"]] == [other]
        assert report["settings"]["migration.enabled"] is True
        assert report["settings"]["migration.networks"] == ["10.77.2.0/24"]


def test_the_machine_reaches_an_agent_by_its_hosts_name(lab: Lab) -> None:
    environment = {**os.environ, "KVMHV_LAB": lab.name}
    for name in ("host1", "host2"):
        command = [sys.executable, "-m", "kvmhv", "--host", name, "host", "show", "--json"]
        done = subprocess.run(command, capture_output=True, env=environment, check=True)
        assert msgspec.json.decode(done.stdout)["name"] == name
        assert states.socket_of(lab.name, name) == lab.host(name).socket


def test_a_killed_agent_comes_back_and_a_stopped_one_stays_away(lab: Lab) -> None:
    host = lab.host("host1")
    before = host.agent_status()
    bystander = host.exec(["sh", "-c", "setsid sleep 4321 >/dev/null 2>&1 & echo $!"]).stdout.strip()
    host.agent_kill()
    host.agent_wait()
    after = host.agent_status()
    assert (after.wanted, after.starts) == (True, before.starts + 1)
    assert after.pid != before.pid
    host.agent_stop()
    assert (host.agent_status().wanted, host.agent_status().pid) == (False, None)
    time.sleep(0.5)
    assert host.agent_status().pid is None
    host.agent_start()
    assert kvmhv(host, "host", "show")["name"] == "host1"
    host.exec(["kill", bystander])
    assert "agent ready" in host.agent_log.read_text()


def test_agents_know_each_other_after_a_loss_of_power(lab: Lab) -> None:
    host = lab.host("host2")
    identity = kvmhv(host, "host", "show")["id"]
    config = host.path("/etc/kvmhv/agent.toml").read_text()
    host.kill()
    host.boot()
    assert host.path("/etc/kvmhv/agent.toml").read_text() == config
    report = kvmhv(host, "host", "show")
    assert report["id"] == identity
    assert [trusted["name"] for trusted in report["trusted"]] == ["host1"]


def test_an_agent_that_cannot_start_is_reported_with_its_log(lab: Lab) -> None:
    host = lab.host("host1")
    host.agent_stop()
    config = host.path("/etc/kvmhv/agent.toml")
    right = config.read_text()
    try:
        config.write_text("no_such_key = 1\n")
        with pytest.raises(HostError, match=r"(?s)ends as soon as it is started.*no_such_key"):
            host.agent_start()
    finally:
        host.agent_stop()
        config.write_text(right)
        host.agent_start()


@pytest.fixture
def lost_lab(_lab_ground: None) -> Iterator[str]:
    name = f"pytest-lost-{os.getpid()}"
    yield name
    labs.down(name)


MOMENTS: dict[str, Callable[[str], bool]] = {
    "its state is written": lambda name: states.read_state(name) is not None,
    "the switch is there": lambda name: bool(network.namespaces_of(name)),
    "the first host starts": lambda name: bool(processes.in_namespace(namespace(name, "host1"))),
    "the last host runs": lambda name: processes.init_of(namespace(name, "client")) is not None,
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_up_is_cleaned_by_down_and_by_the_next_up(lost_lab: str, moment: str) -> None:
    for finish in ("down", "up"):
        up = subprocess.Popen([*CLI, "up", "--no-agents", "--lab", lost_lab], stderr=subprocess.DEVNULL)
        try:
            deadline = time.monotonic() + 60
            while not MOMENTS[moment](lost_lab):
                assert time.monotonic() < deadline
        finally:
            up.send_signal(signal.SIGKILL)
            up.wait()
        assert labs.leftovers(lost_lab)
        if finish == "up" and labs.status(lost_lab)["state"] != "up":
            Lab.up(lost_lab, agents=False)
        subprocess.run([*CLI, "down", "--lab", lost_lab], check=True, stderr=subprocess.DEVNULL)
        assert labs.leftovers(lost_lab) == []
        assert not [pid for pid in processes._all_pids() if lost_lab in labs._command(pid)]


def test_a_state_of_an_earlier_boot_of_the_machine_is_down_and_goes(lost_lab: str) -> None:
    lab = Lab.up(lost_lab, agents=False)
    for host in lab.hosts:
        host.kill()
    states.write_state(msgspec.structs.replace(lab.state, boot_id="an-earlier-one"))
    (states.NETNS_DIR / namespace(lost_lab, "host1")).touch()
    assert labs.status(lost_lab)["state"] == "half-made"
    assert labs.down(lost_lab)
    assert labs.leftovers(lost_lab) == []
    assert not labs.down(lost_lab)


def test_a_killed_build_of_a_tree_leaves_no_process_no_mount_and_no_tree(tmp_path: Path) -> None:
    script = f"""
from pathlib import Path
from kvmhv.lab import tree
tree.CACHE_DIR = Path({str(tmp_path)!r})
tree.ensure_trees(["trixie"], print)
"""
    build = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.DEVNULL)
    try:
        until("packages arrive", lambda: any(tmp_path.glob("trees/.*/usr/bin/python3*")), timeout_s=200)
        assert _using(tmp_path)
    finally:
        build.kill()
        build.wait()
    until("its programs are gone", lambda: not _using(tmp_path))
    assert not any(str(tmp_path) in line for line in Path("/proc/self/mounts").read_text().splitlines())
    assert not any(entry for entry in (tmp_path / "trees").iterdir() if not entry.name.startswith("."))
    shutil.rmtree(tmp_path / "trees")


def _using(directory: Path) -> list[str]:
    commands = {pid: labs._command(pid) for pid in processes._all_pids() if pid != os.getpid()}
    return [command for command in commands.values() if str(directory) in command]


def test_a_failed_step_says_which_and_what_to_do(bare_lab: Lab, tmp_path: Path) -> None:
    said: list[str] = []
    with pytest.raises(HostError, match=r"(?s)packages: sh ended with status 4; .*no room") as caught:
        run_step(
            "packages",
            ["sh", "-c", "echo no room; exit 4"],
            log=tmp_path / "log",
            progress=said.append,
            todo="make room",
            timeout_s=30,
        )
    assert caught.value.todo == "make room"
    assert said == ["packages ..."]
    assert tree.package_dir().name == "kvmhv"
