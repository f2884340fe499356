import subprocess
import sys
import threading
from pathlib import Path

import msgspec
import pytest

from kvmhv.errors import CallerError, HostError
from kvmhv.lab import state as states
from kvmhv.lab.plan import make_plan
from kvmhv.lab.state import LabState


@pytest.fixture(autouse=True)
def _own_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RUN_DIR", "DATA_DIR", "CACHE_DIR"):
        monkeypatch.setattr(states, name, tmp_path / name)


def _state(boot_id: str | None = None, *, complete: bool = True) -> LabState:
    return LabState(make_plan("mine"), {"trixie": "/tree"}, boot_id or states.machine_boot_id(), complete)


def test_a_state_is_read_as_it_was_written() -> None:
    states.write_state(_state())
    assert states.read_state("mine") == states.load("mine") == _state()
    assert states.run_dir("mine").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("state", [_state(complete=False), _state("an-earlier-boot"), None])
def test_a_lab_that_is_half_made_or_of_an_earlier_boot_is_not_up(state: LabState | None) -> None:
    if state is not None:
        states.write_state(state)
    with pytest.raises(CallerError) as caught:
        states.load("mine")
    assert caught.value.code == "lab-down"


@pytest.mark.parametrize("content", [b"", b"{", b'{"plan": 1}', b"\xff"])
def test_a_torn_state_is_none(content: bytes) -> None:
    states.write_state(_state())
    (states.run_dir("mine") / "state.json").write_bytes(content)
    assert states.read_state("mine") is None


def test_the_socket_of_a_host_is_known_while_the_host_is_there() -> None:
    assert states.socket_of("mine", "host1") is None
    states.run_dir("mine", "host1").mkdir(parents=True)
    assert states.socket_of("mine", "host1") == states.RUN_DIR / "mine/host1/agent.sock"
    assert states.socket_of("mine", "host2") is None
    assert states.socket_of("other", "host1") is None


@pytest.mark.parametrize("name", ["..", "a/b", "", "."])
def test_the_socket_of_no_name_at_all_is_none(name: str) -> None:
    states.run_dir("mine", "host1").mkdir(parents=True)
    assert states.socket_of("mine", name) is None
    assert states.socket_of(name, "mine") is None


def test_the_default_lab_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KVMHV_LAB", raising=False)
    assert states.default_lab() == "lab"
    monkeypatch.setenv("KVMHV_LAB", "mine")
    assert states.default_lab() == "mine"


def test_a_lock_has_one_holder_and_says_who_waited() -> None:
    path = states.RUN_DIR / ".x.lock"
    with states.lock(path, "lab 'x'"):
        with pytest.raises(HostError, match="lab 'x'") as caught, states.lock(path, "lab 'x'", timeout_s=0):
            pytest.fail("two holders")
        assert caught.value.code == "lab-busy"
    assert not path.exists()
    with states.lock(path, "lab 'x'", timeout_s=0):
        assert path.exists()


def test_a_waiter_gets_the_lock_although_its_file_was_removed() -> None:
    path = states.RUN_DIR / ".x.lock"
    holders: list[int] = []
    most: list[int] = []

    def hold() -> None:
        for _ in range(20):
            with states.lock(path, "x"):
                holders.append(1)
                most.append(len(holders))
                holders.pop()

    threads = [threading.Thread(target=hold) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(most) == 60
    assert max(most) == 1


def test_what_a_killed_holder_has_begun_keeps_the_lock_until_it_ends() -> None:
    path = states.RUN_DIR / ".x.lock"
    killed = f"""
import os, pathlib, subprocess
from kvmhv.lab import state
with state.lock(pathlib.Path({str(path)!r}), "x"):
    subprocess.Popen(["cat"], pass_fds=state.held_locks())
    os.kill(os.getpid(), 9)
"""
    with subprocess.Popen([sys.executable, "-c", killed], stdin=subprocess.PIPE) as holder:
        holder.wait(30)
        with pytest.raises(HostError), states.lock(path, "x", timeout_s=0):
            pytest.fail("two at it")
    with states.lock(path, "x", timeout_s=5):  # its input has ended, and it with that
        assert states.held_locks()
    assert states.held_locks() == ()


def test_removing_files_touches_one_lab_only() -> None:
    for name in ("mine", "mine-too"):
        states.data_dir(name, "host1").mkdir(parents=True)
        states.run_dir(name, "host1").mkdir(parents=True)
    states.remove_files("mine")
    assert states.known_labs() == ["mine-too"]


def test_state_json_is_for_people_too() -> None:
    states.write_state(_state())
    text = (states.run_dir("mine") / "state.json").read_text()
    assert msgspec.json.decode(text)["plan"]["name"] == "mine"
    assert len(text.splitlines()) > 10
