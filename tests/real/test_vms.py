"""VMs on a real host: its agent, its CLI, real QEMU. What the operator sees, and what is left afterwards."""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvmhv.lab.guest_images import GuestImages, ensure_guest_images, write_boot_guest
from kvmhv.lab.lab import Lab, LabHost

pytestmark = pytest.mark.real

GUEST_S = 60.0
"""For a guest to say its first words, on a busy machine without KVM."""


class Host:
    """host1 through its CLI, with a boot-sector guest's disk at /srv/boot.raw."""

    def __init__(self, host: LabHost) -> None:
        self.lab_host = host

    def kvmhv(self, *arguments: str) -> Any:
        done = self.lab_host.exec(["kvmhv", *arguments, "--json"], timeout_s=120)
        return json.loads(done.stdout) if done.stdout.strip() else None

    def refused(self, *arguments: str) -> tuple[int, str]:
        done = self.lab_host.exec(["kvmhv", *arguments], check=False, timeout_s=120)
        return done.returncode, done.stdout + done.stderr

    def sh(self, script: str) -> str:
        return self.lab_host.exec(["sh", "-c", script]).stdout

    def show(self, name: str = "web01") -> Any:
        return self.kvmhv("vm", "show", name)

    def console(self, name: str = "web01") -> str:
        """What the guest has said on its console since it was started."""
        log = Path(self.show(name)["console"]).with_name("console.log")
        return self.lab_host.path(str(log)).read_text(errors="replace")

    def left(self) -> dict[str, list[str]]:
        """Whatever VMs leave on a host; logs that are kept aside are no rest."""
        return {
            "processes": self.sh("pgrep -a qemu-system || true").splitlines(),
            "run": self.sh("ls /run/kvmhv/vm 2>/dev/null || true").splitlines(),
            "disks": self.sh("find /var/lib/kvmhv/disks -mindepth 1 2>/dev/null || true").splitlines(),
            "vms": self.sh("ls /var/lib/kvmhv/vms 2>/dev/null || true").splitlines(),
            "taps": self.sh("ip -o link | grep -o '\\bkv[0-9a-f]*' || true").splitlines(),
        }


def until(what: str, is_so: Callable[[], bool], timeout_s: float = GUEST_S) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def images() -> GuestImages:
    return ensure_guest_images(print)


@pytest.fixture
def host(lab: Lab, images: GuestImages) -> Iterator[Host]:
    """host1, which must be as it was afterwards."""
    used = Host(lab.host("host1"))
    used.sh("mkdir -p /srv")
    write_boot_guest(
        used.lab_host.path("/srv/boot.raw"), images.boot_template, working_set_bytes=1 << 20, rate_bytes_per_s=1 << 20
    )
    before = used.left()
    yield used
    for vm in used.kvmhv("vm", "list"):
        used.kvmhv("vm", "stop", vm["name"], "--force")
        used.kvmhv("vm", "remove", vm["name"], "--yes")
    for image in used.kvmhv("image", "list"):
        used.kvmhv("image", "remove", image["name"])
    used.sh("rm -rf /srv/*")
    assert used.left() == before


@pytest.fixture
def booted(host: Host) -> Host:
    """web01 runs the boot-sector guest."""
    host.kvmhv("vm", "create", "web01", "--memory", "32M", "--disk", "file=/srv/boot.raw,format=raw", "--switch", "lan")
    host.kvmhv("vm", "start", "web01")
    until("the guest's first heartbeat", lambda: "beat" in host.console())
    return host


def test_a_vm_runs_and_is_shown(booted: Host) -> None:
    shown = booted.show()
    assert (shown["state"], shown["host"], shown["accel"]) == ("running", "host1", "tcg")
    assert shown["qemu_version"].startswith("10.")
    (listed,) = booted.kvmhv("vm", "list")
    expected = {"name": "web01", "id": shown["vm"]["id"], "state": "running", "host": "host1", "memory_bytes": 32 << 20}
    assert listed == {**expected, "cpus": 1, "runtime": ""}
    assert booted.sh("ls /var/lib/kvmhv/disks/web01").split() == ["disk0.raw"]
    (tap,) = booted.left()["taps"]
    assert "master lan" in booted.sh(f"ip link show {tap}")
    booted.kvmhv("vm", "stop", "web01")
    assert booted.left()["taps"] == []


