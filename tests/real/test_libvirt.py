"""Guests that libvirt runs: moved there and back with all that defines them, and never guessed about when libvirt dies.

The domains are as people make them: one by hand with all sorts of devices, UEFI among them, one as small as it can be.
"""

import re
from collections.abc import Iterator

import pytest

from kvmhv.lab.guest_images import GuestImages, write_boot_guest
from kvmhv.lab.lab import Lab
from kvmhv.lab.libvirt import Libvirt
from kvmhv.lab.plan import LIBVIRT_TREE
from tests.real.conftest import lab_name
from tests.real.moving import MIB, Report, Side, codes_of, until

pytestmark = pytest.mark.real

IMAGES = "/var/lib/libvirt/images"
STATUS = "/run/libvirt/qemu/web01.xml"
PASSES = re.compile(r"passes (\d+) errors (\d+)")
SMALL = """<domain type="qemu">
  <name>{name}</name>
  <metadata><operator xmlns="urn:example:notes">do not lose this</operator></metadata>
  <memory unit="MiB">48</memory>
  <vcpu>1</vcpu>
  <os><type arch="x86_64" machine="q35">hvm</type><boot dev="hd"/></os>
  <features><acpi/></features>
  <on_crash>restart</on_crash>
  <devices>
    <disk type="file" device="disk">
      <driver name="qemu" type="raw" cache="none"/><source file="{images}/{name}.raw"/><target dev="vda" bus="virtio"/>
    </disk>
    <interface type="bridge"><source bridge="lan"/><model type="virtio"/></interface>
    <serial type="file"><source path="/var/log/{name}.console" append="on"/></serial>
    {more}
  </devices>
</domain>
"""
ALL_SORTS = """
    <disk type="file" device="disk">
      <driver name="qemu" type="qcow2" discard="unmap"/><source file="{images}/{name}-data.qcow2"/>
      <target dev="sda" bus="scsi"/><serial>DATA0001</serial>
    </disk>
    <disk type="file" device="cdrom">
      <driver name="qemu" type="raw"/><source file="{images}/media.iso"/><target dev="sdb" bus="sata"/><readonly/>
    </disk>
    <disk type="file" device="cdrom"><target dev="sdc" bus="sata"/><readonly/></disk>
    <controller type="scsi" model="virtio-scsi"/>
    <input type="tablet" bus="usb"/>
    <video><model type="virtio"/></video>
    <graphics type="vnc" port="-1" passwd="secret12"/>
    <rng model="virtio"><backend model="random">/dev/urandom</backend></rng>
    <watchdog model="itco" action="reset"/>
    <channel type="unix"><target type="virtio" name="org.qemu.guest_agent.0"/></channel>
"""
UEFI = """<domain type="qemu">
  <name>uefi</name>
  <memory unit="MiB">128</memory>
  <vcpu>1</vcpu>
  <os firmware="efi"><type arch="x86_64" machine="q35">hvm</type><firmware>
    <feature enabled="no" name="secure-boot"/></firmware></os>
  <features><acpi/></features>
  <cpu mode="host-model"/>
  <devices><input type="tablet" bus="usb"/></devices>
</domain>
"""


