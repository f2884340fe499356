"""Trusted hosts that mean harm, while a VM is on its way: what they forge, replay, say out of order or at the wrong
place is refused or without effect; the VM is where it was, the move is as it was, the agents are well."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvmhv.config import PORT
from kvmhv.lab.demo import PYTHON
from tests.real.moving import MIB, Pair, Side, until

pytestmark = pytest.mark.real

PROGRAM = "/opt/hostile_peer.py"
DIRECTORY = "/root/hostile"
FRESH = "0c2b4b1e-0000-4000-8000-000000000001"
ERROR = {"code": "resolved", "message": "give it up", "todo": "", "host": "host2"}
COPY = f"""
import pathlib, shutil, sqlite3
here, there = pathlib.Path("/var/lib/kvmhv"), pathlib.Path("{DIRECTORY}")
shutil.copytree(here / "identity", there / "identity")
sqlite3.connect(here / "kvmhv.sqlite").backup(sqlite3.connect(there / "kvmhv.sqlite"))
"""


class Stranger:
    """Somebody who has a trusted host's certificate; `name` is whose, `on` the host from where he speaks."""

    def __init__(self, pair: Pair, name: str, on: str) -> None:
        self.name = name
        self._host = pair.lab.host(on)
        self._address = f"{self._host.plan.addresses['management']}:{PORT}"
        program = Path(__file__).with_name("hostile_peer.py").read_text()
        self._host.exec(["sh", "-c", f"mkdir -p {DIRECTORY} && cat > {PROGRAM}"], text=program)

    def take(self) -> None:
        """Take the identity of the host from where he speaks."""
        self._host.exec(["python3", "-c", COPY])

    def do(self, **wishes: Any) -> dict[str, Any]:
        """Return what came back."""
        text = json.dumps({"address": self._address, **wishes})
        command = [*PYTHON, PROGRAM, self.name, DIRECTORY]
        said = self._host.exec(command, timeout_s=120, text=text).stdout
        done: dict[str, Any] = json.loads(said.splitlines()[-1])  # before it: the log
        return done

    def leave(self) -> None:
        """Take everything away."""
        self._host.exec(["rm", "-rf", DIRECTORY, PROGRAM])


@pytest.fixture
def mallory(pair: Pair) -> Iterator[Stranger]:
    """A third host, which both hosts trust."""
    stranger = Stranger(pair, "mallory", "client")
    codes = [side.kvmhv("host", "trust", "invite")["code"] for side in pair.sides]
    stranger.do(join=codes)
    yield stranger
    for side in pair.sides:
        side.kvmhv("host", "trust", "remove", "mallory")
    stranger.leave()


@pytest.fixture
def doubles(pair: Pair) -> Iterator[tuple[Stranger, Stranger]]:
    """Somebody who has the key of host1, and somebody who has that of host2."""
    found = Stranger(pair, "host1", "host1"), Stranger(pair, "host2", "host2")
    for double in found:
        double.take()
    yield found
    for double in found:
        double.leave()


def hello(move: str, host: str, role: str = "source", **more: object) -> str:
    first = {"frame": "Hello", "versions": [1, 1], "move_id": move, "host": host, "role": role, "epoch": 1}
    return json.dumps(first | more)


def say(kind: str, move: str, **fields: object) -> str:
    return json.dumps({"frame": "Say", "message": {"type": kind, **fields}, "move_id": move})


@pytest.fixture
def move(pair: Pair) -> Iterator[str]:
    """web01 runs at host1 and moves to host2, so slowly that nothing comes of it meanwhile."""
    pair.boot_fast(16 * MIB, "--disk", "size=4M")
    found = pair.a.begin(pair.b, "--bandwidth", "64K")
    pair.a.reaches(found, "memory", lambda report: report["remaining_bytes"] > 0)
    yield found
    pair.a.run("move", "cancel", found)  # where a test has not come to it


def processes_of(pair: Pair) -> list[Any]:
    return [(side.host.agent_status().pid, side.pids()) for side in pair.sides]


def said(side: Side, text: str) -> int:
    return side.host.agent_log.read_text(errors="replace").count(text)


def meddle(pair: Pair, mallory: Stranger, move: str) -> None:
    """Speak in the move of others, in their name and in his own."""
    noted = [said(side, "protocol-order") for side in pair.sides]
    to_target: list[list[str | int]] = [
        [hello(move, "host1")],
        [hello(move, "host1"), say("Grant", move, epoch=1)],
        [hello(move, "mallory"), say("Grant", move, epoch=1)],
        [hello("../../../etc/passwd", "mallory")],
        [say("Abort", move, epoch=1, error=ERROR)],
        [hello(FRESH, "mallory"), hello(FRESH, "mallory")],
        [hello(FRESH, "mallory"), say("Abort", move, epoch=1, error=ERROR)],
        [hello(FRESH, "mallory"), say("Running", FRESH, epoch=1, resumed_ms=1.0)],
        [hello(FRESH, "mallory", "operator")],
        [hello(FRESH, "mallory", versions=[7, 9])],
        [hello(FRESH, "mallory"), 5 * MIB],
        [hello(FRESH, "mallory"), "[" * 100_000],
        [hello(FRESH, "mallory"), json.dumps({"frame": "Pong", "sent_ms": 9e15, "clock_ms": 0.0})],
    ]
    to_source: list[list[str | int]] = [
        [hello(move, "host2", "target"), say("Refused", move, epoch=1, error=ERROR)],
        *(
            [hello(move, "mallory", "target"), say(kind, move, epoch=1, **more)]
            for kind, more in (("Refused", {"error": ERROR}), ("Owned", {}), ("Running", {"resumed_ms": 1.0}))
        ),
    ]
    talks = [{"to": "host2", "frames": frames} for frames in to_target]
    talks += [{"to": "host1", "frames": frames} for frames in to_source]
    uploads = [{"to": "host2", "move": move, "name": name} for name in ("kernel", "..%2F..%2Fkernel")]
    done = mallory.do(talks=talks, uploads=uploads)
    for wish, answer in zip(talks, done["talks"], strict=True):
        assert answer == {"heard": [], "ended": True}, (wish, answer)
    assert done["uploads"][0] == "file-not-wanted" and done["uploads"][1], done["uploads"]
    frames = [hello(FRESH, "mallory"), say("Grant", FRESH, epoch=1)]
    (never,) = mallory.do(talks=[{"to": "host2", "frames": frames, "awaits": "Unknown"}])["talks"]
    assert [message["type"] for message in never["heard"]] == ["Unknown"], never
    for side, before in zip(pair.sides, noted, strict=True):
        until(f"{side.name} has noted it", lambda s=side, b=before: said(s, "protocol-order") > b)