def test_vms_are_as_they_were_after_the_agents_death(booted: Host) -> None:
    before = booted.show()
    booted.lab_host.agent_kill()
    booted.lab_host.agent_wait()
    assert booted.show() == before
    beats = booted.console().count("beat")
    until("the guest goes on", lambda: booted.console().count("beat") > beats)


def test_a_guest_that_knows_no_power_button_is_ended_by_force(host: Host) -> None:
    host.kvmhv("vm", "create", "web01", "--memory", "32M", "--disk", "size=1M", "--start")  # nothing to boot
    stopped = host.kvmhv("vm", "stop", "web01", "--timeout", "1")
    assert stopped["state"] == "stopped"
    assert "by force: the guest did not switch off within 1 s" in stopped["exit_reason"]
    assert (host.left()["processes"], host.left()["run"]) == ([], [])


def test_a_qemu_that_is_killed_is_a_crash(booted: Host) -> None:
    booted.sh(f"kill -9 {booted.show()['pid']}")
    until("the agent sees it", lambda: booted.show()["state"] == "crashed")
    until("its tap goes", lambda: booted.left()["taps"] == [], 10)
    assert "signal 9" in booted.show()["exit_reason"]
    booted.kvmhv("vm", "start", "web01")
    assert (booted.show()["state"], booted.show()["exit_reason"]) == ("running", None)


def test_a_qemu_that_ends_while_no_agent_is_there(booted: Host) -> None:
    pid = booted.show()["pid"]
    booted.lab_host.agent_stop()
    booted.sh(f"kill -9 {pid}")
    booted.lab_host.agent_start()
    shown = booted.show()
    assert (shown["state"], shown["pid"]) == ("crashed", None)
    assert "no agent" in shown["exit_reason"]
    booted.kvmhv("vm", "start", "web01")
    until("the guest's first heartbeat", lambda: "beat" in booted.console())


def test_a_qemu_that_hangs_is_shown_and_ended_by_force(booted: Host) -> None:
    pid = booted.show()["pid"]
    booted.sh(f"kill -STOP {pid}")
    started = time.monotonic()
    shown = booted.show()
    assert (shown["state"], shown["pid"]) == ("paused", pid)
    assert booted.kvmhv("vm", "stop", "web01", "--force")["state"] == "stopped"
    assert time.monotonic() - started < 110
    assert booted.left()["processes"] == []


def test_a_chain_keeps_its_layers(host: Host) -> None:
    host.sh("qemu-img create -q -f qcow2 -b boot.raw -F raw /srv/mid.qcow2 2M")
    host.sh("qemu-img create -q -f qcow2 -b mid.qcow2 -F qcow2 /srv/top.qcow2")
    vm = host.kvmhv("vm", "create", "web01", "--memory", "32M", "--disk", "file=/srv/top.qcow2")["vm"]
    paths = ["web01/disk0.qcow2", "web01/disk0.base1.qcow2", "web01/disk0.base2.raw"]
    assert [layer["path"] for layer in vm["disks"][0]["layers"]] == paths
    host.sh("rm /srv/*")
    host.kvmhv("vm", "start", "web01")
    until("the guest's first heartbeat", lambda: "beat" in host.console())
    status, said = host.refused(
        "vm", "create", "thief", "--memory", "32M", "--disk", "file=/var/lib/kvmhv/disks/web01/disk0.qcow2"
    )
    assert (status, "disk-in-use" in said) == (2, True), said