class Site:
    """Two hosts with libvirt and agents, and the domains on them."""

    def __init__(self, lab: Lab, images: GuestImages) -> None:
        self.libvirt = Libvirt([lab.host("host1"), lab.host("host2")])
        self.images = images
        self.a, self.b = self.sides = Side(lab.host("host1")), Side(lab.host("host2"))
        for side in self.sides:
            side.sh(f"mkdir -p {IMAGES}; truncate -s 1M {IMAGES}/media.iso")
            side.sh("printf '[timeouts]\\ngrant_s = 3.0\\n' >> /etc/kvmhv/agent.toml")
            side.restart_agent()
            until(f"libvirt on {side.name}", lambda at=side: not self.silent(at))

    def silent(self, side: Side) -> bool:
        """Whether the agent has no libvirt."""
        return "libvirt-silent" in {one["id"] for one in side.run("doctor").json}

    def define(self, name: str, xml: str, *, rate_bytes_per_s: int = 1 * MIB, working_set_bytes: int = 4 * MIB) -> None:
        """Define a domain on host1, with its images."""
        raw = self.a.file(f"{IMAGES}/{name}.raw")
        sizes = {"rate_bytes_per_s": rate_bytes_per_s, "working_set_bytes": working_set_bytes}
        write_boot_guest(raw, self.images.boot_template, **sizes)
        self.a.sh(f"qemu-img create -q -f qcow2 {IMAGES}/{name}-data.qcow2 8M")
        self.a.file("/root/domain.xml").write_text(xml.format(name=name, images=IMAGES))
        self.a.sh("virsh -q define /root/domain.xml")

    def boot(self, name: str = "web01", more: str = "", **rates: int) -> None:
        """Define a domain and start it with kvmhv; wait until its guest works."""
        self.define(name, SMALL.replace("{more}", more), **rates)
        assert self.a.kvmhv("vm", "start", name)["state"] == "running"
        until("the guest's first heartbeat", lambda: "beat" in self.console(self.a, name))

    @staticmethod
    def console(side: Side, name: str = "web01") -> str:
        """Return what the guest has said on that host."""
        log = side.file(f"/var/log/{name}.console")
        return log.read_text(errors="replace") if log.exists() else ""

    def works(self, side: Side, name: str = "web01") -> None:
        """Wait until the guest has verified its whole memory once more there; it was never damaged, nor booted anew."""
        seen = len(PASSES.findall(self.console(side, name)))

        def look() -> bool:
            fresh = [int(passes) for passes, _ in PASSES.findall(self.console(side, name))[seen:]]
            return len(fresh) > 2 and fresh[-1] > fresh[0] + 1

        until(f"the guest works on {side.name}", look)
        said = "".join(self.console(one, name) for one in self.sides)
        assert "BAD" not in said
        assert said.count("BOOT ") == 1
        assert {errors for _, errors in PASSES.findall(said)} == {"0"}

    @staticmethod
    def states(side: Side) -> dict[str, str]:
        """Return what kvmhv says of libvirt's domains there."""
        return {vm["name"]: vm["state"] for vm in side.kvmhv("vm", "list") if vm["runtime"] == "libvirt"}

    @staticmethod
    def virsh(side: Side) -> dict[str, str]:
        """Return what libvirt says of them."""
        lines = side.sh("virsh -q list --all").splitlines()
        return {line.split()[1]: " ".join(line.split()[2:]) for line in lines}

    def moved(self, source: Side, target: Side, name: str = "web01", *options: str) -> Report:
        """Move a domain, which must succeed."""
        answer = source.move(target, *options, vm=name)
        assert (answer.status, answer.json["outcome"]) == (0, "done"), answer
        assert answer.json["warnings"] == [], answer
        assert name not in self.virsh(source)
        assert self.virsh(target)[name] == "running"
        report: Report = answer.json
        return report

    def copies(self, name: str = "web01") -> list[str]:
        """Return the hosts on which the guest runs, as libvirt says there."""
        return [side.name for side in self.sides if self.virsh(side).get(name) == "running"]

    def clear(self) -> None:
        """No domain, no image, no open move; libvirt and the agent run."""
        for side in self.sides:
            side.host.agent_start()
            if side.host.exec(["virsh", "-q", "list"], check=False).returncode:
                self.libvirt.start(side.host)
                self.libvirt.wait(side.host)
            for name, state in self.virsh(side).items():
                if state != "shut off":
                    side.host.exec(["virsh", "-q", "destroy", name], check=False)
                side.host.exec(["virsh", "-q", "undefine", "--nvram", name], check=False)
        for side in self.sides:
            until(f"no move on {side.name}", side.has_no_move)
            until(f"libvirt on {side.name}", lambda at=side: not self.silent(at) and self.states(at) == {})
            left = side.sh(
                f"pgrep -af '[q]emu-system.*guest=' || true; ls {IMAGES}; rm -f {IMAGES}/*[!o] /var/log/*.console"
            )
            assert "qemu-system" not in left, left


@pytest.fixture(scope="module")
def virt_lab(_lab_ground: None) -> Iterator[Lab]:
    lab = Lab.up(lab_name("virt"), suites={"host1": LIBVIRT_TREE, "host2": LIBVIRT_TREE}, progress=print)
    try:
        yield lab
    finally:
        lab.down()
    assert lab.leftovers() == []


@pytest.fixture(scope="module")
def made(virt_lab: Lab, images: GuestImages) -> Site:
    return Site(virt_lab, images)


@pytest.fixture
def site(virt_lab: Lab, made: Site) -> Iterator[Site]:
    try:
        yield made
    finally:
        made.clear()


