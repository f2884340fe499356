"""The lab's two guests: built once from `vm-images/`, kept, and a boot sector made to order.

`ensure_guest_images(progress)` gives the built images. They stand under CACHE in a directory named after the content of
everything they are made of (the sources and the Debian suite), so a change builds anew and nothing else does.
`write_boot_guest(path, template, ...)` makes a boot-sector disk with its parameters in place; it needs no build.
"""

import fcntl
import hashlib
import os
import shutil
import struct
import subprocess
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from kvmhv.errors import CallerError, HostError

SOURCES = Path(__file__).resolve().parents[2] / "vm-images"
CACHE = Path("/var/cache/kvmhv-lab/images")
SUITE = "trixie"
BUILD_TIMEOUT_S = 900.0
LOG_TAIL_LINES = 15

AS_FAST_AS_IT_CAN = 0xFFFFFFFF
"""A rate for `write_boot_guest`: no pauses."""

_PARAMETERS_AT = 0x180
_MAGIC = b"KVMHVBG1"
_PAGE_BYTES = 4096
_SECTOR_BYTES = 512

Progress = Callable[[str], None]


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
    template: bytes, *, working_set_bytes: int, rate_bytes_per_s: int, guest_id: int = 0, beat_ms: int = 100
) -> bytes:
    """Return a boot-sector disk like `template` with these parameters.

    The working set is written and verified page by page at the rate; 0 is an idle guest, which only looks at its pages,
    and AS_FAST_AS_IT_CAN never pauses. The guest takes a smaller working set if it has not the memory (16 MiB at the
    bottom and 1 MiB at the top are not used). `guest_id` becomes the first half of the boot id.

    Raises CallerError: a parameter out of its range, or `template` is not this guest.
    """
    if template[_PARAMETERS_AT : _PARAMETERS_AT + len(_MAGIC)] != _MAGIC:
        raise CallerError("not-a-boot-guest", "the disk is not a boot-sector guest", "build it with vm-images/build")
    limits = {
        "working_set_bytes": (working_set_bytes, _PAGE_BYTES, 0xFFFFF000),
        "rate_bytes_per_s": (rate_bytes_per_s, 0, AS_FAST_AS_IT_CAN),
        "guest_id": (guest_id, 0, 0xFFFFFFFF),
        "beat_ms": (beat_ms, 10, 60_000),
    }
    for name, (value, least, most) in limits.items():
        if not least <= value <= most:
            raise CallerError("bad-boot-guest", f"{name} {value} is not within {least} and {most}", "choose another")
    image = bytearray(template)
    at = _PARAMETERS_AT + len(_MAGIC)
    struct.pack_into("<4I", image, at, working_set_bytes, rate_bytes_per_s, guest_id, beat_ms)
    return bytes(image)


def write_boot_guest(
    path: Path,
    template: Path,
    *,
    working_set_bytes: int,
    rate_bytes_per_s: int,
    guest_id: int = 0,
    beat_ms: int = 100,
) -> None:
    """Write a boot-sector disk (raw, 1 MiB) to `path`; see `boot_guest` for the parameters and errors."""
    image = boot_guest(
        template.read_bytes(),
        working_set_bytes=working_set_bytes,
        rate_bytes_per_s=rate_bytes_per_s,
        guest_id=guest_id,
        beat_ms=beat_ms,
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
    progress: Progress,
    find_tree: Callable[[str, Progress], Path],
    *,
    sources: Path = SOURCES,
    cache: Path = CACHE,
    suite: str = SUITE,
) -> GuestImages:
    """Return the guests, building them first if this is the first time (about a minute).

    `find_tree(suite, progress)` gives a Debian tree of that suite to build in; it is only read and only asked for when
    there is something to build. `progress` is called with a sentence at each step. Several callers at once build once.

    Raises HostError: a step of the build failed (the message has its log's end) or took longer than BUILD_TIMEOUT_S.
    A failed build leaves nothing but its log.
    """
    name = content_hash(sources, suite)
    images = GuestImages(cache / name)
    if images.manifest.exists():
        return images
    cache.mkdir(parents=True, exist_ok=True)
    with _locked(cache / "lock", progress):
        if images.manifest.exists():
            return images
        tree = find_tree(suite, progress)
        unfinished = cache / f"{name}.unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        shutil.rmtree(images.directory, ignore_errors=True)
        try:
            _build(sources / "build-in-overlay", tree, unfinished, cache / f"{name}.log", progress)
            unfinished.rename(images.directory)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return images


@contextmanager
def _locked(path: Path, progress: Progress) -> Iterator[None]:
    """Hold the lock of the cache; another process that builds is waited for, at most BUILD_TIMEOUT_S."""
    deadline = time.monotonic() + BUILD_TIMEOUT_S
    with path.open("w") as file:
        told = False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise HostError(
                        "guest-images-locked", f"another process holds {path}", "wait for it, or end it"
                    ) from None
                if not told:
                    progress("guest images: another process builds them, waiting")
                    told = True
                time.sleep(0.2)
            else:
                break
        yield


def _build(script: Path, tree: Path, out: Path, log: Path, progress: Progress) -> None:
    """Run the build; its output goes to `log`, its steps to `progress`."""
    step = "start"
    tail: deque[str] = deque(maxlen=LOG_TAIL_LINES)
    deadline = time.monotonic() + BUILD_TIMEOUT_S
    # timeout(1) also ends a build that is silent, which a deadline between two lines would not.
    command = ["timeout", "--kill-after=5", str(int(BUILD_TIMEOUT_S)), str(script), str(tree), str(out)]
    with (
        log.open("w") as log_file,
        subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        ) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            log_file.write(line)
            tail.append(line.rstrip())
            if line.startswith("step: "):
                step = line.removeprefix("step: ").strip()
                progress(f"guest images: {step}")
    if process.returncode:
        why = "took too long" if time.monotonic() >= deadline else f"failed (exit status {process.returncode})"
        raise HostError(
            "guest-images-failed",
            f"building the guest images: step '{step}' {why}; the end of {log}:\n" + "\n".join(tail),
            "mend what the log says and run it again",
        )
