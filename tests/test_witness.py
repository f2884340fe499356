"""The witness of the matrix notices what it is there for: a VM that runs twice, goes back, or is damaged."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.real import witness

BEAT = "beat {} passes 0 errors 0 ms 5 dirtied 0\r\n"


@pytest.fixture
def hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, Path, witness.Witness]]:
    """Return the console logs of one VM on two hosts, and who reads them."""
    monkeypatch.setattr(witness, "run_dir", lambda lab, host: tmp_path / host)
    monkeypatch.setattr(witness, "LOOK_EVERY_S", 3600.0)  # it looks when it is asked
    logs = tmp_path / "a" / "vm" / "1" / "console.log", tmp_path / "b" / "vm" / "1" / "console.log"
    for log in logs:
        log.parent.mkdir(parents=True)
    reader = witness.Witness(SimpleNamespace(name="lab"), ("a", "b"))  # type: ignore[arg-type]
    yield *logs, reader
    reader.close()


def say(log: Path, *beats: int, begin: str = "") -> None:
    with log.open("a") as file:
        file.write(begin + "".join(BEAT.format(beat) for beat in beats))


def test_a_vm_that_moves_is_one_story(hosts: tuple[Path, Path, witness.Witness]) -> None:
    source, target, reader = hosts
    say(source, 1, 2, begin="BOOT 1\r\n")
    reader.look()
    say(source, 3)
    say(target, 4)
    reader.check("1", 1)
    say(source, 1, begin="bea\r\nBOOT 2\r\n")  # it was killed, and started again
    reader.check("1", 2)
    assert reader.beats("1", "a") == 4


def test_two_copies_are_found(hosts: tuple[Path, Path, witness.Witness]) -> None:
    source, target, reader = hosts
    say(source, 1, 2, 3, begin="BOOT 1\r\n")
    say(target, 3, 4)
    with pytest.raises(AssertionError, match="it ran twice"):
        reader.check("1", 1)


def test_damage_and_a_secret_restart_are_found(hosts: tuple[Path, Path, witness.Witness]) -> None:
    source, _, reader = hosts
    say(source, 1, begin="BOOT 1\r\n")
    say(source, 1, begin="BOOT 2\r\n")
    with pytest.raises(AssertionError, match="2 boots instead of 1"):
        reader.check("1", 1)
    say(source, begin="BAD slot 7 of vdb: not record 3\r\n")
    with pytest.raises(AssertionError, match="BAD slot 7"):
        reader.check("1", 2)