def test_two_vms_on_one_imported_disk(host: Host) -> None:
    host.kvmhv("image", "import", "boot", "--disk", "/srv/boot.raw")
    for name in ("web01", "web02"):
        host.kvmhv("vm", "create", name, "--memory", "32M", "--disk", "size=4M,backing=boot", "--start")
    for name in ("web01", "web02"):
        until(f"the first heartbeat of {name}", lambda name=name: "beat" in host.console(name))  # type: ignore[misc]
    status, said = host.refused("image", "remove", "boot")
    assert (status, "image-in-use" in said) == (2, True), said


def test_a_linux_guest_boots_its_own_kernel_and_obeys_the_power_button(host: Host, images: GuestImages) -> None:
    for file in (images.vmlinuz, images.initrd):
        host.lab_host.path(f"/srv/{file.name}").write_bytes(file.read_bytes())
    host.kvmhv(
        "image", "import", "linux", "--kernel", "/srv/vmlinuz", "--initrd", "/srv/initrd", "--append", images.cmdline
    )
    host.kvmhv("vm", "create", "web01", "--memory", "256M", "--image", "linux", "--disk", "size=64M", "--start")
    host.kvmhv("image", "remove", "linux")
    until("the guest's shell", lambda: "BusyBox" in host.console(), 120)
    stopped = host.kvmhv("vm", "stop", "web01")
    assert (stopped["state"], stopped["exit_reason"]) == ("stopped", "stopped by the guest, on the power button")
    assert host.left()["run"] == []
    host.kvmhv("vm", "start", "web01")
    host.lab_host.agent_kill()  # in the midst of the boot
    host.lab_host.agent_wait()
    until("the guest's shell", lambda: "BusyBox" in host.console(), 120)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["a b", "--memory", "32M"], "name-invalid"),
        (["x" * 300, "--memory", "32M"], "name-invalid"),
        (["wéb", "--memory", "32M"], "name-invalid"),
        (["web01", "--memory", "0"], "memory-invalid"),
        (["web01", "--memory", "10T"], "memory-invalid"),
        (["web01", "--memory", "32M", "--cpus", "200"], "cpus-invalid"),
        (["web01", "--memory", "32M", "--machine", "q35"], "machine-invalid"),
        (["web01", "--memory", "32M", "--cpu", "pentium9"], "cpu-invalid"),
        (["web01", "--memory", "32M", "--switch", "nowhere"], "switch-unknown"),
        (["web01", "--memory", "32M", "--image", "nobody"], "image-unknown"),
        (["web01", "--memory", "32M", "--disk", "size=0"], "size-invalid"),
        (["web01", "--memory", "32M", "--disk", "size=1G", "--disk", "file=/srv"], "disk-invalid"),
        (["web01", "--memory", "32M", "--disk", "size=1G", "--disk", "file=/dev/null"], "disk-invalid"),
        (["web01", "--memory", "32M", "--disk", "size=1G", "--disk", "file=/srv/text"], "disk-invalid"),
        (["web01", "--memory", "32M", "--disk", "size=1G", "--disk", "file=/srv/absent"], "disk-invalid"),
        (["web01", "--memory", "32M", "--disk", "size=1G,location=nfs"], "location-unknown"),
    ],
)
def test_bad_requests(host: Host, arguments: list[str], code: str) -> None:
    host.sh("echo text > /srv/text")
    before = host.left()
    status, said = host.refused("vm", "create", *arguments)
    assert (status, code in said) == (2, True), said
    assert host.left() == before
    assert host.kvmhv("vm", "list") == []


def test_a_file_in_the_place_of_a_disk(host: Host) -> None:
    host.sh("mkdir -p /var/lib/kvmhv/disks/web01 && echo precious > /var/lib/kvmhv/disks/web01/disk1.qcow2")
    status, said = host.refused("vm", "create", "web01", "--memory", "32M", "--disk", "size=1G", "--disk", "size=1G")
    assert (status, "file-exists" in said) == (1, True), said
    assert host.sh("cat /var/lib/kvmhv/disks/web01/*") == "precious\n"
    host.sh("rm -r /var/lib/kvmhv/disks/web01")
