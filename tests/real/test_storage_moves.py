"""Disks on real servers: smbd, nfs-ganesha and tgt. Only memory moves, and every acknowledged write is in the server's
own copy; what must be refused is refused before a byte goes over."""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from kvmhv.lab.demo import ACK_PORT, PYTHON, Watch
from kvmhv.lab.guest_images import GuestImages
from kvmhv.lab.lab import Lab
from kvmhv.lab.storage_host import DISK_LUNS, StorageHost
from tests.real.conftest import lab_name
from tests.real.moving import Side, codes_of, until
from tests.real.observers import get

pytestmark = [pytest.mark.real, pytest.mark.timeout(420, func_only=True)]

KINDS = ("smb", "nfs", "iscsi")
GUEST_IP = "10.77.3.60"
MOVE_S = 180.0


class Site:
    """Two hosts that have all three servers as locations, called by their kinds."""

    def __init__(self, lab: Lab, images: GuestImages) -> None:
        self.lab = lab
        self.server = StorageHost(lab)
        self.a, self.b = Side(lab.host("host1")), Side(lab.host("host2"))
        self.images = images
        for side in (self.a, self.b):
            for kind in KINDS:
                self.add(side, kind, kind)
        client_ip = lab.host("client").plan.addresses["lan"]
        works = f"kvmhv.ip={GUEST_IP}/24 kvmhv.disk=/dev/vda kvmhv.ack={client_ip}:{ACK_PORT} kvmhv.dirty=4M"
        for name, more in (("plain", ""), ("writes", works)):
            self.give(self.a, images.vmlinuz, "/tmp/kernel")
            self.give(self.a, images.initrd, "/tmp/initrd")
            files = ("--kernel", "/tmp/kernel", "--initrd", "/tmp/initrd")
            self.a.kvmhv("image", "import", name, *files, "--append", f"{images.cmdline} {more}")

    def give(self, side: Side, file: Path, inside: str) -> None:
        shutil.copy(file, side.file(inside))

    def command(self, side: Side, name: str, kind: str, share: str | None = None) -> list[str]:
        """`storage add` as typed on the host, with the password in a file there."""
        words = self.server.add_command(name, kind, share)
        if "--password-file" in words:
            password = side.file("/run/storage.secret")
            password.touch(mode=0o600)
            password.write_text(self.server.secret)
            words[words.index("--password-file") + 1] = "/run/storage.secret"
        return words

    def add(self, side: Side, name: str, kind: str, share: str | None = None) -> None:
        side.kvmhv(*self.command(side, name, kind, share))

    def disk(self, kind: str, disk_format: str, size: str = "48M") -> str:
        lun = f",lun={DISK_LUNS[0]}" if kind == "iscsi" else ""
        return f"size={size},location={kind},format={disk_format}{lun}"

    def copy_of_the_server(self, kind: str, disk_format: str) -> Path:
        own = f"iscsi/disk{DISK_LUNS[0]}.img" if kind == "iscsi" else f"{kind}/web01/disk0.{disk_format}"
        return self.server.path(own)

    def wipe_lun(self) -> None:
        """A LUN keeps what the guest before wrote, and may show it again where this one discards."""
        lun = self.copy_of_the_server("iscsi", "raw")
        subprocess.run(["fallocate", "--punch-hole", "--length", str(lun.stat().st_size), lun], check=True)

    def owner(self, kind: str) -> Any:
        """The ownership record of web01's raw disk, as it lies on the server."""
        if kind == "iscsi":
            block = self.server.path("iscsi/records.img").read_bytes()[512 * DISK_LUNS[0] : 512 * (DISK_LUNS[0] + 1)]
            return json.loads(block[8:].rstrip(b"\0"))
        return json.loads(self.server.path(f"{kind}/web01/disk0.raw.owner").read_text())

    @contextmanager
    def vm(self, *disks: str, image: str = "plain") -> Iterator[None]:
        """A VM web01 that runs on host1 at first and is removed wherever it is at the end."""
        options = [word for disk in disks for word in ("--disk", disk)]
        self.a.kvmhv("vm", "create", "web01", "--memory", "96M", "--image", image, "--switch", "lan", *options)
        try:
            self.a.kvmhv("vm", "start", "web01")
            yield
        finally:
            for side in (self.a, self.b):
                if side.has():
                    side.kvmhv("vm", "stop", "web01", "--force")
                    side.kvmhv("vm", "remove", "web01")

    def files(self, kind: str) -> list[str]:
        """What lies on a share."""
        root = self.server.path(kind)
        return sorted(str(path.relative_to(root)) for path in root.rglob("*"))