def definition(side: Side, name: str) -> str:
    """Return all that defines a domain, its password too."""
    flags = side.sh(f"virsh -q dominfo {name} | grep -i -e autostart -e persistent")
    return side.sh(f"virsh -q dumpxml --inactive --security-info {name}") + flags


def test_there_and_back_nothing_of_a_definition_is_lost(site: Site) -> None:
    site.boot(more=ALL_SORTS, rate_bytes_per_s=400 * MIB, working_set_bytes=8 * MIB)
    site.a.sh("virsh -q autostart web01")
    before = definition(site.a, "web01")
    assert "do not lose this" in before
    assert "secret12" in before
    with site.a.slow_network("200mbit"):
        report = site.moved(site.a, site.b)
    site.works(site.b)
    assert definition(site.b, "web01") == before
    assert site.a.sh(f"ls {IMAGES}") == "media.iso\n"
    assert [one["phase"] for one in report["phases"]] == ["setup", "storage", "memory", "state", "cleanup"]
    assert report["mode"] == "shared-nothing"
    assert report["passes"][0]["sent_bytes"] > 8 * MIB
    assert report["switchover"]["pass"] == len(report["passes"])
    assert report["blackout_ms"] > 0
    assert site.states(site.b) == {"web01": "running"}
    site.moved(site.b, site.a)
    site.works(site.a)
    assert definition(site.a, "web01") == before


def test_uefi_and_the_hosts_cpu_model_move_too(site: Site) -> None:
    site.a.file("/root/domain.xml").write_text(UEFI)
    site.a.sh("virsh -q define /root/domain.xml")
    site.a.kvmhv("vm", "start", "uefi")
    before = definition(site.a, "uefi")
    site.moved(site.a, site.b, "uefi")
    assert definition(site.b, "uefi") == before


def test_the_pass_limit_is_exact(site: Site) -> None:
    site.boot(rate_bytes_per_s=400 * MIB, working_set_bytes=8 * MIB)
    with site.a.slow_network("100mbit"):
        report = site.moved(site.a, site.b, "web01", "--max-passes", "3")
    assert report["switchover"]["reason"] == "pass-limit"
    assert [one["number"] for one in report["passes"]] == [1, 2, 3]
    site.works(site.b)


def test_a_cancel_leaves_it_where_it_is_in_each_phase(site: Site) -> None:
    site.boot(rate_bytes_per_s=400 * MIB, working_set_bytes=8 * MIB)
    before = definition(site.a, "web01")
    with site.a.slow_network("4mbit"):
        for phase in ("storage", "memory"):
            move_id = site.a.begin(site.b)
            site.a.reaches(move_id, phase)
            assert site.a.run("vm", "stop", "web01", "--force").json["error"]["code"] == "vm-in-move"
            assert site.a.show()["move"] == move_id
            assert site.a.run("move", "cancel", move_id).json["outcome"] == "cancelled"
            assert site.b.sh(f"ls {IMAGES}") == "media.iso\n"
            assert site.virsh(site.b) == {}
            assert site.copies() == ["host1"]
    site.works(site.a)
    assert definition(site.a, "web01") == before


def test_what_virsh_does_is_seen_at_once(site: Site) -> None:
    site.define("web01", SMALL.replace("{more}", ""))
    until("it is seen", lambda: site.states(site.a) == {"web01": "stopped"})
    site.a.sh("virsh -q start web01")
    until("it runs", lambda: site.states(site.a) == {"web01": "running"}, 5)
    site.a.sh("virsh -q suspend web01")
    until("it stands", lambda: site.states(site.a) == {"web01": "paused"}, 5)
    assert "vm-not-running" in codes_of(site.a.run("vm", "check", "web01", "--to", "host2").json["findings"])
    site.a.sh("virsh -q resume web01")
    site.b.sh(f"qemu-img create -q -f raw {IMAGES}/web01.raw 1M")
    findings = site.a.run("vm", "check", "web01", "--to", "host2", "--include-storage").json["findings"]
    assert codes_of(findings) == {"file-exists"}
    site.a.sh(
        "virsh -q migrate --live --p2p --persistent --undefinesource --copy-storage-all web01 qemu+tls://host2/system"
    )
    until("it is there", lambda: site.states(site.a) == {} and site.states(site.b) == {"web01": "running"}, 5)
    assert site.b.kvmhv("vm", "stop", "web01", "--force")["state"] == "stopped"
    assert site.virsh(site.b) == {"web01": "shut off"}
    for command in (
        ("vm", "remove", "web01", "--yes"),
        ("vm", "create", "web01", "--memory", "32M"),
        ("vm", "move-storage", "web01", "--to", "default"),
    ):
        assert site.b.run(*command).json["error"]["code"] in ("vm-of-runtime", "vm-exists")


