"""Which files cannot be used without the page cache of their file system (O_DIRECT)."""

import asyncio
import errno
import os
from pathlib import Path

from kvmhv.errors import HostError
from kvmhv.places import DiskPlace


async def buffered(disk_paths: dict[str, tuple[DiskPlace, ...]], timeout_s: float) -> frozenset[DiskPlace]:
    """Return the files that need the page cache, looked at in a thread. Raises HostError `storage`.

    `timeout_s`: the server of a file may be away.
    """
    places = [place for places in disk_paths.values() for place in places]
    try:
        async with asyncio.timeout(timeout_s):
            found = await asyncio.to_thread(lambda: [has_direct(place) for place in places])
    except TimeoutError:
        files = ", ".join(str(place) for place in places if isinstance(place, Path))
        text = f"one of {files} does not answer in {timeout_s:g} s"
        raise HostError("storage", text, "is its server up, and the network to it?") from None
    return frozenset(place for place, has in zip(places, found, strict=True) if not has)


def has_direct(path: DiskPlace) -> bool:
    """Whether a file's file system can be used without its page cache (O_DIRECT); the network drivers have none."""
    if not isinstance(path, Path):
        return True
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC))
    except OSError as error:
        return error.errno != errno.EINVAL
    return True
