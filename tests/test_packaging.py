"""What makes a machine a host: the scripts are linted, the Vagrantfile is one, what they name is there."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHELL = ("#!/bin/bash", "#!/bin/sh")


def scripts() -> list[Path]:
    """Return every shell script of the checkout, by its first line; and what the others read in."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    files = [ROOT / name for name in listed.split("\0") if name]
    return [file for file in files if file.is_file() and file.read_bytes()[:12].decode("latin-1").startswith(SHELL)]


def test_scripts_are_linted() -> None:
    found = scripts()
    assert {"install-host", "install-storage", "build-box", "test"} <= {file.name for file in found}
    command = ["shellcheck", "--external-sources", "--severity=warning", *map(str, found)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("provider", ["libvirt", "virtualbox"])
def test_the_vagrantfile_is_valid(provider: str, tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "VAGRANT_HOME": str(tmp_path / "home"),
        "VAGRANT_DOTFILE_PATH": str(tmp_path / "dot"),
        "VAGRANT_CHECKPOINT_DISABLE": "1",
        "VAGRANT_DEFAULT_PROVIDER": provider,
    }
    command = ["vagrant", "validate", "--ignore-provider"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "validated successfully" in done.stdout


def test_every_package_says_what_it_is_for() -> None:
    for line in (ROOT / "packaging/packages").read_text().splitlines():
        if not line.startswith("#"):
            kind, _, rest = line.partition(" ")
            assert kind in {"host", "storage", "demo"}
            assert rest.split("#")[0].strip(), line