@pytest.mark.parametrize("phase", ["storage", "memory", "state"])
@pytest.mark.parametrize("dies", ["source", "target"])
def test_a_libvirt_that_is_killed_leaves_one_guest(site: Site, dies: str, phase: str) -> None:
    """Whatever libvirt makes of it, and whatever kvmhv is told: the guest runs once, and can be moved after that."""
    site.boot(rate_bytes_per_s=400 * MIB, working_set_bytes=8 * MIB)
    before = definition(site.a, "web01")
    victim = site.a.host if dies == "source" else site.b.host
    with site.a.slow_network("4mbit"):
        move_id = site.a.begin(site.b, "--max-passes", "1")
        site.a.reaches(move_id, phase)
        # A libvirt that is killed while it starts a QEMU keeps a domain without a process, and can never end it.
        until("libvirt knows the process", lambda: site.b.sh(f'grep -s "pid=\'[1-9]" {STATUS} || true'))
        site.libvirt.kill(victim)
        site.libvirt.start(victim)
    until("the move ends", lambda: site.a.report(move_id)["outcome"] in ("done", "failed"))
    report = site.a.report(move_id)
    assert report["error"] is None or report["error"]["todo"], report
    source, target = (site.b, site.a) if report["outcome"] == "done" else (site.a, site.b)
    assert site.copies() == [source.name]
    assert "web01" not in site.virsh(target)
    assert "web01.raw" not in target.sh(f"ls {IMAGES}")
    site.works(source)
    assert definition(source, "web01") == before
    site.moved(source, target)
    site.works(target)


@pytest.mark.parametrize(("dies", "outcome"), [("source", "failed"), ("target", "done")])
def test_an_agent_that_is_killed_meanwhile_leaves_one_guest(site: Site, dies: str, outcome: str) -> None:
    """The source's ends the move that it finds under way; the target's was only asked, and is asked again."""
    site.boot(rate_bytes_per_s=400 * MIB, working_set_bytes=8 * MIB)
    victim = site.a.host if dies == "source" else site.b.host
    with site.a.slow_network("8mbit"):
        move_id = site.a.begin(site.b, "--max-passes", "1")
        site.a.reaches(move_id, "memory")
        victim.agent_kill()
        victim.agent_wait()
        until("the move ends", lambda: site.a.report(move_id)["outcome"] == outcome)
    home, other = (site.b, site.a) if outcome == "done" else (site.a, site.b)
    assert site.copies() == [home.name]
    assert "web01.raw" not in other.sh(f"ls {IMAGES}")
    site.works(home)
    site.moved(home, other)
    site.works(other)


def test_a_last_answer_that_is_lost_is_not_guessed(site: Site) -> None:
    """libvirt's open window: the target has let the guest go on, and its source hears nothing of it.

    libvirt lets the source's copy go on too. kvmhv cannot keep it from that; it says so at once, and to the operator.
    """
    site.boot(rate_bytes_per_s=400 * MIB, working_set_bytes=8 * MIB)
    deaf = f"blackhole {site.a.host.plan.addresses['management']}"
    with site.a.slow_network("8mbit"):
        move_id = site.a.begin(site.b, "--max-passes", "1")
        site.a.reaches(move_id, "state")
        site.b.sh(f"ip route add {deaf}")
    try:
        until("the target runs it", lambda: site.virsh(site.b).get("web01") == "running")
        until("the source's libvirt gives up", lambda: site.virsh(site.a).get("web01") == "running")
    finally:
        site.b.sh(f"ip route del {deaf}")
    until("it is told", lambda: site.a.report(move_id)["outcome"] == "needs-operator")
    report = site.a.report(move_id)
    assert report["error"]["code"] == "runs-twice", report
    assert "virsh destroy web01" in report["error"]["todo"]
    site.a.sh("virsh -q destroy web01")
    until("the move ends by itself", lambda: site.a.report(move_id)["outcome"] == "done")
    assert site.copies() == ["host2"]
