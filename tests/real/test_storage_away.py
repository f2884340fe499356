"""The servers of SMB, NFS and iSCSI go away in each phase of a move: killed, frozen, cut off. Writes wait, nothing that
was acknowledged is lost, and each move ends: done, or failed with the VM at its source."""

import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from time import sleep

import pytest

from kvmhv.lab import oracle
from kvmhv.lab.guest_images import GuestImages, write_boot_guest
from kvmhv.lab.lab import Lab
from kvmhv.lab.storage_host import DISK_LUNS, StorageHost
from tests.real.conftest import lab_name
from tests.real.moving import MIB, until
from tests.real.rehearsal import held_agents
from tests.real.stage import Player, Stage

pytestmark = [pytest.mark.real, pytest.mark.timeout(420, func_only=True)]

KINDS = ("smb", "nfs", "iscsi")
AWAY_S = 4.0
MORE = 3
PLACES = {
    "setup": "target.before-Prepare",
    "storage": "source.fact-MirrorsReady",
    "memory": "source.fact-PassStarted",
    "stopped": "source.before-ContinueSwitchover",
    "cleanup": "source.before-EndCopy",
}
"""Where all moves stand when the servers go away. `stopped`: the guest stands still, nothing is granted."""
ENDS = {"done", "failed"}


@dataclass
class Traveller(Player):
    """A VM that boots from a disk of its host and writes to two on a server: they stay, the other one is copied."""

    @property
    def hold(self) -> str:
        """The place at which it is held."""
        return f"{PLACES[self.phase]}.{self.name}"


class Away(Stage):
    """A VM for each kind of server. `a` is where all of them are."""

    def __init__(self, lab: Lab, images: GuestImages) -> None:
        super().__init__(lab, images, ())
        self.server = StorageHost(lab)
        self.players = [Traveller("setup", kind) for kind in KINDS]

    def enter(self) -> None:
        """Add the locations on both hosts; make and start the VMs."""
        for side in self.sides:
            file = side.file("/run/storage.secret")
            file.touch(mode=0o600)
            file.write_text(self.server.secret)
            for kind in KINDS:
                words = self.server.add_command(kind, kind)
                side.kvmhv(*("/run/storage.secret" if word.endswith("storage.secret") else word for word in words))
        self.a.sh("mkdir -p /srv")
        for number, player in enumerate(self.players):
            boot = self.a.file(f"/srv/{player.name}.raw")
            boot.touch()
            write_boot_guest(
                boot,
                self._images.boot_template,
                working_set_bytes=2 * MIB,
                rate_bytes_per_s=6 * MIB,
                guest_id=number + 1,
                write_ms=60,
            )
            disks: list[dict[str, object]] = [{"file": f"/srv/{player.name}.raw", "format": "raw"}]
            for disk_format, lun in zip(("raw", "qcow2"), DISK_LUNS, strict=False):
                disk: dict[str, object] = {"size_bytes": 2 * MIB, "location": player.name, "format": disk_format}
                if player.name == "iscsi":
                    disk["lun"] = lun
                    if disk_format == "raw":
                        del disk["size_bytes"]
                disks.append(disk)
            spec = {"name": player.name, "memory_bytes": 32 * MIB, "disks": disks}
            player.id = self.call(self.a, "POST", "vms", spec)["vm"]["id"]
            self.call(self.a, "POST", f"vms/{player.name}/start")
        for player in self.players:
            self.writes_on(player)

    def writes_on(self, player: Player) -> None:
        """Wait until it has put more on both disks."""
        for disk in ("vdb", "vdc"):
            before = len(self.witness.acks(player.id, disk))
            until(
                f"{player.name} writes to {disk}",
                lambda p=player, d=disk, b=before: len(self.witness.acks(p.id, d)) > b + MORE,
            )

    def ended(self, player: Player) -> str:
        """Return how its move ended, empty while the hosts are not agreed or it goes on."""
        seen = set(self.outcomes(player))
        return seen.pop() if len(seen) == 1 and seen <= ENDS else ""

    def verify(self, player: Player, directory: Path) -> None:
        """Stop the VM and look up all that it had acknowledged in the server's own copy."""
        self.call(self.a, "POST", f"vms/{player.name}/stop", {"force": True})
        for disk, name, disk_format, lun in (("vdb", "disk1", "raw", 0), ("vdc", "disk2", "qcow2", 1)):
            own = f"{player.name}/{player.name}/{name}.{disk_format}"
            if player.name == "iscsi":
                own = f"iscsi/disk{DISK_LUNS[lun]}.img"
            copy = directory / name
            subprocess.run(["cp", "--sparse=always", self.server.path(own), copy], check=True)
            found = oracle.verify_image(self.witness.acks(player.id, disk), copy, disk_format)
            assert found.ok and found.acked > MORE, (player.name, disk, found)


def go_away(stage: Away, how: str) -> Callable[[], None]:
    """Let all servers go away; returns what brings them back."""
    server, storage = stage.server, stage.server.host
    if how == "cut off":
        storage.cut("management")
        return lambda: storage.mend("management")
    away, back = {
        "killed": (server.kill_server, server.start_server),
        "frozen": (server.freeze_server, server.thaw_server),
    }[how]
    for kind in KINDS:
        away(kind)

    def return_() -> None:
        for kind in KINDS:
            back(kind)

    return return_


@pytest.fixture(scope="module")
def away(_lab_ground: None, images: GuestImages, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Away]:
    made = Lab.up(lab_name("away"), storage=True, progress=print)
    try:
        with held_agents(made):
            stage = Away(made, images)
            try:
                stage.enter()
                yield stage
                for player in stage.players:
                    stage.verify(player, tmp_path_factory.mktemp(player.name))
            finally:
                stage.leave()
                stage.witness.close()
    finally:
        made.down()
    assert made.leftovers() == []


@pytest.mark.parametrize(
    ("phase", "how"),
    [
        ("setup", "killed"),
        ("storage", "frozen"),
        ("memory", "cut off"),
        ("memory", "killed"),
        ("stopped", "frozen"),
        ("cleanup", "killed"),
    ],
)
def test_servers_that_go_away_lose_nothing_and_each_move_ends(away: Away, phase: str, how: str) -> None:
    for player in away.players:
        player.phase = phase
    away.set_out()
    come_back = go_away(away, how)
    try:
        away.release()
        sleep(AWAY_S)
    finally:
        come_back()
    for player in away.players:
        outcome = until(f"{player.name}'s move ends", lambda p=player: away.ended(p))
        home = away.b if outcome == "done" else away.a
        assert away.state(home, player) == "running"
        assert away.copies(player) == [home.name]
        away.writes_on(player)
        away.witness.check(player.id, 1)
        if outcome == "failed":  # to where the others are
            away.begin(player, away.a, away.b, slow=False)
            until(f"{player.name} has moved", lambda p=player: away.ended(p) == "done")
    away.a, away.b = away.b, away.a
