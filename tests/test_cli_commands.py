"""Commands against a scripted agent on a UNIX socket: what is asked, what is printed, which exit status."""

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import pytest

from kvmhv.cli.main import kvmhv, main
from kvmhv.errors import CallerError, HostError, Incompatible, NeedsOperator, Refused
from kvmhv.model import Finding, Problem, Severity, VmState, VmSummary
from tests.cli_agent import Raw, ScriptedAgent, scripted_agent

FINDING = Finding(
    id="switch-missing", severity=Severity.ERROR, object="nic0", host="host2", text="no lan", todo="add it"
)
SUMMARY = VmSummary(name="web01", id="b0a1", state=VmState.RUNNING, host="host1", memory_bytes=1024**2, cpus=2)


@pytest.fixture
def agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ScriptedAgent]:
    monkeypatch.setenv("KVMHV_SOCKET", str(tmp_path / "agent.sock"))
    monkeypatch.delenv("KVMHV_HOST", raising=False)
    with scripted_agent(tmp_path / "agent.sock") as running:
        yield running


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: str) -> tuple[int, str, str]:
        status = main(arguments)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


# --- the shape of answers -----------------------------------------------------------------------------------------


def test_vm_list(agent: ScriptedAgent, run: Run) -> None:
    agent.on("GET", "/v1/vms", [SUMMARY])
    status, out, err = run("vm", "list")
    assert (status, err) == (0, "")
    assert out == "NAME   STATE    HOST   MEMORY  CPUS  ID\nweb01  running  host1  1 MiB   2     b0a1\n"
    expected = [
        {
            "name": "web01",
            "id": "b0a1",
            "state": "running",
            "host": "host1",
            "memory_bytes": 1024**2,
            "cpus": 2,
            "runtime": "",
        }
    ]
    for arguments in (("vm", "list", "--json"), ("--json", "vm", "list")):
        status, out, _ = run(*arguments)
        assert (status, json.loads(out)) == (0, expected)


def test_doctor_fails_on_errors_only(agent: ScriptedAgent, run: Run) -> None:
    agent.on("GET", "/v1/doctor", [])
    assert run("doctor")[0] == 0
    agent.on("GET", "/v1/doctor", [Problem(id="kvm", severity=Severity.WARNING, text="no KVM", todo="-")])
    assert run("doctor")[0] == 0
    agent.on("GET", "/v1/doctor", [Problem(id="qemu", severity=Severity.ERROR, text="no QEMU", todo="install it")])
    status, out, _ = run("doctor")
    assert status == 1
    assert "install it" in out


# --- errors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (CallerError("vm-unknown", "there is no VM 'x'", "see: kvmhv vm list", http_status=404), 2),
        (Incompatible((FINDING,), host="host2"), 3),
        (Refused("limit-out", "2 moves already", "wait", host="host1"), 4),
        (NeedsOperator("move-ambiguous-end", "both stand still", "decide"), 5),
        (HostError("disk-full", "no space", "make some", host="host2"), 1),
    ],
)
def test_the_agents_errors(agent: ScriptedAgent, run: Run, error: CallerError, status: int) -> None:
    def refuse(_request: object) -> object:
        raise error

    agent.on("POST", "/v1/vms/x/start", refuse)
    found, out, err = run("vm", "start", "x", "--json")
    assert found == status
    body = json.loads(out)["error"]
    assert (body["code"], body["message"], body["todo"]) == (error.code, error.message, error.todo)
    where = f" ({error.host})" if error.host else ""
    assert err.splitlines()[0] == f"error: {error.message} [{error.code}]{where}"
    assert err.splitlines()[-1] == f"what to do: {error.todo}"
    assert ("switch-missing" in err) == isinstance(error, Incompatible)
    assert run("vm", "start", "x")[1] == "", "without --json errors are on stderr only"