@pytest.fixture(scope="module")
def site(_lab_ground: None, images: GuestImages) -> Iterator[Site]:
    made = Lab.up(lab_name("storage"), storage=True, progress=print)
    try:
        yield Site(made, images)
    finally:
        made.down()
    assert made.leftovers() == []


def move(source: Side, target: Side, *options: str) -> Any:
    answer = source.run("vm", "move", "web01", "--to", target.name, *options)
    assert answer.status == 0, answer
    assert answer.json["outcome"] == "done"
    return answer.json


class Writer:
    """A guest that writes all the time, and the client that keeps what it was told is written."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.client = site.lab.host("client")
        self.watch = Watch(self.client, GUEST_IP)
        self.watch.wait("listening")

    def acknowledged(self) -> int:
        return int(self.watch.snapshot()["total"]["acks"]["received"])

    def goes_on(self) -> None:
        """Wait until more is acknowledged."""
        before = self.acknowledged()
        until("the guest writes on", lambda: self.acknowledged() > before + 3)

    def look_up(self, kind: str, disk_format: str) -> Any:
        """Let the oracle look every acknowledged write up in the server's own copy; nothing runs any more."""
        host = self.site.a
        self.site.give(host, self.client.path(self.watch.acks), "/var/lib/kvmhv/acks")
        self.site.give(host, self.site.copy_of_the_server(kind, disk_format), "/var/lib/kvmhv/server.img")
        files = ["--acks", "/var/lib/kvmhv/acks", "--image", "/var/lib/kvmhv/server.img", "--format", disk_format]
        return json.loads(host.host.exec([*PYTHON, "-m", "kvmhv.lab.oracle", *files], check=False).stdout)

    def end(self) -> None:
        self.watch.end()
        self.client.exec(["rm", "-rf", "/var/lib/kvmhv/watch"])


@contextmanager
def writing(site: Site, kind: str, disk_format: str, size: str = "48M") -> Iterator[Writer]:
    """A guest at work on a server's disk; at the end every acknowledged write is looked up."""
    writer = Writer(site)
    if kind == "iscsi":
        site.wipe_lun()
    try:
        with site.vm(site.disk(kind, disk_format, size), image="writes"):
            until("the guest writes", lambda: writer.acknowledged() > 5)
            yield writer
            for side in (site.a, site.b):
                if side.has():
                    side.kvmhv("vm", "stop", "web01", "--force")
            found = writer.look_up(kind, disk_format)
        assert found["ok"], found["problems"]
        assert found["acked"] > 10
    finally:
        writer.end()


