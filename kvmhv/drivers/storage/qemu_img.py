"""qemu-img as a subprocess: JSON out, formats always given, a deadline on every call.

Nothing here decides whether a file may be touched; directory.py does.
"""

import asyncio
import contextlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

import msgspec

from kvmhv.config import Waits
from kvmhv.errors import CallerError, HostError
from kvmhv.model import DISK_MAX_BYTES, DISK_MIN_BYTES, DiskFormat

CHAIN_MAX = 32
"""Layers of one disk; longer chains cost more than they are worth, and a bound ends a chain that was made to hurt."""
DIES_S = 5.0
SECTOR_BYTES = 512

Result = TypeVar("Result")


Node = dict[str, object]
"""An image as the options of `-blockdev` describe it."""


class ImageFile(NamedTuple):
    """One file of a chain, as `qemu-img info` describes it."""

    file: Path
    format: DiskFormat
    size_bytes: int


class _Specific(msgspec.Struct, frozen=True):
    data: dict[str, object] = {}


class _Extent(msgspec.Struct, frozen=True):
    start: int
    length: int
    data: bool
    zero: bool


class _Info(msgspec.Struct, frozen=True, rename="kebab"):
    format: str
    virtual_size: int
    encrypted: bool = False
    backing_filename: str | None = None
    full_backing_filename: str | None = None
    backing_filename_format: str | None = None
    format_specific: _Specific = _Specific()


def find(qemu_binary: str, name: str = "qemu-img") -> Path | None:
    """Return the tool beside the configured QEMU, else the one in PATH, None if there is none."""
    if "/" in qemu_binary:
        beside = Path(qemu_binary).with_name(name)
        if beside.is_file():
            return beside
    found = shutil.which(name)
    return Path(found) if found else None


class QemuImg:
    """The calls that kvmhv makes of qemu-img. Each raises HostError `qemu-img-missing`, `qemu-img` or `storage`."""

    def __init__(self, qemu_binary: str, waits: Waits) -> None:
        """`waits` bounds calls that read or write a header, and calls that copy an image."""
        self._qemu_binary = qemu_binary
        self._look_s = waits.image_look_s
        self._copy_s = waits.image_copy_s
        self._map_s = waits.image_map_s

    async def chain(self, file: Path, format: DiskFormat | None, *, in_use: bool) -> tuple[ImageFile, ...]:  # noqa: A002
        """Describe an image and its backing files, top first. A format that is not given is probed (never for a VM).

        Each backing file is read in the format that the layer above it names. `in_use`: a running QEMU may hold the
        file. Raises CallerError `disk-invalid` for what is no usable chain, `disk-in-use` if a QEMU holds it.
        """
        found: list[ImageFile] = []
        seen: set[Path] = set()
        next_file: Path | None = file
        while next_file is not None:
            real = await _in_time(self._look_s, _regular_file, next_file)
            if real in seen:
                raise _invalid(file, f"its backing files form a loop at {next_file}")
            if len(found) == CHAIN_MAX:
                raise _invalid(file, f"it has more than {CHAIN_MAX} layers")
            seen.add(real)
            info = await self._info(real, format, in_use=in_use)
            await _in_time(self._look_s, _check, real, info)
            found.append(ImageFile(next_file, DiskFormat(info.format), info.virtual_size))
            next_file = _backing_of(real, info)
            format = DiskFormat(info.backing_filename_format) if info.backing_filename_format else None  # noqa: A001
        return tuple(found)

    async def create_qcow2(self, file: Path, size_bytes: int, backing: tuple[str, DiskFormat] | None) -> None:
        """Write an empty qcow2 into an existing file; `backing`: what its header says (path, format)."""
        # -u: the backing file is not opened; its size is known and it may be in use
        extra = ["-u", "-b", backing[0], "-F", backing[1].value] if backing else []
        await self._run(["create", "-q", "-f", "qcow2", *extra, "--", str(file), str(size_bytes)], self._look_s)

    async def convert(self, source: ImageFile, target: Path, target_format: DiskFormat) -> None:
        """Write the source's contents (its whole chain) into an existing file."""
        formats = ["-f", source.format.value, "-O", target_format.value]
        await self._run(["convert", "-q", *formats, "--", str(source.file), str(target)], self._copy_s)

    async def convert_into(
        self, source: ImageFile, target_format: DiskFormat, target: Node, secret: str | None
    ) -> None:
        """Write the source's contents (its whole chain) into an image that is there, wherever QEMU reaches it."""
        objects = ["--object", secret] if secret else []
        whole = "json:" + msgspec.json.encode({"driver": target_format.value, "file": target}).decode()
        formats = ["-f", source.format.value, "-O", target_format.value]
        await self._run(
            ["convert", "-q", "-n", "-t", "none", *objects, *formats, "--", str(source.file), whole], self._copy_s
        )

    async def data_extents(self, image: ImageFile) -> list[tuple[int, int]]:
        """Return (start, length) of what is not known to be zero in an image without backing file."""
        said = await self._run(["map", "--output=json", "-f", image.format.value, "--", str(image.file)], self._map_s)
        try:
            extents = msgspec.json.decode(said, type=list[_Extent])
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise HostError(
                "qemu-img", f"qemu-img said of {image.file}: {error}", "install QEMU 7.2 or newer"
            ) from error
        return [(one.start, one.length) for one in extents if one.data and not one.zero]

    async def size_of(self, format: DiskFormat, node: Node, secret: str | None) -> int:  # noqa: A002
        """Return the virtual size of an image, wherever QEMU reaches it; a running QEMU may hold it."""
        objects = ["--object", secret] if secret else []
        whole = "json:" + msgspec.json.encode({"driver": format.value, "file": node}).decode()
        said = await self._run(["info", "--force-share", "--output=json", *objects, "--", whole], self._look_s)
        return _read(str(node.get("filename", format.value)), said).virtual_size

    async def rename_backing(self, file: Path, backing: str, backing_format: DiskFormat) -> None:
        """Change what a qcow2's header says of its backing file, and nothing else."""
        await self._run(
            ["rebase", "-q", "-u", "-f", "qcow2", "-b", backing, "-F", backing_format.value, "--", str(file)],
            self._look_s,
        )

    async def _info(self, file: Path, format: DiskFormat | None, *, in_use: bool) -> _Info:  # noqa: A002
        arguments = ["info", "--output=json"]
        if in_use:
            arguments.append("--force-share")
        if format is not None:
            arguments += ["-f", format.value]
        try:
            said = await self._run([*arguments, "--", str(file)], self._look_s)
        except HostError as error:
            if error.code != "qemu-img":
                raise
            if "lock" in error.message:
                raise CallerError(
                    "disk-in-use", f"{file} is in use: {error.message}", "stop what uses it", http_status=409
                ) from error
            raise _invalid(file, error.message) from error
        return _read(str(file), said)

    async def _run(self, arguments: list[str], timeout_s: float) -> bytes:
        binary = find(self._qemu_binary)
        if binary is None:
            raise HostError("qemu-img-missing", "there is no qemu-img on this host", "install qemu-utils")
        return await _run("qemu-img", [str(binary), *arguments], timeout_s)


