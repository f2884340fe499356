"""Where a layer's image lies, as QEMU opens it: a file, or what one of QEMU's own network drivers reaches."""

from pathlib import Path

from kvmhv.model import Struct


class NfsImage(Struct, frozen=True, kw_only=True):
    """A file of an NFS export, opened by QEMU's own driver (NFSv3)."""

    server: str
    path: str
    """From the server's root: the export's path and the file's."""
    user: int
    group: int

    def options(self) -> dict[str, object]:
        """Return the driver's options of QEMU's `-blockdev`."""
        server = {"type": "inet", "host": self.server}
        return {"driver": "nfs", "server": server, "path": self.path, "user": self.user, "group": self.group}


class Lun(Struct, frozen=True, kw_only=True):
    """A LUN, opened by QEMU's own iSCSI driver."""

    portal: str
    target: str
    lun: int
    initiator: str
    user: str = ""
    secret_file: str = ""
    """CHAP: holds the secret and nothing else."""

    def options(self, secret_id: str) -> dict[str, object]:
        """Return the driver's options of QEMU's `-blockdev`; `secret_id`: the object that has read the secret."""
        options: dict[str, object] = {
            "driver": "iscsi",
            "transport": "tcp",
            "portal": self.portal,
            "target": self.target,
            "lun": self.lun,
            "initiator-name": self.initiator,
        }
        if self.user:
            options |= {"user": self.user, "password-secret": secret_id}
        return options

    def secret_object(self, secret_id: str) -> str | None:
        """Return the value of QEMU's `-object` that reads the secret from its file, None without CHAP."""
        escaped = self.secret_file.replace(",", ",,")
        return f"secret,id={secret_id},format=raw,file={escaped}" if self.user else None


DiskPlace = Path | NfsImage | Lun
"""A layer's place as QEMU opens it: a file, or what one of QEMU's network drivers reaches."""
