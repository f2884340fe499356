"""The Debian trees that hosts stand on: built once from packages, kept under a hash of what they are made of.

A tree is built beside its place and renamed when it is whole, under a lock: a killed build leaves no half tree, and its
rest is removed by the next build. Trees of the same suite that nobody uses any more go when a new one comes.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import kvmhv
from kvmhv.errors import HostError
from kvmhv.lab import state as states
from kvmhv.lab.plan import DEFAULT_SUITE, LIBVIRT_TREE, STORAGE_TREE
from kvmhv.lab.state import CACHE_DIR
from kvmhv.lab.steps import Progress, run_step

# Debian's packages on every host. One line each: what it is there for.
PACKAGES = (
    "qemu-system-x86",  # the guests
    "qemu-utils",  # qemu-img
    "qemu-block-extra",  # disks on other protocols than files
    "iproute2",  # bridges and taps; ss
    "iputils-ping",  # the client watches guests from outside
    "procps",  # ps, for whoever looks around
    "mount",  # shares as directories
    "python3",  # PID 1 and the agent
    "python3-venv",  # makes the agent's environment
)
# What the file server stands on instead: Debian trixie with the real servers, and no agent.
STORAGE_SUITE = "trixie"
STORAGE_PACKAGES = (
    "samba",  # smbd: SMB 3.1.1
    "nfs-ganesha",  # NFS in user space: the machine's kernel need not serve it
    "nfs-ganesha-vfs",  # exports of plain directories
    "tgt",  # iSCSI targets in user space
    "iproute2",  # addresses
    "procps",  # ps, for whoever looks around
    "python3",  # PID 1
)
# What hosts with libvirt have besides: its guests are kvmhv's to move, and virsh is what kvmhv is compared with.
LIBVIRT_PACKAGES = (
    "libvirt-daemon",  # libvirtd
    "libvirt-daemon-driver-qemu",  # its driver
    "libvirt-clients",  # virsh
    "python3-libvirt",  # what the agent speaks to it with
    "ovmf",  # guests with UEFI
    "openssl",  # the certificates that it wants
)
RECIPE_VERSION = 3
BUILD_TIMEOUT_S = 1800.0
LOCK_TIMEOUT_S = 2400.0
_UNUSED_FILES = ("/usr/share/man/*", "/usr/share/doc/*", "/usr/share/locale/*", "/usr/share/info/*")
_PIP_SECTIONS = ("global", "install", ":env:")
_PROXY_VARIABLES = ("http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")
_LAUNCHER = """#!/bin/sh
# The checkout is mounted read-only, so compiled modules are kept elsewhere.
export PYTHONPATH=/opt/kvmhv/src PYTHONPYCACHEPREFIX=/var/cache/kvmhv/pycache PYTHONUNBUFFERED=1
exec /opt/kvmhv/venv/bin/python -m kvmhv "$@"
"""


def package_dir() -> Path:
    """Return the directory of the kvmhv package that hosts will run."""
    return Path(kvmhv.__file__).resolve().parent


def pinned_requirements() -> list[str]:
    """Return the pinned runtime dependencies of the checkout, the SMB client's too; HostError `lab-checkout`."""
    project = package_dir().parent / "pyproject.toml"
    try:
        found = tomllib.loads(project.read_text())["project"]
        return sorted([*found["dependencies"], *found["optional-dependencies"]["smb"]])
    except FileNotFoundError:
        raise HostError("lab-checkout", f"{project} is missing", "the lab is run from a checkout") from None


def tree_path(suite: str) -> Path:
    """Return where the tree of a suite is, or will be once it is built."""
    debian, packages = _packages(suite)
    if suite == STORAGE_TREE:
        made_of = [str(RECIPE_VERSION), debian, *packages]
    else:
        made_of = [str(RECIPE_VERSION), debian, _LAUNCHER, *packages, *pinned_requirements()]
    digest = hashlib.sha256("\n".join(made_of).encode()).hexdigest()[:12]
    return CACHE_DIR / "trees" / f"{suite}-{digest}"


def _packages(suite: str) -> tuple[str, tuple[str, ...]]:
    """Return the Debian suite of a tree, and its packages."""
    if suite == STORAGE_TREE:
        return STORAGE_SUITE, STORAGE_PACKAGES
    if suite == LIBVIRT_TREE:
        return DEFAULT_SUITE, (*PACKAGES, *LIBVIRT_PACKAGES)
    return suite, PACKAGES


def ensure_trees(suites: Collection[str], progress: Progress) -> dict[str, Path]:
    """Return the tree of each suite, built where it is missing. The caller holds `cache_lock`.

    HostError `lab-step` names the step that failed; then no tree was left half-made.
    """
    trees = {suite: tree_path(suite) for suite in suites}
    for suite, tree in trees.items():
        if not tree.is_dir():
            _build(suite, tree, progress)
            _remove_old(suite)
    return trees


def cache_lock() -> AbstractContextManager[None]:
    """Hold the cache of trees alone, from looking for a tree until the lab's state names it."""
    return states.lock(CACHE_DIR / ".lock", "the lab's cache of trees", LOCK_TIMEOUT_S, keep=True)


def _build(suite: str, tree: Path, progress: Progress) -> None:
    _remove_rests()
    part = tree.with_name(f".{tree.name}.part")
    part.mkdir(mode=0o755, parents=True)
    log = CACHE_DIR / f"build-{suite}.log"
    log.unlink(missing_ok=True)
    progress(f"building the lab's Debian tree ({suite}); this is done once")
    try:
        _install_packages(*_packages(suite), part, log, progress)
        if suite != STORAGE_TREE:
            _install_python(suite, part, log, progress)
            _add_launcher(part)
        _finish(part)
        run_step(
            f"{suite}: writing to disk",
            ["sync", "-f", str(part)],
            log=log,
            progress=progress,
            todo="is the disk full or broken?",
            timeout_s=BUILD_TIMEOUT_S,
        )
    except BaseException:
        shutil.rmtree(part)
        raise
    part.rename(tree)