@pytest.mark.parametrize(
    "arguments",
    [
        ("vm", "nosuch"),
        ("vm", "start"),
        ("vm", "start", ""),
        ("vm", "start", ".."),
        ("vm", "start", "\udcff"),
        ("vm", "move", "x"),
        ("vm", "move", "x", "--to", "y", "--max-passes", "0"),
        ("vm", "create", "x"),
        ("vm", "create", "x", "--memory", "1G", "--mac", "02:00:00:00:00:01"),
        ("vm", "create", "x", "--memory", "much"),
        ("vm", "create", "x", "--memory", "1G", "--cpu", "\udcff"),
        ("vm", "create", "x", "--memory", "1G", "--cpus", "0"),
        ("vm", "create", "x", "--memory", "1G", "--disk", "size=1G,size=2G"),
        ("host", "set", "novalue"),
        ("host", "set", "a=1", "a=2"),
        ("image", "import", "x"),
        ("image", "import", "x", "--append", "quiet"),
        ("image", "import", "x", "--kernel", "/nosuch"),
        ("image", "import", "x", "--kernel", "/"),
        ("move", "show", "nosuch"),
        ("--nosuch",),
        ("nosuch",),
    ],
)
def test_wrong_requests_are_exit_status_2_in_one_shape(
    agent: ScriptedAgent, run: Run, arguments: tuple[str, ...]
) -> None:
    agent.on("GET", "/v1/moves", [])
    status, out, err = run(*arguments)
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert "what to do: " in err
    status, out, _ = run(*arguments, "--json")
    assert status == 2
    assert json.loads(out)["error"]["exit_status"] == 2
    assert not [it for it in agent.requests if it.method != "GET"], "nothing was changed"


@pytest.mark.parametrize("name", ["two words", "bücher-東京", "x" * 300, "a/b", "a?b#c", "%2e", "-"])
def test_any_name_reaches_the_agent_as_it_is(agent: ScriptedAgent, run: Run, name: str) -> None:
    status, _, err = run("vm", "start", "--", name)
    assert status == 2
    assert "[not-scripted]" in err
    from urllib.parse import unquote  # noqa: PLC0415

    assert [unquote(it.path) for it in agent.requests] == [f"/v1/vms/{name}/start"]
    assert agent.requests[0].path.count("/") == 4


