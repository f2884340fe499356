"""A Linux guest at work moves with three disks, there, back and there again: its users and its disks lose nothing."""

import json
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from kvmhv.lab.demo import ACK_PORT, BEAT_PORT, PYTHON, Watch
from tests.real.moving import Pair, Side, until

pytestmark = pytest.mark.real

DISKS = {"vda": ("disk0", "qcow2"), "vdb": ("disk1", "raw"), "vdc": ("disk2", "qcow2")}
ASK = "import socket; print(socket.create_connection(('{}', 8), 20).makefile().read())"


class Work:
    """The guest's users on the client host."""

    def __init__(self, pair: Pair) -> None:
        self.pair = pair
        self.client = pair.lab.host("client")
        self.own_ip = self.client.plan.addresses["lan"]
        self.guest_ip = f"{self.own_ip.rsplit('.', 1)[0]}.50"
        self.watch = Watch(self.client, self.guest_ip)

    def goes_on(self, name: str, *kinds: str) -> None:
        """Wait until work of these kinds has been seen in a new window."""
        self.watch.mark(name)

        def look() -> bool:
            window = self.watch.snapshot()["windows"][-1]
            seen = {"beats": "received", "echo": "round_trips", "acks": "received"}
            return window["name"] == name and min(window[kind][seen[kind]] for kind in kinds) > 20

        until(f"work goes on: {name}", look)

    def status(self) -> Any:
        """Return what the guest says of itself."""
        return json.loads(self.client.exec(["python3", "-c", ASK.format(self.guest_ip)]).stdout)

    def look_up(self, side: Side, disk: str) -> Any:
        """Return what the oracle says of a disk of the stopped VM."""
        name, image_format = DISKS[disk]
        shutil.copy(self.client.path(self.watch.acks), side.file("/srv/acks"))
        image = f"/var/lib/kvmhv/disks/web01/{name}.{image_format}"
        argv = ["-m", "kvmhv.lab.oracle", "--acks", "/srv/acks", "--image", image, "--format", image_format]
        done = side.host.exec([*PYTHON, *argv, "--disk", disk], check=False)
        assert done.stdout, done.stderr
        return json.loads(done.stdout)


@pytest.fixture
def work(pair: Pair) -> Iterator[Work]:
    at_work = Work(pair)
    yield at_work
    at_work.watch.end()
    for side in pair.sides:
        side.sh("rm -rf /srv/*")


def test_a_linux_guest_at_work(pair: Pair, work: Work) -> None:
    work.watch.wait("listening")
    images = pair.images
    pair.a.sh("mkdir -p /srv; head -c 3M /dev/urandom > /srv/base.raw")
    pair.a.sh("qemu-img create -q -f qcow2 -F raw -b base.raw /srv/middle.qcow2 24M")
    for file in (images.vmlinuz, images.initrd):
        pair.a.file(f"/srv/{file.name}").write_bytes(file.read_bytes())
    append = (
        f"{images.cmdline} kvmhv.ip={work.guest_ip}/24 kvmhv.dirty=8M kvmhv.dirty_set=32M kvmhv.disk_rate=50 "
        f"kvmhv.disk=/dev/vda,/dev/vdb,/dev/vdc kvmhv.disk_slots=512 "
        f"kvmhv.ack={work.own_ip}:{ACK_PORT} kvmhv.beat={work.own_ip}:{BEAT_PORT}@20ms"
    )
    files = ("--kernel", "/srv/vmlinuz", "--initrd", "/srv/initrd", "--append", append)
    pair.a.kvmhv("image", "import", "linux", *files)
    disks = ("size=32M", "size=16M,format=raw", "size=24M,backing=/srv/middle.qcow2")
    options = [word for disk in disks for word in ("--disk", disk)]
    pair.create("--image", "linux", *options, "--switch", "lan", memory="192M")
    pair.a.kvmhv("image", "remove", "linux")
    work.watch.wait("ready")

    fast, followed = ("--bandwidth", "40M"), ("--bandwidth", "10M", "--post-copy", "--max-passes", "2")
    ways = ((pair.a, pair.b, fast), (pair.b, pair.a, followed), (pair.a, pair.b, fast))
    for number, (source, target, options) in enumerate(ways):
        report = pair.moved(source, target, *options)
        assert report["switchover"]["reason"] in ("threshold", "pass-limit"), report
        assert (report["pages"] or {}).get("complete") is (True if options is followed else None), report
        assert 0 < report["blackout_ms"] < 30_000, report
        work.goes_on(f"after move {number}", "beats", "echo", "acks")

    said = work.status()
    assert said["memory_errors"] == 0, said
    assert [(disk["errors"], disk["mismatches"]) for disk in said["disks"]] == [(0, 0)] * 3, said
    assert said["dirty_passes"] > 0, said
    seen = work.watch.snapshot()
    assert (len(seen["boot_ids"]), seen["echo_broken"], seen["acks_malformed"]) == (1, None, 0), seen

    stopped = pair.b.kvmhv("vm", "stop", "web01")
    assert stopped["exit_reason"] == "stopped by the guest, on the power button", stopped
    for disk in DISKS:
        found = work.look_up(pair.b, disk)
        assert (found["ok"], found["acked"] > 20) == (True, True), found
    pair.b.kvmhv("vm", "start", "web01")
    until("the guest works after its reboot at the target", lambda: len(work.watch.snapshot()["boot_ids"]) == 2)
    work.goes_on("after the reboot", "beats", "acks")  # the one TCP connection ended with the boot
