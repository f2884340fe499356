"""A guest of libvirt's that writes all the time: on storage that both hosts share, and with its disk on the way.

Each write that it was told is done is looked up in the image afterwards.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from kvmhv.lab.demo import ACK_PORT, PYTHON, Watch
from kvmhv.lab.guest_images import GuestImages
from kvmhv.lab.lab import Lab
from kvmhv.lab.libvirt import Libvirt
from kvmhv.lab.plan import LIBVIRT_TREE
from kvmhv.lab.storage_host import StorageHost
from tests.real.conftest import lab_name
from tests.real.moving import Side, codes_of, until

pytestmark = [pytest.mark.real, pytest.mark.timeout(420, func_only=True)]

SHARED, OWN = "/srv/images", "/var/lib/libvirt/images"
GUEST_IP = "10.77.3.60"
SECRET = "/run/storage.secret"
DOMAIN = """<domain type="qemu">
  <name>web01</name>
  <memory unit="MiB">128</memory>
  <vcpu>1</vcpu>
  <os><type arch="x86_64" machine="q35">hvm</type>
    <kernel>/srv/kernel</kernel><initrd>/srv/initrd</initrd><cmdline>{cmdline}</cmdline></os>
  <features><acpi/></features>
  <devices>
    <disk type="file" device="disk">
      <driver name="qemu" type="{format}" cache="{cache}" discard="unmap"/>
      <source file="{image}"/><target dev="vda" bus="virtio"/>
    </disk>
    <interface type="bridge"><source bridge="lan"/><model type="virtio"/></interface>
  </devices>
