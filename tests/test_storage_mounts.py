"""Mounts: what a line of mountinfo says, which options are right, and that no secret is in a command."""

from pathlib import Path

import pytest

from kvmhv.drivers.storage import mounts
from kvmhv.drivers.storage.mounts import Mount
from kvmhv.model import LocationKind, LocationSpec

MOUNTINFO = """\
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
40 22 0:50 / /mnt/vms rw,relatime shared:9 - cifs //files/vms rw,vers=3.1.1,seal,cache=none,nobrl,hard
41 22 0:51 / /mnt/a\\040b rw - nfs4 files:/vms rw,vers=4.2,hard
42 22 0:52 / /mnt/vms/deep rw - tmpfs tmpfs rw
"""


@pytest.mark.parametrize(
    ("directory", "type_", "mounted_on"),
    [
        ("/mnt/vms/web01", "cifs", "/mnt/vms"),
        ("/mnt/vms", "cifs", "/mnt/vms"),
        ("/mnt/vmsother", "ext4", "/"),
        ("/mnt/a b/x", "nfs4", "/mnt/a b"),
        ("/mnt/vms/deep", "tmpfs", "/mnt/vms/deep"),
    ],
)
def test_a_directory_is_on_the_deepest_mount_above_it(directory: str, type_: str, mounted_on: str) -> None:
    found = mounts.parse(MOUNTINFO, Path(directory))
    assert found is not None
    assert (found.type, found.mounted_on) == (type_, Path(mounted_on))


def unsafe(type_: str, options: str) -> list[str]:
    return list(mounts.unsafe_options(Mount(Path("/mnt"), type_, "files", frozenset(options.split(",")))))


def test_the_options_that_kvmhv_uses_are_safe_and_their_absence_is_told() -> None:
    smb = LocationSpec(name="vms", kind=LocationKind.SMB, server="files", share="vms", user="u")
    nfs = LocationSpec(name="vms", kind=LocationKind.NFS, server="files", share="/vms")
    for spec, type_ in ((smb, "cifs"), (nfs, "nfs4")):
        command = mounts.kernel_mount(spec, Path("/run/m"), Path("/var/credentials"))
        assert unsafe(type_, command[command.index("-o") + 1]) == []
    assert len(unsafe("cifs", "rw,vers=3.1.1,cache=strict,soft")) == 3
    assert len(unsafe("nfs4", "ro,soft")) == 2
    assert len(unsafe("nfs", "rw,hard,nolock")) == 1
    assert unsafe("ext4", "rw,relatime") == []


def test_a_mount_command_names_the_file_with_the_password_and_not_the_password() -> None:
    spec = LocationSpec(name="vms", kind=LocationKind.SMB, server="files:4450", share="vms", user="u")
    command = mounts.kernel_mount(spec, Path("/run/m"), Path("/var/credentials"))
    assert command[-2:] == ["//files/vms", "/run/m"]
    assert "credentials=/var/credentials" in command[command.index("-o") + 1]
    assert "port=4450" in command[command.index("-o") + 1]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("files", ("files", None)),
        ("files:445", ("files", 445)),
        ("10.0.0.1:3260", ("10.0.0.1", 3260)),
        ("[fd00::1]:3260", ("fd00::1", 3260)),
        ("[fd00::1]", ("fd00::1", None)),
    ],
)
def test_a_server_is_a_host_and_perhaps_a_port(text: str, parts: tuple[str, int | None]) -> None:
    assert mounts.split_server(text) == parts


@pytest.mark.parametrize("text", ["", "a b", "files:", "files:x", "//files", "fd00::1"])
def test_what_is_no_server(text: str) -> None:
    with pytest.raises(ValueError, match="neither"):
        mounts.split_server(text)
