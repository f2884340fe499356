import base64
import contextlib
import shutil
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from kvmhv.drivers.qemu.keys import FFDHE2048
from kvmhv.drivers.qemu.probe import PROOF_EXIT_STATUS, PROOF_PORT, PROOF_VALUE, missing_features, proof_rom
from kvmhv.drivers.qemu.rundir import CONSOLE_LOG_MAX_BYTES, ENDED_KEPT, VmDir, check_run_path, read_tail, vm_ids
from kvmhv.errors import HostError

VM_ID = "5d6f9b1e-0f0e-4c39-9d3c-7a1f0f2b1c11"


def test_a_run_dir_whose_sockets_would_be_too_long_is_refused() -> None:
    fits = Path("/" + "r" * 53)
    assert len(str(VmDir(fits, VM_ID).console_socket)) == 107
    check_run_path(fits)
    with pytest.raises(HostError, match="1 bytes too long") as caught:
        check_run_path(Path("/" + "r" * 54))
    assert caught.value.code == "run-dir-long"


def test_a_directory_is_private_and_fresh(tmp_path: Path) -> None:
    directory = VmDir(tmp_path, VM_ID)
    directory.make(incoming=True)
    assert directory.path.stat().st_mode & 0o777 == 0o700
    assert directory.incoming_mark.exists()
    directory.cont_mark.touch()
    directory.make(incoming=False)
    assert list(directory.path.iterdir()) == []
    assert vm_ids(tmp_path) == (VM_ID,)


def test_removing_keeps_logs_of_the_newest_only(tmp_path: Path) -> None:
    for number in range(ENDED_KEPT + 3):
        directory = VmDir(tmp_path, f"vm{number}")
        directory.make(incoming=False)
        directory.qemu_log.write_text("last words")
        directory.keys.mkdir()
        directory.remove()
        directory.remove()
    assert vm_ids(tmp_path) == ()
    kept = sorted(path.name for path in (tmp_path / "ended").iterdir())
    assert len(kept) == ENDED_KEPT
    newest = tmp_path / "ended" / f"vm{ENDED_KEPT + 2}"
    assert [(path.name, path.read_text()) for path in newest.iterdir()] == [("qemu.log", "last words")]


def test_an_agent_that_dies_while_it_removes_loses_no_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = VmDir(tmp_path, VM_ID)
    directory.make(incoming=True)
    directory.console_log.write_text("the guest's words")
    whole = [Path.unlink, shutil.rmtree, Path.rename]
    for deaths in range(6):
        left = deaths

        def dying(act: Callable[..., Any]) -> Callable[..., Any]:
            def do(*arguments: Any, **keywords: Any) -> Any:
                nonlocal left
                if left == 0:
                    raise KeyboardInterrupt
                left -= 1
                return act(*arguments, **keywords)

            return do

        with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
            patch.setattr(Path, "unlink", dying(whole[0]))
            patch.setattr(shutil, "rmtree", dying(whole[1]))
            patch.setattr(Path, "rename", dying(whole[2]))
            directory.remove()
    directory.remove()
    assert not directory.path.exists()
    assert (tmp_path / "ended" / VM_ID / "console.log").read_text() == "the guest's words"


def test_the_consoles_log_is_bounded_and_its_end_is_kept(tmp_path: Path) -> None:
    directory = VmDir(tmp_path, VM_ID)
    directory.make(incoming=False)
    directory.trim_console_log()  # none yet
    with directory.console_log.open("ab", buffering=0) as guest:
        guest.write(b"a" * CONSOLE_LOG_MAX_BYTES)
        directory.trim_console_log()
        assert directory.console_log.stat().st_size == CONSOLE_LOG_MAX_BYTES
        guest.write(b"end")
        directory.trim_console_log()
        guest.write(b"goes on")
    assert directory.console_log.read_text() == "goes on"
    assert read_tail(directory.console_log.with_suffix(".log.1"), 3) == "end"


def test_vm_ids_without_a_run_dir(tmp_path: Path) -> None:
    assert vm_ids(tmp_path / "none") == ()
    assert read_tail(tmp_path / "none", 10) == ""


def test_the_dh_group_is_that_of_the_rfc() -> None:
    """RFC 7919, A.1: p = 2^2048 - 2^1984 + (floor(2^1918 * e) + 560316) * 2^64 - 1, g = 2."""
    e, term = Fraction(0), Fraction(1)
    for number in range(1, 400):
        e += term
        term /= number
    prime = 2**2048 - 2**1984 + (int(e * 2**1918) + 560316) * 2**64 - 1
    lines = FFDHE2048.splitlines()
    assert (lines[0], lines[-1]) == ("-----BEGIN DH PARAMETERS-----", "-----END DH PARAMETERS-----")
    der = base64.b64decode("".join(lines[1:-1]))
    assert der == b"\x30\x82\x01\x08\x02\x82\x01\x01" + prime.to_bytes(257, "big") + b"\x02\x01\x02"


def test_the_proof_guest_writes_its_value_and_halts() -> None:
    rom = proof_rom()
    assert len(rom) == 64 * 1024
    assert rom[0xFFF0:0xFFF7] == bytes((0xB0, PROOF_VALUE, 0xE6, PROOF_PORT, 0xF4, 0xEB, 0xFD))
    assert PROOF_EXIT_STATUS == 85


def test_features_that_a_host_lacks_are_named() -> None:
    every = dict.fromkeys(("cx16", "lahf-lm", "popcnt", "pni", "sse4.1", "sse4.2", "ssse3"), True)
    assert missing_features(every) == ()
    assert missing_features({**every, "popcnt": False, "vendor": "x"}) == ("popcnt",)
    assert len(missing_features({})) == 7