@pytest.mark.parametrize("disk_format", ["qcow2", "raw"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_writing_guest_moves_there_and_back_and_its_disk_stays(site: Site, kind: str, disk_format: str) -> None:
    with writing(site, kind, disk_format) as writer:
        for source, target in ((site.a, site.b), (site.b, site.a)):
            report = move(source, target)
            assert (report["mode"], report["disk_bytes"]) == ("shared-storage", 0)
            assert [phase["phase"] for phase in report["phases"]] == ["setup", "memory", "state", "cleanup"]
            writer.goes_on()
            assert not source.has()
    assert site.files("smb") == []
    assert site.files("nfs") == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_server_that_dies_for_seconds_in_the_memory_phase_loses_nothing(site: Site, kind: str) -> None:
    with writing(site, kind, "raw") as writer:
        begun = site.a.kvmhv("vm", "move", "web01", "--to", "host2", "--no-wait", "--bandwidth", "6M")["id"]
        site.a.reaches(begun, "memory", lambda report: report["memory_bytes"] > 1 << 20)
        site.server.kill_server(kind)
        time.sleep(5)
        site.server.start_server(kind)
        ended = until("the move ends", lambda: _ended(site.a, begun), MOVE_S)
        where = site.b if ended["outcome"] == "done" else site.a
        assert where.show()["state"] == "running", ended
        writer.goes_on()


def test_a_server_that_freezes_is_told_of_and_the_agent_answers_on(site: Site) -> None:
    """Its connections stay up, so that nothing but the guest's own requests shows it; no look may hang the agent.

    On SMB, where disks are files of a mount: what looks at them hangs.
    """
    kind = "smb"
    with writing(site, kind, "raw") as writer:
        site.server.freeze_server(kind)
        try:
            stalled = until("it is told", lambda: site.a.show()["io_stalled"])
            refused = site.a.run("vm", "move", "web01", "--to", "host2")
            assert (refused.status, refused.json["error"]["code"]) == (1, "location-silent"), refused
            assert site.a.show()["state"] == "running"
        finally:
            site.server.thaw_server(kind)
        assert [(stall["disk"], stall["place"].partition("/")[0]) for stall in stalled] == [("disk0", kind)]
        until("it goes on", lambda: not site.a.show()["io_stalled"])
        writer.goes_on()
        told = [event["kind"] for event in site.a.kvmhv("events") if event["kind"].startswith("io-")]
        assert told[-2:] == ["io-stalled", "io-goes-on"]
        move(site.a, site.b)
        writer.goes_on()


def _ended(side: Side, move_id: str) -> Any:
    report = side.report(move_id)
    return report if report["outcome"] != "running" else None


def test_two_servers_under_one_name_are_a_finding(site: Site) -> None:
    site.add(site.a, "odd", "smb", "vms")
    site.add(site.b, "odd", "smb", "other")
    try:
        with site.vm("size=16M,location=odd"):
            for command in (("vm", "check"), ("vm", "move")):
                answer = site.a.run(*command, "web01", "--to", "host2")
                findings = answer.json["error"]["findings"] if "error" in answer.json else answer.json["findings"]
                assert (answer.status, codes_of(findings)) == (3, {"storage-differs"})
            assert site.a.show()["state"] == "running"
            move(site.a, site.b, "--include-storage", "--storage", "nfs")
        assert site.files("smb") == []
    finally:
        for side in (site.a, site.b):
            side.kvmhv("storage", "remove", "odd")


def test_a_vm_with_disks_on_both_kinds_of_places(site: Site) -> None:
    with site.vm("size=16M,location=smb", "size=16M", site.disk("iscsi", "raw")):
        refused = site.a.run("vm", "move", "web01", "--to", "host2")
        assert (refused.status, codes_of(refused.json["error"]["findings"])) == (3, {"disk-local"})
        report = move(site.a, site.b, "--include-storage")
        assert report["mode"] == "shared-nothing"
        places = [disk["layers"][0]["location"] for disk in site.b.show()["vm"]["disks"]]
        assert places == ["smb", "default", "iscsi"]


def test_a_disk_changes_its_location_while_the_vm_moves(site: Site) -> None:
    with writing(site, "smb", "raw") as writer:
        move(site.a, site.b, "--include-storage", "--storage", "nfs")
        assert site.files("smb") == []
        writer.goes_on()
        move(site.b, site.a, "--include-storage", "--storage", "smb")
        assert site.files("nfs") == []
        writer.goes_on()


@pytest.mark.parametrize("disk_format", ["raw", "qcow2"])
def test_a_disk_goes_round_all_kinds_of_places_under_a_writing_guest(site: Site, disk_format: str) -> None:
    with writing(site, "nfs", disk_format, "16M") as writer:
        for place in ("smb", "default", "iscsi", "default", "nfs"):
            lun = ("--lun", str(DISK_LUNS[0])) if place == "iscsi" else ()
            done = site.a.run("vm", "move-storage", "web01", "--to", place, *lun)
            assert (done.status, done.json["outcome"], done.json["warnings"]) == (0, "done", []), done
            writer.goes_on()
            (disk,) = site.a.show()["vm"]["disks"]
            assert (disk["layers"][0]["location"], disk["size_bytes"]) == (place, 16 << 20)
            files = {kind: [f"web01/disk0.{disk_format}", f"web01/disk0.{disk_format}.owner"] for kind in (place,)}
            assert [name for name in site.files("smb") if name != "web01"] == files.get("smb", [])
            assert [name for name in site.files("nfs") if name != "web01"] == files.get("nfs", [])
        move(site.a, site.b)
        writer.goes_on()


@pytest.mark.parametrize("kind", KINDS)
def test_a_vm_on_shared_storage_runs_once(site: Site, kind: str) -> None:
    with site.vm(site.disk(kind, "raw")):
        assert (site.owner(kind)["host"], site.owner(kind)["epoch"]) == ("host1", 0)
        report = move(site.a, site.b)
        until("host2 owns it", lambda: "moving_to" not in site.owner(kind))
        assert (site.owner(kind)["host"], site.owner(kind)["epoch"]) == ("host2", 1)
        # The same VM on host1, as an operator would put it back by hand from a saved record.
        site.b.host.kill()
        try:
            _put_back(site, report)
            refused = site.a.run("vm", "start", "web01")
            assert (refused.status, refused.json["error"]["code"]) == (4, "vm-owned-elsewhere"), refused
            assert "host2" in refused.json["error"]["message"]
            site.a.kvmhv("vm", "start", "web01", "--take-over")
        finally:
            site.b.host.boot()
        stale = site.b.run("vm", "start", "web01")
        assert (stale.status, stale.json["error"]["code"]) == (4, "vm-owned-elsewhere")
        kept = site.b.run("vm", "remove", "web01")
        assert (kept.status, kept.json["error"]["code"]) == (4, "vm-owned-elsewhere"), kept
        site.b.kvmhv("vm", "remove", "web01", "--keep-disks")
        assert site.owner(kind)["host"] == "host1"
        assert site.copy_of_the_server(kind, "raw").exists()
        assert site.a.show()["state"] == "running"


def test_of_two_hosts_that_take_one_lun_at_once_one_has_it(site: Site) -> None:
    words = ["kvmhv", "vm", "create", "web01", "--memory", "96M", "--json"]
    for _ in range(3):
        disk = ["--disk", site.disk("iscsi", "qcow2", "16M")]
        taking = [
            subprocess.Popen(side.host.argv([*words, *disk]), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
            for side in (site.a, site.b)
        ]
        said = [json.loads(one.communicate(timeout=120)[0]) for one in taking]
        (winner,) = (side for side, answer in zip((site.a, site.b), said, strict=True) if "error" not in answer)
        (loser,) = (answer for answer in said if "error" in answer)
        assert loser["error"]["code"] in ("disk-owned", "disk-in-use"), loser
        owner = site.owner("iscsi")
        assert (owner["host"], owner["vm_id"], owner["held"]) == (winner.name, winner.show()["vm"]["id"], False)
        winner.kvmhv("vm", "remove", "web01")


def _put_back(site: Site, report: dict[str, Any]) -> None:
    """Copy the VM's record and kernel from host2's disk to host1's, as from a backup."""
    files = {side.name: side.host.lab.host(side.name) for side in (site.a, site.b)}
    data = [Path(f"/var/lib/kvmhv-lab/{site.lab.name}/{name}/data") for name in files]
    vm_id = report["vm_id"] if "vm_id" in report else _vm_id(data[1])
    shutil.copytree(data[1] / "vms" / vm_id, data[0] / "vms" / vm_id)
    script = (
        "import sqlite3,sys; a=sqlite3.connect(sys.argv[1]); b=sqlite3.connect(sys.argv[2]);"
        "rows=b.execute(\"SELECT * FROM records WHERE kind='vm'\").fetchall();"
        "[a.execute('INSERT OR REPLACE INTO records VALUES (' + ','.join('?'*len(row)) + ')', row) for row in rows];"
        "a.commit()"
    )
    site.a.host.agent_stop()
    files_ = [str(directory / "kvmhv.sqlite") for directory in data]
    subprocess.run([sys.executable, "-c", script, *files_], check=True)
    site.a.host.agent_start()


def _vm_id(data: Path) -> str:
    (found,) = (data / "vms").iterdir()
    return found.name


@pytest.mark.parametrize(
    ("kind", "share", "password", "code"),
    [
        ("smb", "vms", "not the password", "location-unreachable"),
        ("smb", "nosuch", None, "location-unreachable"),
        ("smb", "readonly", None, "location-read-only"),
        ("nfs", "/nosuch", None, "location-unreachable"),
        ("nfs", "/var/lib/kvmhv/nfs-readonly", None, "location-read-only"),
        ("iscsi", None, "not the password", "location-unreachable"),
        ("iscsi", "iqn.2024-01.test.kvmhv:nosuch", None, "location-unreachable"),
    ],
)
def test_a_location_that_does_not_work_is_not_kept(
    site: Site, kind: str, share: str | None, password: str | None, code: str
) -> None:
    words = site.command(site.a, "bad", kind, share)
    if password is not None:
        site.a.file("/run/storage.secret").write_text(password)
    answer = site.a.run(*words)
    assert (answer.status, answer.json["error"]["code"]) == (1, code), answer
    assert "bad" not in {row["spec"]["name"] for row in site.a.kvmhv("storage", "list")}
    assert site.a.sh("ls /run/kvmhv/storage /var/lib/kvmhv/storage").find("bad") < 0


def test_a_share_that_is_full_takes_no_disk_and_keeps_no_half_of_one(site: Site) -> None:
    site.add(site.a, "full", "smb", "full")
    try:
        answer = site.a.run("vm", "create", "web01", "--memory", "96M", "--disk", "size=16M,location=full")
        assert (answer.status, answer.json["error"]["code"]) == (1, "location-full"), answer
        assert list(site.lab.host("storage").path("/dev/kvmhv-full").iterdir()) == []
    finally:
        site.a.kvmhv("storage", "remove", "full")


def test_a_location_in_use_is_not_removed(site: Site) -> None:
    with site.vm("size=16M,location=smb"):
        refused = site.a.run("storage", "remove", "smb")
        assert (refused.status, refused.json["error"]["code"]) == (4, "location-in-use")


def test_the_password_is_nowhere(site: Site) -> None:
    """Not in a command line, a log, an answer or the database; in files that only root reads."""
    with site.vm(site.disk("iscsi", "raw"), "size=16M,location=smb"):
        move(site.a, site.b)
        for side in (site.a, site.b):
            side.file("/run/storage.secret").unlink(missing_ok=True)
            secret = site.server.secret
            found = side.sh(
                f"grep -rlaF '{secret}' /proc/[0-9]*/cmdline /proc/[0-9]*/environ /run/kvmhv /var/log /var/lib/kvmhv "
                "2>/dev/null | grep -v '/storage/.*\\.\\(secret\\|credentials\\)$' | grep -v /proc/self || true"
            )
            # The searching shell and grep have it in their own command lines.
            assert [line for line in found.splitlines() if not _is_gone(side, line)] == []
            answers = all_answers(side, "smb")
            assert len(answers) > 15
            assert [path for path, text in answers.items() if secret in text] == []
            modes = side.sh("stat -c '%a %U' /var/lib/kvmhv/storage/*")
            assert set(modes.split("\n")[:-1]) == {"600 root"}


def all_answers(side: Side, location: str) -> dict[str, str]:
    """Return what the agent answers to every GET that ends, by its path."""
    names = {"{id}": side.kvmhv("move", "list")[0]["id"], "{name}": "web01", "{host}": side.name}
    answers = {}
    for path, verbs in json.loads(get(side, "/openapi.json"))["paths"].items():
        if "get" not in verbs or path.endswith(("/events", "/stream", "/live", "/console")):
            continue
        asked = path.replace("/storage/{name}", f"/storage/{location}")
        for word, name in names.items():
            asked = asked.replace(word, name)
        answers[asked] = get(side, asked)
    assert not any("{" in path for path in answers), answers.keys()
    return answers


def _is_gone(side: Side, line: str) -> bool:
    return line.startswith("/proc/") and not side.file(line).exists()