def _install_packages(suite: str, packages: Sequence[str], part: Path, log: Path, progress: Progress) -> None:
    excluded = [f"--dpkgopt=path-exclude={pattern}" for pattern in _UNUSED_FILES]
    argv = ["mmdebstrap", "--mode=root", "--variant=apt", "--skip=check/empty", *excluded]
    argv += ['--aptopt=APT::Install-Recommends "false"', f"--include={','.join(packages)}", suite, str(part)]
    run_step(
        f"{suite}: Debian packages",
        argv,
        log=log,
        progress=progress,
        todo="are Debian's servers reachable (or a proxy set in apt's configuration), and is there 1 GB of disk? Then"
        " try again",
        timeout_s=BUILD_TIMEOUT_S,
    )


def _install_python(suite: str, part: Path, log: Path, progress: Progress) -> None:
    """Make the agent's environment with the tree's own Python, and the machine's way to its packages."""
    pip = "/opt/kvmhv/venv/bin/pip install --no-cache-dir --only-binary=:all: --no-input"
    settings = pip_settings()
    (part / "etc/resolv.conf").unlink(missing_ok=True)
    (part / "etc/hosts").unlink(missing_ok=True)
    binds = ["/etc/resolv.conf", "/etc/hosts", "/etc/ssl/certs", *local_paths(settings)]
    script = ["set -e"]
    for path in (Path(bind) for bind in binds if Path(bind).exists()):
        target = shlex.quote(f"{part}{path}")
        if path.is_dir():
            script.append(f"mkdir -p {target}")
        else:
            script.append(f"mkdir -p {shlex.quote(f'{part}{path.parent}')}; [ -e {target} ] || : > {target}")
        script.append(f"mount --bind {shlex.quote(str(path))} {target}")
    script.append(f"mount -t proc proc {shlex.quote(f'{part}/proc')}; mount --bind /dev {shlex.quote(f'{part}/dev')}")
    inside = f"python3 -m venv --system-site-packages /opt/kvmhv/venv && {pip} {shlex.join(pinned_requirements())}"
    script.append(f"exec chroot {shlex.quote(str(part))} /bin/sh -c {shlex.quote(inside)}")
    proxies = {name: os.environ[name] for name in _PROXY_VARIABLES if name in os.environ}
    own = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "LANG": "C.UTF-8"}
    run_step(
        f"{suite}: Python packages",
        ["/bin/sh", "-c", "\n".join(script)],
        log=log,
        progress=progress,
        todo="is the Python package index reachable (pip's own settings are used)? Then try again",
        timeout_s=BUILD_TIMEOUT_S,
        env={**proxies, **own, **settings},
    )


def pip_settings() -> dict[str, str]:
    """Return the machine's configuration of pip as PIP_ variables: index, proxy, certificates, time limits."""
    done = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, timeout=60, check=False
    )
    return parse_pip_config(done.stdout)


def parse_pip_config(listing: str) -> dict[str, str]:
    """Return what `pip config list` says as PIP_ variables; as with pip, the environment wins over the files."""
    settings: dict[str, str] = {}
    for line in sorted(listing.splitlines(), key=_precedence):
        name, _, value = line.partition("=")
        section, _, key = name.rpartition(".")
        if section in _PIP_SECTIONS and value:
            settings["PIP_" + key.upper().replace("-", "_")] = " ".join(value.strip("'\"").replace("\\n", " ").split())
    return settings


def _precedence(line: str) -> int:
    order = [number for number, section in enumerate(_PIP_SECTIONS) if line.startswith(f"{section}.")]
    return order[0] if order else 0


def local_paths(settings: dict[str, str]) -> list[str]:
    """Return the files and directories of the machine that pip's settings name.

    Of an index on disk it is the directory above: its pages link to files beside it.
    """
    paths: set[str] = set()
    for value in settings.values():
        for word in value.split():
            if word.startswith("file://"):
                paths.add(str(Path(word.removeprefix("file://")).parent))
            elif word.startswith("/"):
                paths.add(word)
    return sorted(path for path in paths if path not in {"/", "/etc", "/usr", "/root"})


def _add_launcher(part: Path) -> None:
    launcher = part / "usr/local/bin/kvmhv"
    launcher.write_text(_LAUNCHER)
    launcher.chmod(0o755)


def _finish(part: Path) -> None:
    (part / "opt/kvmhv/src/kvmhv").mkdir(parents=True)
    (part / "etc/resolv.conf").write_text("# a lab's host has no way out\n")
    (part / "etc/machine-id").unlink(missing_ok=True)
    if not (part / "etc/mtab").is_symlink():
        (part / "etc/mtab").symlink_to("../proc/self/mounts")


def _remove_rests() -> None:
    """Remove what killed builds and removals left behind."""
    for rest in (CACHE_DIR / "trees").glob(".*"):
        shutil.rmtree(rest)


def _remove_old(suite: str) -> None:
    """Remove the suite's trees that are neither the current one nor some lab's."""
    used = {str(tree_path(suite))}
    for lab in states.known_labs():
        if (state := states.read_state(lab)) is not None:
            used |= set(state.trees.values())
    for tree in (CACHE_DIR / "trees").glob(f"{suite}-*"):
        if str(tree) not in used:
            rest = tree.with_name(f".{tree.name}.old")
            tree.rename(rest)
            shutil.rmtree(rest)