def test_no_agent(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVMHV_SOCKET", str(tmp_path / "none.sock"))
    status, out, err = run("vm", "list", "--json")
    assert status == 1
    assert json.loads(out)["error"]["code"] == "agent-unreachable"
    assert str(tmp_path / "none.sock") in err
    assert "systemctl start kvmhv" in err
    assert "kvmhv lab up" in err


@pytest.mark.parametrize(
    ("answer", "status", "code"),
    [
        (Raw(200, iter([b"not json"]), "text/plain"), 1, "agent-answer"),
        (Raw(200, iter([b'{"a": 1}']), "application/json"), 1, "agent-answer"),
        (Raw(502, iter([b"<html>bad gateway"]), "text/html"), 1, "agent-answer"),
        (Raw(414, iter([b"too long"]), "text/plain"), 2, "agent-answer"),
    ],
)
def test_answers_that_are_none(agent: ScriptedAgent, run: Run, answer: Raw, status: int, code: str) -> None:
    agent.on("GET", "/v1/vms", answer)
    found, _, err = run("vm", "list")
    assert (found, f"[{code}]" in err) == (status, True)


def test_an_agent_that_hangs_up(agent: ScriptedAgent, run: Run) -> None:
    def hang_up(_request: object) -> object:
        raise ConnectionError

    agent.on("GET", "/v1/vms", hang_up)
    status, _, err = run("vm", "list")
    assert (status, "[agent-lost]" in err) == (1, True)


def test_an_unexpected_error_is_one_line(agent: ScriptedAgent, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def break_down(*_args: object) -> None:
        raise ZeroDivisionError("by zero")

    agent.on("GET", "/v1/vms", [])
    monkeypatch.setattr("kvmhv.cli.output.table", break_down)
    monkeypatch.delenv("KVMHV_DEBUG", raising=False)
    status, _, err = run("vm", "list")
    assert status == 1
    assert len(err.splitlines()) == 2
    assert "ZeroDivisionError" in err
    monkeypatch.setenv("KVMHV_DEBUG", "1")
    assert "Traceback" in run("vm", "list")[2]


# --- what is asked ------------------------------------------------------------------------------------------------


def test_vm_create_and_start(agent: ScriptedAgent, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    agent.on("POST", "/v1/vms", {})
    agent.on("POST", "/v1/vms/web01/start", {})
    status, out, _ = run(
        *("vm", "create", "web01", "--memory", "256M", "--cpus", "2", "--disk", "size=4G"),
        *("--disk", "file=here.img,format=raw", "--switch", "lan", "--mac", "02:00:00:00:00:01"),
        *("--image", "small", "--append", "quiet", "--cpu", "qemu64", "--machine", "pc-q35-7.2", "--start"),
    )
    assert (status, out) == (0, "web01 created and started\n")
    spec = agent.requests[0].json()
    assert spec["memory_bytes"] == 256 * 1024**2
    assert spec["disks"][1]["file"] == str(tmp_path / "here.img"), "a relative path is meant from here"  # type: ignore[index]
    assert (spec["switches"], spec["macs"]) == (["lan"], ["02:00:00:00:00:01"])
    assert "free_page_reporting" not in spec, "an older agent would refuse it"
    assert (spec["image"], spec["append"], spec["cpu"], spec["machine"]) == ("small", "quiet", "qemu64", "pc-q35-7.2")


@pytest.mark.parametrize(
    ("options", "changes", "said"),
    [
        (["--probe", "ping:10.0.0.1"], {"probe": "ping:10.0.0.1"}, "is asked by ping:10.0.0.1 when it moves"),
        (["--no-probe"], {"probe": None}, "has no probe"),
        (["--free-page-reporting"], {"free_page_reporting": True}, "gives what it frees back to the host"),
        (
            ["--no-free-page-reporting", "--no-probe"],
            {"free_page_reporting": False, "probe": None},
            "does not give what it frees back to the host, has no probe",
        ),
    ],
)
def test_vm_set(agent: ScriptedAgent, run: Run, options: list[str], changes: dict[str, object], said: str) -> None:
    agent.on("PATCH", "/v1/vms/web01", {})
    assert run("vm", "set", "web01", *options)[:2] == (0, f"web01 {said}\n")
    assert agent.requests[0].json() == changes


@pytest.mark.parametrize("options", [[], ["--probe", "ping:10.0.0.1", "--no-probe"]])
def test_vm_set_without_one_wish(run: Run, options: list[str]) -> None:
    assert run("vm", "set", "web01", *options)[0] == 2


def test_image_import(agent: ScriptedAgent, run: Run, tmp_path: Path) -> None:
    for part in ("kernel", "initrd", "disk"):
        (tmp_path / part).write_bytes(part.encode() * 100_000)
        agent.on("PUT", f"/v1/images/my%20image/{part}", {})
    agent.on("GET", "/v1/images", [])
    files = [argument for part in ("kernel", "initrd", "disk") for argument in (f"--{part}", str(tmp_path / part))]
    status, out, _ = run("image", "import", "my image", *files, "--append", "console=ttyS0 a&b", "--format", "raw")
    assert status == 0
    assert "uploading kernel" in out
    kernel, initrd, disk = (it for it in agent.requests if it.method == "PUT")
    assert kernel.path.endswith("/kernel?append=console%3DttyS0+a%26b")
    assert disk.path.endswith("/disk?format=raw")
    assert initrd.body == b"initrd" * 100_000


def test_stop_remove_and_settings(agent: ScriptedAgent, run: Run) -> None:
    agent.on("POST", "/v1/vms/web01/stop", None)
    agent.on("DELETE", "/v1/vms/web01", None)
    assert run("vm", "stop", "web01", "--force", "--timeout", "5")[0] == 0
    assert agent.requests[-1].json() == {"force": True, "timeout_s": 5.0}
    assert run("vm", "remove", "web01", "--keep-disks")[0] == 0, "asks nothing where there is no terminal"
    assert agent.requests[-1].path == "/v1/vms/web01?keep_disks=true"
    status, _, err = run("host", "set", "migration.enabled=true", "migration.networks=a,b=c")
    assert (status, "[not-scripted]" in err) == (2, True)
    assert agent.requests[-1].json() == {"changes": {"migration.enabled": "true", "migration.networks": "a,b=c"}}


def test_trust_and_tokens(agent: ScriptedAgent, run: Run) -> None:
    agent.on("POST", "/v1/host/trust/invite", {"code": "abc", "expires_in_s": 600})
    agent.on("POST", "/v1/host/trust/join", {"name": "host2", "address": "host2:6600", "fingerprint": "ff"})
    agent.on("POST", "/v1/host/tokens", {"name": "ci", "token": "s3cret"})
    agent.on("GET", "/v1/host/tokens", [{"name": "ci", "created_at": 1}])
    assert "kvmhv host trust join abc" in run("host", "trust", "invite")[1]
    assert "host2 (host2:6600)" in run("host", "trust", "join", "abc")[1]
    assert run("host", "token", "create", "ci")[1] == "s3cret\n"
    assert run("host", "token", "list")[1].splitlines()[1].startswith("ci    19")


def test_another_host_through_the_local_agent(agent: ScriptedAgent, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVMHV_LAB", "nosuchlab")
    agent.on("GET", "/v1/hosts/host2/vms", [SUMMARY])
    assert run("--host", "host2", "vm", "list")[0] == 0
    monkeypatch.setenv("KVMHV_HOST", "host2")
    assert run("vm", "list")[0] == 0


# --- start, help, completion --------------------------------------------------------------------------------------


def _kvmhv(*arguments: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "kvmhv", *arguments],
        check=False,
        capture_output=True,
        text=True,
        env=environment,
        timeout=60,
    )


def test_nothing_slow_is_imported_before_it_is_needed() -> None:
    for arguments in (["--help"], ["vm", "list"], ["move", "watch", "x"]):
        script = (
            f"import sys; from kvmhv.cli.main import main; main({arguments!r}); "
            "print(*{name.split('.')[0] for name in sys.modules}, file=sys.stderr)"
        )
        done = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True, timeout=60)
        loaded = set(done.stderr.splitlines()[-1].split())
        assert not loaded & {"aiohttp", "rich", "asyncio", "qemu", "pyroute2", "cryptography", "structlog"}
        assert "click" in loaded


def test_every_command_has_help() -> None:
    listed = _kvmhv("--help").stdout
    for name in ("agent", "doctor", "host", "image", "move", "vm", "completion", "lab", "demo"):
        assert f"\n  {name}" in listed
    for arguments in (("vm", "--help"), ("vm", "create", "-h"), ("move", "--help"), ("host", "trust", "--help")):
        assert _kvmhv(*arguments).returncode == 0


def test_completion(agent: ScriptedAgent) -> None:
    agent.on("GET", "/v1/vms", [SUMMARY])
    environment = {
        "KVMHV_SOCKET": str(agent.socket),
        "_KVMHV_COMPLETE": "bash_complete",
        "COMP_WORDS": "kvmhv vm start we",
        "COMP_CWORD": "3",
    }
    assert _kvmhv(environment=environment).stdout == "plain,web01\n"
    silent = _kvmhv(environment=environment | {"KVMHV_SOCKET": "/nosuch"})
    assert (silent.stdout.strip(), silent.stderr) == ("", "")
    assert "_KVMHV_COMPLETE=bash_complete" in _kvmhv("completion", "bash").stdout


def test_the_manual_page_has_every_command() -> None:
    page = (Path(__file__).parent.parent / "packaging" / "kvmhv.1").read_text().replace("\\-", "-")
    plain = re.sub(r"\\f[BIR]", "", page)
    for group in ("host", "image", "vm", "move"):
        command = kvmhv.get_command(click.Context(kvmhv), group)
        assert isinstance(command, click.Group)
        for name in command.commands:
            assert re.search(rf"^.*kvmhv {group}\b.*\b{name}\b", plain, re.MULTILINE), f"{group} {name}"
    for option in kvmhv.get_command(click.Context(kvmhv), "vm").commands["move"].params:  # type: ignore[union-attr]
        assert option.opts[-1] in plain or option.name in ("name", "json")
