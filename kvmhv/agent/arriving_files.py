"""The kernel files of a VM that arrives: kept as they were announced, or not at all."""

import asyncio
import hashlib
from collections.abc import AsyncIterator
from pathlib import Path

from kvmhv.errors import CallerError
from kvmhv.model import Vm


async def keep(vm: Vm, name: str, chunks: AsyncIterator[bytes], directory: Path) -> None:
    """Keep `kernel` or `initrd` in the VM's directory. Raises CallerError `file-not-wanted`, `file-damaged`."""
    kernel = vm.kernel
    assert kernel is not None, "only a VM with a kernel waits for files"
    wanted = {
        "kernel": (kernel.kernel_sha256, kernel.kernel_bytes),
        "initrd": (kernel.initrd_sha256, kernel.initrd_bytes),
    }
    if name not in wanted:
        raise CallerError("file-not-wanted", f"a VM has no file {name!r}", "", http_status=409)
    digest, size_bytes = hashlib.sha256(), 0
    await asyncio.to_thread(directory.mkdir, parents=True, exist_ok=True, mode=0o700)
    file = await asyncio.to_thread((directory / name).open, "wb")
    try:
        async for chunk in chunks:
            size_bytes += len(chunk)
            if size_bytes > wanted[name][1]:
                break
            digest.update(chunk)
            await asyncio.to_thread(file.write, chunk)
    finally:
        await asyncio.to_thread(file.close)
    if (digest.hexdigest(), size_bytes) != wanted[name]:
        raise CallerError("file-damaged", f"{name} did not arrive as it was announced", "move the VM again")
