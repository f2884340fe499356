"""The lab's fourth host, `storage`: real servers of SMB (smbd), NFS (nfs-ganesha) and iSCSI (tgt).

Their configuration stands in servers/*.conf; `@NAME@` in it is filled in here. Each server can be killed and started
again on its own, as a broken one would be. Shares and LUNs lie on the machine's own file system, under DATA.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from kvmhv.errors import HostError
from kvmhv.lab.plan import STORAGE_HOST
from kvmhv.lab.state import run_dir
from kvmhv.lab.steps import Progress, silent

if TYPE_CHECKING:
    from kvmhv.lab.lab import Lab, LabHost

DATA = "/var/lib/kvmhv"
USER = "kvmhv"
SHARE = "vms"
NFS_EXPORT = f"{DATA}/nfs"
IQN = "iqn.2024-01.test.kvmhv:vms"
DISK_LUNS = (2, 3, 4, 5)
LUN_BYTES = 256 * 1024**2
RECORDS_BYTES = 4 * 1024**2
PORTS = {"smb": 445, "nfs": 2049, "iscsi": 3260}
PROCESSES = {"smb": "smbd", "nfs": "ganesha.nfsd", "iscsi": "tgtd"}
START_S = 30.0
GRACE_S = 6.0
"""nfs-ganesha refuses to create files for its grace period (ganesha.conf)."""


class StorageHost:
    """The servers of a lab that was brought up with storage."""

    def __init__(self, lab: Lab) -> None:
        self.host: LabHost = lab.host(STORAGE_HOST)
        self.address: str = self.host.plan.addresses["management"]
        self._subnet = lab.plan.network("management").subnet
        self._secret_file = run_dir(lab.name) / "storage.secret"

    @property
    def secret(self) -> str:
        """Password of the SMB user and CHAP secret: made for this lab, readable by root."""
        if not self._secret_file.exists():
            self._secret_file.touch(mode=0o600)
            self._secret_file.write_text(secrets.token_hex(7))  # CHAP wants 12 to 16 characters
        return self._secret_file.read_text()

    def start(self, progress: Progress = silent) -> None:
        """Make shares and LUNs where they are missing, and start all servers. HostError `lab-storage`."""
        self._make_data()
        for kind in PORTS:
            self.start_server(kind)
        progress(f"storage: smbd, nfs-ganesha and tgt serve on {self.address}")

    def start_server(self, kind: str) -> None:
        """Start one server (`smb`, `nfs`, `iscsi`) and wait until it serves. HostError `lab-storage`."""
        starts: dict[str, Callable[[], None]] = {"smb": self._smb, "nfs": self._nfs, "iscsi": self._iscsi}
        starts[kind]()
        self._wait(kind)

    def kill_server(self, kind: str) -> None:
        """Kill one server as a crash would; its data stays. It is gone on return."""
        self.host.exec(["pkill", "-KILL", "-x", PROCESSES[kind]], check=False)
        deadline = time.monotonic() + START_S
        while self.host.exec(["pgrep", "-x", PROCESSES[kind]], check=False).returncode == 0:
            if time.monotonic() > deadline:
                raise HostError("lab-storage", f"{PROCESSES[kind]} does not die", host=STORAGE_HOST)
            time.sleep(0.05)

    def freeze_server(self, kind: str) -> None:
        """Stop one server's processes: its connections stay up and nothing is answered any more."""
        self.host.exec(["pkill", "-STOP", f"^{PROCESSES[kind]}"])

    def thaw_server(self, kind: str) -> None:
        """Let it go on, with what it was asked meanwhile; no error if it was not frozen."""
        self.host.exec(["pkill", "-CONT", f"^{PROCESSES[kind]}"], check=False)

    def path(self, inside: str) -> Path:
        """Return the machine's path to a file below DATA: the server's own copy."""
        return self.host.path(f"{DATA}/{inside}")

    def add_command(self, name: str, kind: str, share: str | None = None) -> list[str]:
        """Return the arguments of `kvmhv` that make this server a location, with the password in a file."""
        share = share or {"smb": SHARE, "nfs": NFS_EXPORT, "iscsi": IQN}[kind]
        command = ["storage", "add", name, "--kind", kind, "--server", self.address, "--share", share]
        if kind != "nfs":
            assert self.secret, "made before the file is named"
            command += ["--user", USER, "--password-file", str(self._secret_file)]
        return command

    # ---

    def _make_data(self) -> None:
        for name in ("smb", "smb-other", "nfs", "nfs-readonly", "iscsi"):
            self.path(name).mkdir(mode=0o700, exist_ok=True)
        self.host.path("/dev/kvmhv-full").mkdir(mode=0o700, exist_ok=True)
        sizes = {"records": RECORDS_BYTES} | {f"disk{lun}": LUN_BYTES for lun in DISK_LUNS}
        for name, size_bytes in sizes.items():
            file = self.path(f"iscsi/{name}.img")
            if not file.exists():
                with file.open("wb") as image:
                    image.truncate(size_bytes)

    def _configuration(self, name: str, inside: str) -> None:
        text = (Path(__file__).parent / "servers" / name).read_text()
        values = {"@SUBNET@": self._subnet, "@NETWORK@": f"{self.address}/24", "@SECRET@": self.secret}
        for key, value in values.items():
            text = text.replace(key, value)
        file = self.host.path(inside)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch(mode=0o600)
        file.write_text(text)

    def _smb(self) -> None:
        self._configuration("smb.conf", "/etc/samba/smb.conf")
        self.host.exec(["sh", "-c", f"id {USER} >/dev/null 2>&1 || useradd --no-create-home {USER}"])
        self.host.exec(["smbpasswd", "-s", "-a", USER], text=f"{self.secret}\n{self.secret}\n")
        self.host.exec(["smbd", "--daemon"])

    def _nfs(self) -> None:
        self._configuration("ganesha.conf", "/etc/ganesha/kvmhv.conf")
        ready = (
            "mkdir -p /run/ganesha /run/rpcbind /run/dbus /var/lib/nfs/ganesha; pgrep -x rpcbind >/dev/null || rpcbind"
        )
        serve = "exec ganesha.nfsd -f /etc/ganesha/kvmhv.conf -L /var/log/ganesha.log -N NIV_EVENT -p /run/ganesha/pid"
        self.host.exec(["sh", "-c", f"{ready}; {serve}"])

    def _iscsi(self) -> None:
        self._configuration("targets.conf", "/etc/tgt/kvmhv.conf")
        serve = f"exec setsid --fork tgtd -f --iscsi portal={self.address}:3260 >/var/log/tgtd.log 2>&1"
        self.host.exec(["sh", "-c", serve])
        show = ["tgtadm", "--op", "show", "--mode", "sys"]
        self._until("iscsi", lambda: self.host.exec(show, check=False).returncode == 0)
        # tgtd forgets everything when it ends: its configuration is replayed.
        self.host.exec(["tgt-admin", "--execute", "--conf", "/etc/tgt/kvmhv.conf"])

    def _wait(self, kind: str) -> None:
        listens = ["sh", "-c", f"ss -Hltn 'sport = :{PORTS[kind]}' | grep -q ."]
        self._until(kind, lambda: self.host.exec(listens, check=False).returncode == 0)
        if kind == "nfs":
            time.sleep(GRACE_S)

    def _until(self, kind: str, ready: Callable[[], bool]) -> None:
        deadline = time.monotonic() + START_S
        while not ready():
            if time.monotonic() > deadline:
                text = f"{PROCESSES[kind]} does not serve"
                raise HostError("lab-storage", text, "see /var/log there", host=STORAGE_HOST)
            time.sleep(0.1)