def offer(pair: Pair, mallory: Stranger) -> None:
    """Offer VMs that name what is not the source's to name."""
    plan = pair.a.run("vm", "check", "web01", "--to", "host2", "--include-storage").json["plan"]
    there = pair.b.left()
    vm = plan["target_vm"]
    pair.b.sh("head -c 1M /dev/zero > /var/lib/kvmhv/disks/precious.raw")

    def named(path: str) -> list[Any]:
        """The VM's disks under other names: PATH, PATH1, ..."""
        return [
            {**disk, "layers": [{**disk["layers"][0], "path": f"{path}{number or ''}"}]}
            for number, disk in enumerate(vm["disks"])
        ]

    new = {**vm, "id": "evil", "name": "evil", "disks": named("evil/disk0.qcow2")}
    outside = named("../../../../etc/cron.d/evil")
    copies = [{**plan["disk_copies"][0], "target_layers": outside[0]["layers"]}, *plan["disk_copies"][1:]]
    forged = (
        ("vm-in-move", {**plan, "target_vm": {**new, "name": vm["name"]}}),
        ("id-taken", {**plan, "target_vm": {**new, "id": vm["id"]}}),
        ("address-not-allowed", {**plan, "target_vm": new, "target_address": "0.0.0.0"}),
        ("path-invalid", {**plan, "target_vm": {**new, "disks": outside}, "disk_copies": copies}),
        ("disk-in-use", {**plan, "target_vm": {**new, "disks": vm["disks"]}}),  # web01's, which is on its way
        ("disk-in-use", {**plan, "target_vm": {**new, "disks": vm["disks"]}, "disk_copies": []}),
        ("not-shared", {**plan, "target_vm": {**new, "disks": named("precious.raw")}, "disk_copies": []}),
        ("not-shared", {**plan, "target_vm": new, "disk_copies": []}),
    )
    talks = []
    for number, offered in enumerate(one for _, one in forged):
        fresh = f"{FRESH[:-1]}{number}"
        offered_frame = say("Offer", fresh, epoch=vm["epoch"], plan=offered, psk_hex="00" * 32)
        talks.append({"to": "host2", "frames": [hello(fresh, "mallory"), offered_frame], "awaits": "Refused"})
    for (code, _), answer in zip(forged, mallory.do(talks=talks)["talks"], strict=True):
        assert [message["error"]["code"] for message in answer["heard"]] == [code], (code, answer)
    pair.b.sh("test ! -e /etc/cron.d/evil")
    pair.b.sh("rm /var/lib/kvmhv/disks/precious.raw")
    pair.b.is_again(there)


def speak_out_of_place(source: Stranger, target: Stranger, move: str) -> None:
    """Whoever has a host's key can speak in its name; what does not fit the move changes nothing even then."""
    words = ("Grant", {}), ("MirrorsEnded", {"held": True}), ("Abort", {"error": ERROR})
    other_epoch = [say(kind, move, epoch=7, **more) for kind, more in words]
    talks = [
        {"to": "host2", "frames": [hello(move, "host1"), *other_epoch, say("FilesSent", move)]},
        {"to": "host2", "frames": [hello(move, "host1"), say("Owned", move, epoch=1)]},
        {"to": "host2", "frames": [hello(move, "host1", "target")]},
    ]
    heard = source.do(talks=talks)["talks"]
    assert [answer["ended"] for answer in heard] == [False, True, False], heard
    words = (
        ("Running", {"resumed_ms": 1.0}),
        ("Owned", {}),
        ("Ready", {"address": {"memory_port": 1, "disk_port": None}}),
    )
    too_early = [say(kind, move, epoch=1, **more) for kind, more in words]
    refused = [say(kind, move, epoch=7, error=ERROR) for kind in ("Refused", "Unknown")]
    talks = [{"to": "host1", "frames": [hello(move, "host2", "target"), *too_early, *refused]}]
    heard = target.do(talks=talks)["talks"]
    assert [answer["ended"] for answer in heard] == [False], heard


def test_what_others_say_changes_nothing(
    pair: Pair, mallory: Stranger, doubles: tuple[Stranger, Stranger], move: str
) -> None:
    before = processes_of(pair)
    meddle(pair, mallory, move)
    offer(pair, mallory)
    speak_out_of_place(*doubles, move)
    for side in pair.sides:
        report = side.report(move)
        assert (report["outcome"], report["phase"]) == ("running", "memory"), report
    assert processes_of(pair) == before
    assert pair.a.kvmhv("move", "cancel", move)["outcome"] == "cancelled"
    pair.works(pair.a)
    pair.moved(pair.a, pair.b)
    pair.works(pair.b)
