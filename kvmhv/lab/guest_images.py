"""The lab's two guests: built once from `vm-images/`, kept, and a boot sector made to order.

`ensure_guest_images(progress)` gives the built images. They stand under CACHE in a directory named after the content of
everything they are made of (the sources and the Debian suite), so a change builds anew and nothing else does.
`write_boot_guest(path, template, ...)` makes a boot-sector disk with its parameters in place; it needs no build.
"""

import hashlib
import os
import shutil
import struct
from dataclasses import dataclass
from pathlib import Path

from kvmhv.errors import CallerError
from kvmhv.lab.state import CACHE_DIR
from kvmhv.lab.steps import Progress, run_step
from kvmhv.lab.tree import cache_lock, ensure_trees

SOURCES = Path(__file__).resolve().parents[2] / "vm-images"
CACHE = CACHE_DIR / "images"
SUITE = "trixie"
BUILD_TIMEOUT_S = 900.0
KEPT_IMAGES = 4

AS_FAST_AS_IT_CAN = 0xFFFFFFFF
"""A rate for `write_boot_guest`: no pauses."""

_PARAMETERS_AT = 0x180
_MAGIC = b"KVMHVBG1"
_PAGE_BYTES = 4096


@dataclass(frozen=True)
class GuestImages:
    """The built guests in `directory`."""

    directory: Path

    @property
    def vmlinuz(self) -> Path:
        """The Linux guest's kernel."""
        return self.directory / "linux" / "vmlinuz"

    @property
    def initrd(self) -> Path:
        """The Linux guest's root file system."""
        return self.directory / "linux" / "initrd"

    @property
    def cmdline(self) -> str:
        """The Linux guest's kernel command line, to which `kvmhv.*` parameters are appended."""
        return (self.directory / "linux" / "cmdline").read_text().strip()

    @property
    def boot_template(self) -> Path:
        """The boot-sector guest's raw disk with default parameters."""
        return self.directory / "boot" / "boot.img"

    @property
    def manifest(self) -> Path:
        """What the images were built from: versions and checksums, a line each."""
        return self.directory / "manifest"


def boot_guest(
    template: bytes,
    *,
    working_set_bytes: int,
    rate_bytes_per_s: int,
    guest_id: int = 0,
    beat_ms: int = 100,
    write_ms: int = 0,
) -> bytes:
    """Return a boot-sector disk like `template` with these parameters.

    The working set is written and verified page by page at the rate; 0 is an idle guest, which only looks at its pages,
    and AS_FAST_AS_IT_CAN never pauses. The guest takes a smaller working set if it has not the memory (16 MiB at the
    bottom and 1 MiB at the top are not used). `guest_id` becomes the first half of the boot id. Every `write_ms`
    (0: never) it writes a record to each other disk, two at most, and prints `ack` and the oracle's line.

    Raises CallerError: a parameter out of its range, or `template` is not this guest.
    """
    if template[_PARAMETERS_AT : _PARAMETERS_AT + len(_MAGIC)] != _MAGIC:
        raise CallerError("not-a-boot-guest", "the disk is not a boot-sector guest", "build it with vm-images/build")
    limits = {
        "working_set_bytes": (working_set_bytes, _PAGE_BYTES, 0xFFFFF000),
        "rate_bytes_per_s": (rate_bytes_per_s, 0, AS_FAST_AS_IT_CAN),
        "guest_id": (guest_id, 0, 0xFFFFFFFF),
        "beat_ms": (beat_ms, 10, 60_000),
        "write_ms": (write_ms, 0, 60_000),
    }
    for name, (value, least, most) in limits.items():
        if not least <= value <= most:
            raise CallerError("bad-boot-guest", f"{name} {value} is not within {least} and {most}", "choose another")
    image = bytearray(template)
    at = _PARAMETERS_AT + len(_MAGIC)
    struct.pack_into("<5I", image, at, working_set_bytes, rate_bytes_per_s, guest_id, beat_ms, write_ms)
    return bytes(image)


def write_boot_guest(
    path: Path,
    template: Path,
    *,
    working_set_bytes: int,
    rate_bytes_per_s: int,
    guest_id: int = 0,
    beat_ms: int = 100,
    write_ms: int = 0,
) -> None:
    """Write a boot-sector disk (raw, 1 MiB) to `path`; see `boot_guest` for the parameters and errors."""
    image = boot_guest(
        template.read_bytes(),
        working_set_bytes=working_set_bytes,
        rate_bytes_per_s=rate_bytes_per_s,
        guest_id=guest_id,
        beat_ms=beat_ms,
        write_ms=write_ms,
    )
    path.write_bytes(image)


def content_hash(sources: Path, suite: str = SUITE) -> str:
    """Return the name under which images of these sources and this suite are kept."""
    digest = hashlib.sha256(suite.encode())
    for path in sorted(sources.rglob("*")):
        if path.is_file() and path.suffix != ".md":
            content = path.read_bytes()
            mode = "x" if os.access(path, os.X_OK) else "-"
            digest.update(f"\n{path.relative_to(sources)} {mode} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:16]


def ensure_guest_images(
    progress: Progress, *, sources: Path = SOURCES, cache: Path = CACHE, suite: str = SUITE
) -> GuestImages:
    """Return the guests, building them first (in the lab's tree of `suite`) if this is the first time: a minute.

    Raises HostError `lab-step`: a step of the build failed; the message has the end of the build's log, where the last
    line with "step:" says how far it came. Nothing is left then but the log. Several callers at once build once.
    """
    name = content_hash(sources, suite)
    images = GuestImages(cache / name)
    if images.manifest.exists():
        return images
    cache.mkdir(parents=True, exist_ok=True)
    # The lock is the trees' too: it keeps the tree that we build in.
    with cache_lock():
        if images.manifest.exists():
            return images
        _build(images.directory, sources, ensure_trees([suite], progress)[suite], progress)
    return images


def _build(directory: Path, sources: Path, tree: Path, progress: Progress) -> None:
    """Build beside `directory` and rename when all is there: a killed build leaves nothing that looks whole."""
    part = directory.with_name(f".{directory.name}.part")
    log = directory.with_name(f"{directory.name}.log")
    log.unlink(missing_ok=True)
    for rest in (part, directory):
        if rest.exists():
            shutil.rmtree(rest)
    try:
        run_step(
            "guest images",
            [str(sources / "build-in-overlay"), str(tree), str(part)],
            log=log,
            progress=progress,
            todo="are Debian's servers reachable (or a proxy set in apt's configuration)? Then try again",
            timeout_s=BUILD_TIMEOUT_S,
        )
        part.rename(directory)
        remove_old(directory.parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def remove_old(cache: Path) -> None:
    """Keep the KEPT_IMAGES newest images in `cache`, and the logs that go with them."""
    built = sorted((path for path in cache.iterdir() if path.is_dir()), key=lambda path: path.stat().st_mtime)
    for directory in built[:-KEPT_IMAGES]:
        shutil.rmtree(directory)
    kept = {path.name for path in built[-KEPT_IMAGES:]}
    for log in cache.glob("*.log"):
        if log.stem not in kept:
            log.unlink()