async def copy_bytes(source: Path, target: Path, timeout_s: float) -> None:
    """Copy a file as it is into an existing one: sparse where it is sparse, shared blocks where the file system can."""
    await _run("storage", ["cp", "--reflink=auto", "--sparse=auto", "--", str(source), str(target)], timeout_s)


async def _run(code: str, command: list[str], timeout_s: float) -> bytes:
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*command, stdin=asyncio.subprocess.DEVNULL, stdout=pipe, stderr=pipe)
    try:
        async with asyncio.timeout(timeout_s):
            output, errors = await process.communicate()
    except TimeoutError:
        raise HostError(
            "storage", f"{command[0]} {command[1]} has not ended in {timeout_s:.0f} s", "check the storage"
        ) from None
    finally:
        if process.returncode is None:  # the deadline, or whoever waited for us has gone
            await end_by_force(process)
    if process.returncode != 0:
        said = errors.decode(errors="replace").strip().removeprefix(f"{code}: ")[-500:]
        if "No space left" in said:
            raise HostError("location-full", said, "make room, or choose another location")
        raise HostError(code, said or f"{command[0]} ended with {process.returncode}", "check the storage")
    return output


async def end_by_force(process: asyncio.subprocess.Process) -> None:
    """Kill a program; one that hangs in the kernel, on its storage, is left behind and ends when that answers."""
    process.kill()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(DIES_S):
            await process.wait()


def _read(what: str, said: bytes) -> _Info:
    try:
        return msgspec.json.decode(said, type=_Info)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise HostError("qemu-img", f"qemu-img said of {what}: {error}", "install QEMU 7.2 or newer") from error


async def _in_time(timeout_s: float, look: Callable[..., Result], *arguments: object) -> Result:
    """Look at a file in a thread: the server of its file system may be away. Raises HostError `storage`."""
    try:
        async with asyncio.timeout(timeout_s):
            return await asyncio.to_thread(look, *arguments)
    except TimeoutError:
        text = f"{arguments[0]} does not answer in {timeout_s:g} s"
        raise HostError("storage", text, "is its server up, and the network to it?") from None


def _regular_file(file: Path) -> Path:
    try:
        real = file.resolve(strict=True)
        if real.is_dir():
            raise _invalid(file, "it is a directory")
        if not real.is_file():
            raise _invalid(file, "it is a device, socket or pipe; kvmhv runs image files only")
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: Python 3.11 and 3.12 for a loop of symlinks
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise _invalid(file, (reason or str(error)).lower()) from error
    return real


def _check(file: Path, info: _Info) -> None:
    if info.format not in {kind.value for kind in DiskFormat}:
        raise _invalid(file, f"its format is {info.format}; convert it to qcow2 or raw first")
    if info.encrypted:
        raise _invalid(file, "it is encrypted")
    if info.format_specific.data.get("data-file"):
        raise _invalid(file, "it keeps its data in a further file, which kvmhv does not move")
    if info.format_specific.data.get("corrupt"):
        raise _invalid(file, "it is marked corrupt; see `qemu-img check -r`")
    if info.format == DiskFormat.RAW and file.stat().st_size % SECTOR_BYTES:
        raise _invalid(file, f"it is no image: {file.stat().st_size} bytes are no whole number of 512-byte sectors")
    if not DISK_MIN_BYTES <= info.virtual_size <= DISK_MAX_BYTES:
        raise _invalid(file, f"a disk of {info.virtual_size} bytes is not possible")


def _backing_of(file: Path, info: _Info) -> Path | None:
    if info.backing_filename is None:
        return None
    name = info.full_backing_filename or info.backing_filename
    if not name.startswith("/"):  # json:{...}, nbd:..., https:...
        raise _invalid(file, f"its backing file {name!r} is not a plain file")
    if info.backing_filename_format not in {None, *(kind.value for kind in DiskFormat)}:
        raise _invalid(file, f"its backing file's format is {info.backing_filename_format}")
    return Path(name)


def _invalid(file: Path, why: str) -> CallerError:
    return CallerError("disk-invalid", f"{file} cannot be a VM's disk: {why}", "give a qcow2 or raw image file")