</domain>
"""


class Site:
    """Two hosts with libvirt and agents that have mounted one directory of a file server at the same place."""

    def __init__(self, lab: Lab, images: GuestImages) -> None:
        self.lab = lab
        self.libvirt = Libvirt([lab.host("host1"), lab.host("host2")])
        self.server = StorageHost(lab)
        self.client = lab.host("client")
        self.images = images
        self.a, self.b = self.sides = Side(lab.host("host1")), Side(lab.host("host2"))
        for side in self.sides:
            shutil.copy(images.vmlinuz, side.file("/srv/kernel"))
            shutil.copy(images.initrd, side.file("/srv/initrd"))
            self.mount(side, "vms")
            side.kvmhv("storage", "add", "images", "--kind", "dir", "--path", SHARED, "--shared")
            until(f"libvirt on {side.name}", lambda at=side: "libvirt-silent" not in self.ails(at))

    def mount(self, side: Side, share: str) -> None:
        """Mount a share where an operator would, by way of kvmhv's own mount of it: the lab's kernel has no cifs."""
        secret = side.file(SECRET)
        secret.touch(mode=0o600)
        secret.write_text(self.server.secret)
        words = self.server.add_command(share, "smb", share)
        words[words.index("--password-file") + 1] = SECRET
        side.kvmhv(*words)
        side.sh(f"mkdir -p {SHARED}; mount --bind /run/kvmhv/storage/{share} {SHARED}")

    @staticmethod
    def ails(side: Side) -> set[str]:
        """What doctor finds."""
        return {one["id"] for one in side.run("doctor").json}

    def define(self, image: str, disk_format: str, cache: str = "none") -> None:
        """Make an image on host1, and a domain of it that writes there."""
        client_ip = self.client.plan.addresses["lan"]
        works = f"kvmhv.ip={GUEST_IP}/24 kvmhv.disk=/dev/vda kvmhv.ack={client_ip}:{ACK_PORT} kvmhv.dirty=4M"
        words = {"cmdline": f"{self.images.cmdline} {works}", "image": image, "format": disk_format, "cache": cache}
        self.a.sh(f"qemu-img create -q -f {disk_format} {image} 48M")
        self.a.file("/root/domain.xml").write_text(DOMAIN.format(**words))
        self.a.sh("virsh -q define /root/domain.xml")

    def running(self) -> list[str]:
        """Return the hosts on which the guest runs, as libvirt says there."""
        return [side.name for side in self.sides if "running" in side.sh("virsh -q list")]

    def clear(self) -> None:
        """No domain and no image."""
        for side in self.sides:
            side.sh("virsh -q destroy web01 || true; virsh -q undefine web01 || true")
            until(f"no move on {side.name}", side.has_no_move)
            side.sh(f"rm -f {SHARED}/* {OWN}/*")


@pytest.fixture(scope="module")
def made(_lab_ground: None, images: GuestImages) -> Iterator[Site]:
    suites = {"host1": LIBVIRT_TREE, "host2": LIBVIRT_TREE}
    lab = Lab.up(lab_name("virtw"), suites=suites, storage=True, progress=print)
    try:
        yield Site(lab, images)
    finally:
        lab.down()
    assert lab.leftovers() == []


@pytest.fixture
def site(made: Site) -> Iterator[Site]:
    try:
        yield made
    finally:
        made.clear()


class Writer:
    """The client that keeps what the guest was told is written."""

    def __init__(self, site: Site) -> None:
        self.watch = Watch(site.client, GUEST_IP)
        self.watch.wait("listening")

    def goes_on(self) -> None:
        """Wait until more is acknowledged."""
        before = self.acknowledged()
        until("the guest writes on", lambda: self.acknowledged() > before + 5)

    def acknowledged(self) -> int:
        return int(self.watch.snapshot()["total"]["acks"]["received"])


@contextmanager
def writing(site: Site, image: str, disk_format: str, cache: str = "none") -> Iterator[Writer]:
    """A guest at work; at the end every acknowledged write is looked up where its disk is then."""
    writer = Writer(site)
    try:
        site.define(image, disk_format, cache)
        site.a.kvmhv("vm", "start", "web01")
        writer.goes_on()
        yield writer
        writer.goes_on()
        (home,) = (side for side in site.sides if side.name in site.running())
        home.sh("virsh -q destroy web01")
        shutil.copy(site.client.path(writer.watch.acks), home.file("/root/acks"))
        found = home.host.exec(
            [*PYTHON, "-m", "kvmhv.lab.oracle", "--acks", "/root/acks", "--image", image, "--format", disk_format],
            check=False,
        )
        told = json.loads(found.stdout)
        assert told["ok"], told["problems"]
        assert told["acked"] > 10
    finally:
        writer.watch.end()
        site.client.exec(["rm", "-rf", "/var/lib/kvmhv/watch"])


def move(source: Side, target: Side, *options: str) -> Any:
    answer = source.run("vm", "move", "web01", "--to", target.name, *options)
    assert (answer.status, answer.json["outcome"], answer.json["warnings"]) == (0, "done", []), answer
    return answer.json


@pytest.mark.parametrize(("disk_format", "cache"), [("raw", "none"), ("qcow2", "none"), ("raw", "writeback")])
def test_on_storage_that_both_share_only_memory_moves(site: Site, disk_format: str, cache: str) -> None:
    image = f"{SHARED}/web01.{disk_format}"
    with writing(site, image, disk_format, cache) as writer:
        for source, target in ((site.a, site.b), (site.b, site.a)):
            report = move(source, target)
            assert (report["mode"], report["disk_bytes"]) == ("shared-storage", 0)
            assert [phase["phase"] for phase in report["phases"]] == ["setup", "memory", "state", "cleanup"]
            writer.goes_on()
            assert site.running() == [target.name]
            assert target.file(image).exists()


@pytest.mark.parametrize("disk_format", ["raw", "qcow2"])
def test_with_its_disk_on_the_way(site: Site, disk_format: str) -> None:
    image = f"{OWN}/web01.{disk_format}"
    with writing(site, image, disk_format) as writer:
        for source, target in ((site.a, site.b), (site.b, site.a)):
            assert "disk-local" in codes_of(source.run("vm", "check", "web01", "--to", target.name).json["findings"])
            report = move(source, target, "--include-storage")
            assert report["mode"] == "shared-nothing"
            writer.goes_on()
            assert not source.file(image).exists()


@pytest.mark.parametrize("dies", ["source", "target"])
def test_libvirt_killed_on_shared_storage_leaves_one_guest_and_its_image(site: Site, dies: str) -> None:
    image = f"{SHARED}/web01.raw"
    with writing(site, image, "raw") as writer:
        with site.a.slow_network("40mbit"):
            begun = site.a.begin(site.b, "--max-passes", "2")
            site.a.reaches(begun, "memory", lambda report: report["memory_bytes"] > 1 << 20)
            victim = site.a.host if dies == "source" else site.b.host
            site.libvirt.kill(victim)
            site.libvirt.start(victim)
            site.libvirt.wait(victim)
            until("the move ends", lambda: site.a.report(begun)["outcome"] in ("done", "failed"))
        assert len(site.running()) == 1
        writer.goes_on()
        source, target = (site.a, site.b) if site.running() == ["host1"] else (site.b, site.a)
        move(source, target)


def test_two_servers_at_one_path_are_found_before_anything_moves(site: Site) -> None:
    image = f"{SHARED}/web01.raw"
    with writing(site, image, "raw"):
        site.mount(site.b, "other")
        try:
            answer = site.a.run("vm", "move", "web01", "--to", "host2")
            assert (answer.status, codes_of(answer.json["error"]["findings"])) == (3, {"disk-local"}), answer
            assert site.running() == ["host1"]
        finally:
            site.b.sh(f"umount {SHARED}")
            site.b.kvmhv("storage", "remove", "other")
