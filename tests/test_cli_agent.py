"""The command line and a whole agent, each a process of its own: what one says the other understands."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

START_S = 30.0


@dataclass
class Host:
    """An agent's process and how the CLI reaches it."""

    directory: Path
    port: int
    environment: dict[str, str] = field(default_factory=dict)

    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "kvmhv", *arguments],
            check=False,
            capture_output=True,
            text=True,
            timeout=60,
            env=os.environ | {"KVMHV_SOCKET": str(self.directory / "run" / "agent.sock")} | environment,
        )

    def json(self, *arguments: str, **environment: str) -> object:
        done = self.run(*arguments, "--json", **environment)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    directory = tmp_path_factory.mktemp("a")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = int(free.getsockname()[1])
    (directory / "agent.toml").write_text(
        f'name = "hosta"\nlisten = "127.0.0.1:{port}"\nadvertise = "127.0.0.1:{port}"\naccel = "tcg"\n'
        f'state_dir = "{directory}/state"\nrun_dir = "{directory}/run"\n'
    )
    log = (directory / "log").open("wb")
    with (
        log,
        subprocess.Popen(
            [sys.executable, "-m", "kvmhv", "agent", "--config", str(directory / "agent.toml")], stdout=log, stderr=log
        ) as agent,
    ):
        try:
            deadline = time.monotonic() + START_S
            while not (directory / "run" / "agent.sock").exists():
                assert agent.poll() is None, (directory / "log").read_text()
                assert time.monotonic() < deadline, (directory / "log").read_text()
                time.sleep(0.05)
            yield Host(directory, port)
        finally:
            agent.terminate()
            assert agent.wait(START_S) == 0, (directory / "log").read_text()


def test_host_and_settings(host: Host) -> None:
    shown = host.json("host", "show")
    assert isinstance(shown, dict)
    assert shown["name"] == "hosta"
    for line in (host.run("host", "show").stdout, host.run("--host", "hosta", "host", "show").stdout):
        assert "migration.moves_out" in line
    done = host.run("host", "set", "migration.enabled=true", "migration.networks=10.0.0.0/24@5,10.1.0.0/24")
    assert done.stdout == "hosta: migration.enabled=true\nhosta: migration.networks=10.0.0.0/24@5,10.1.0.0/24\n"
    done = host.run("host", "set", "migration.enabled=false", "migration.nosuch=1")
    assert (done.returncode, "[setting-unknown]" in done.stderr) == (2, True)
    settings = host.json("host", "set", "migration.moves_in=3")
    assert isinstance(settings, dict)
    assert 3 in settings.values(), "nothing of the refused change, all of this one"
    assert True in settings.values()


def test_over_the_network_with_token_and_pin(host: Host) -> None:
    token = host.run("host", "token", "create", "ci").stdout.strip()
    assert host.run("host", "token", "list").stdout.splitlines()[1].startswith("ci")
    shown = host.json("host", "show")
    assert isinstance(shown, dict)
    pin, url = str(shown["fingerprint"]), f"https://127.0.0.1:{host.port}"
    assert host.json("--host", url, "vm", "list", KVMHV_TOKEN=token, KVMHV_FINGERPRINT=pin) == []
    wrong = ("0" if pin[0] != "0" else "1") + pin[1:]
    for environment, code in (
        ({}, "agent-untrusted"),
        ({"KVMHV_TOKEN": token, "KVMHV_FINGERPRINT": wrong}, "agent-untrusted"),
        ({"KVMHV_FINGERPRINT": pin}, "not-authorised"),
        ({"KVMHV_FINGERPRINT": pin, "KVMHV_TOKEN": token + "x"}, "not-authorised"),
    ):
        done = host.run("--host", url, "vm", "list", **environment)
        assert (done.returncode, f"[{code}]" in done.stderr) == (4, True), done.stderr
    assert host.run("host", "token", "revoke", "ci").returncode == 0
    done = host.run("--host", url, "vm", "list", KVMHV_TOKEN=token, KVMHV_FINGERPRINT=pin)
    assert done.returncode == 4


def test_images(host: Host, tmp_path: Path) -> None:
    (tmp_path / "kernel").write_bytes(os.urandom(700_000))
    files = ("--kernel", str(tmp_path / "kernel"), "--initrd", str(tmp_path / "kernel"))
    assert host.run("image", "import", "small", *files, "--append", "quiet a=b&c").returncode == 0
    listed = host.json("image", "list")
    assert isinstance(listed, list)
    assert [(it["name"], it["kernel_bytes"], it["append"]) for it in listed] == [("small", 700_000, "quiet a=b&c")]
    assert host.run("image", "remove", "small").returncode == 0
    assert host.json("image", "list") == []


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (("vm", "show", "nosuch"), 2),
        (("vm", "start", "ünï côde"), 2),
        (("vm", "create", "two words", "--memory", "64M"), 2),
        (("vm", "create", "x" * 300, "--memory", "64M"), 2),
        (("vm", "create", "zero", "--memory", "0"), 2),
        (("vm", "create", "huge", "--memory", "10T"), 2),
        (("vm", "create", "disk", "--memory", "64M", "--disk", "file=/nosuch"), 2),
        (("vm", "move", "nosuch", "--to", "hostb"), 2),
        (("move", "show", "nosuch"), 2),
        (("move", "cancel", "nosuch"), 2),
        (("--host", "hostb", "vm", "list"), 2),
        (("host", "trust", "join", "nonsense"), 2),
        (("host", "trust", "remove", "hostb"), 2),
        (("host", "token", "revoke", "nosuch"), 2),
        (("image", "remove", "nosuch"), 2),
    ],
)
def test_wrong_requests(host: Host, arguments: tuple[str, ...], status: int) -> None:
    done = host.run(*arguments, KVMHV_LAB="nosuchlab")
    assert done.returncode == status, done.stderr
    assert done.stderr.startswith("error: ")
    assert "what to do: " in done.stderr
    assert done.stdout == ""


def test_an_invitation(host: Host) -> None:
    done = host.run("host", "trust", "invite")
    assert done.returncode == 0
    code = done.stdout.split()[-1]
    assert host.run("host", "trust", "join", code).returncode != 0, "a host does not trust itself"


def test_doctor_and_moves(host: Host) -> None:
    assert host.run("doctor").returncode in (0, 1)
    assert host.json("move", "list") == []
