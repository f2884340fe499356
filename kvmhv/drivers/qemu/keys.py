"""The key of one move as QEMU wants it: a directory for `tls-creds-psk`, readable by root only, in run_dir (tmpfs)."""

import os

from kvmhv.drivers.qemu.qmp import Qmp, QmpRefused
from kvmhv.drivers.qemu.rundir import VmDir
from kvmhv.errors import HostError

TLS_OBJECT = "tls0"
PSK_USER = "kvmhv"

FFDHE2048 = """\
-----BEGIN DH PARAMETERS-----
MIIBCAKCAQEA//////////+t+FRYortKmq/cViAnPTzx2LnFg84tNpWp4TZBFGQz
+8yTnc4kmz75fS/jY2MMddj2gbICrsRhetPfHtXV/WVhJDP1H18GbtCFY2VVPe0a
87VXE15/V8k1mE8McODmi3fipona8+/och3xWKE2rec1MKzKT0g6eXq8CrGCsyT7
YdEIqUuyyOP7uWrat2DX9GgdT0Kj3jlN9K5W7edjcrsZCwenyO4KbXCeAvzhzffi
7MA0BM0oNC9hkXL+nOmFg/+OTxIy7vKBg8P+OxtMb61zO7X8vC7CIAXFjvGDfRaD
ssbzSibBsu/6iGtCOGEoXJf//////////wIBAg==
-----END DH PARAMETERS-----
"""
"""The group ffdhe2048 of RFC 7919, A.1. Without a file QEMU 7.2 makes a group of its own while QMP stands still."""


async def add(qmp: Qmp, directory: VmDir, endpoint: str, psk_hex: str) -> None:
    """Give QEMU the key as object TLS_OBJECT, for `server` or `client`; an older key is replaced.

    A client has read the key when this returns, so its file is removed; a server reads it at each handshake.
    """
    _write(directory, endpoint, psk_hex)
    await remove_object(qmp)
    arguments = {
        "qom-type": "tls-creds-psk",
        "id": TLS_OBJECT,
        "dir": str(directory.keys),
        "endpoint": endpoint,
    }
    if endpoint == "client":
        arguments["username"] = PSK_USER
    await qmp.execute("object-add", arguments)
    if endpoint == "client":
        directory.remove_keys()


async def remove_object(qmp: Qmp) -> None:
    """Take the key from QEMU; no error if it has none."""
    try:
        await qmp.execute("object-del", {"id": TLS_OBJECT})
    except QmpRefused as error:
        if "not found" not in error.description:
            raise


def _write(directory: VmDir, endpoint: str, psk_hex: str) -> None:
    try:
        directory.remove_keys()
        directory.keys.mkdir(mode=0o700)
        file = os.open(directory.keys / "keys.psk", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(file, "w") as keys:
            keys.write(f"{PSK_USER}:{psk_hex}\n")
        if endpoint == "server":
            (directory.keys / "dh-params.pem").write_text(FFDHE2048)
    except OSError as error:
        raise HostError("run-dir", f"cannot write the move's key: {error}", "check the agent's run_dir") from error
