"""Runs in the guest of test_storage_kernel.py as main.py: shares mounted by kvmhv's own code with the kernel's clients.

Prints one line of JSON for each thing that it has seen. The test judges; here nothing is asserted.
"""

import asyncio
import errno
import fcntl
import json
import mmap
import os
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

from kvmhv.config import Waits
from kvmhv.drivers.qemu.direct import has_direct
from kvmhv.drivers.storage import mounts
from kvmhv.drivers.storage.volumes import DirectoryVolume
from kvmhv.model import LocationKind, LocationSpec

BLOCK = 4096
CREDENTIALS = Path.cwd() / "credentials"
AWAY_S = 5.0
"""A write that took longer has waited for a server."""
AFTERWARDS = 20
F_OFD_SETLK = 37
GIVE_UP_S = 150.0


def say(what: str, **seen: object) -> None:
    sys.stdout.write(json.dumps({"what": what, **seen}) + "\n")
    sys.stdout.flush()


def block(number: int) -> mmap.mmap:
    """A block that O_DIRECT takes."""
    aligned = mmap.mmap(-1, BLOCK)
    aligned.write(struct.pack("<Q", number) * (BLOCK // 8))
    return aligned


def locked_write(file: Path) -> str:
    """Lock what QEMU locks of an image, and write its first sector, as the guest does: the error's name, if any."""
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.fcntl(descriptor, F_OFD_SETLK, struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 100, 1, 0))
        os.pwrite(descriptor, b"x" * 512, 0)
        os.fsync(descriptor)
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    finally:
        os.close(descriptor)
    return ""


def records(root: Path) -> list[object]:
    volume = DirectoryVolume(root, Waits())
    steps = ((None, b"a"), (None, b"b"), (b"a", b"b"))
    swapped = [volume.swap_record("disk.owner", old, new) for old, new in steps]
    return [*swapped, volume.read_record("disk.owner") == b"b"]


async def mounted(spec: LocationSpec) -> Path:
    root = Path("/mnt") / spec.name
    able = mounts.kernel_can(spec.kind)
    await mounts.mount_with_kernel(spec, root, CREDENTIALS, Waits())
    found = mounts.mount_of(root)
    assert found is not None
    unsafe = mounts.unsafe_options(found)
    say("mounted", kind=spec.name, able=able, type=found.type, options=sorted(found.options), unsafe=unsafe)
    direct = root / "direct"
    direct.touch()
    say("used", kind=spec.name, direct=has_direct(direct), lock=locked_write(root / "locked"), records=records(root))
    return root


def by_hand(name: str, kind: str, what: str, options: str) -> None:
    """A mount as a careless operator makes it."""
    root = Path("/mnt") / name
    root.mkdir()
    done = subprocess.run(
        ["mount", "-t", kind, "-o", options, what, str(root)], capture_output=True, text=True, check=False
    )
    found = mounts.mount_of(root)
    assert found is not None
    say("by hand", name=name, said=done.stderr, type=found.type, unsafe=mounts.unsafe_options(found))


def write_on(name: str, root: Path) -> None:
    """Write and fsync until a server was away and has come back: how many writes were acknowledged, and the longest."""
    descriptor = os.open(root / "written", os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o600)
    number, longest_s, left, error = 0, 0.0, -1, ""
    end = time.monotonic() + GIVE_UP_S
    while left and time.monotonic() < end:
        begun = time.monotonic()
        try:
            os.pwrite(descriptor, block(number + 1), (number % 64) * BLOCK)
            os.fsync(descriptor)
        except OSError as failed:
            error = errno.errorcode[failed.errno or 0]
            break
        number += 1
        took_s = time.monotonic() - begun
        longest_s = max(longest_s, took_s)
        left = AFTERWARDS if took_s > AWAY_S else left - 1 if left > 0 else left
        if number == AFTERWARDS:
            say("writes", kind=name)
    say("written", kind=name, number=number, longest_s=longest_s, error=error)


def main() -> None:
    told = json.loads(Path("told.json").read_text())
    CREDENTIALS.write_text(f"username={told['user']}\npassword={told['secret']}\n")
    specs = (
        LocationSpec(name="nfs", kind=LocationKind.NFS, server=told["server"], share="/vms"),
        LocationSpec(name="smb", kind=LocationKind.SMB, server=told["server"], share="vms", user=told["user"]),
    )
    roots = {spec.name: asyncio.run(mounted(spec)) for spec in specs}
    share = f"//{told['server']}/vms"
    by_hand("smb-plain", "cifs", share, f"vers=3.1.1,seal,credentials={CREDENTIALS}")
    by_hand("nfs-soft", "nfs", f"{told['server']}:/vms", "vers=4.2,soft,proto=tcp")
    threads = [threading.Thread(target=write_on, args=each) for each in roots.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    say("end")


main()
