"""Agents of two versions: what they both speak works, what they do not is refused by name; and an agent that is
replaced by a newer one in the middle of a move takes up what the older one had noted.

The other version is this very package with some lines changed, which a host's agent then runs.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.real.moving import MIB, Pair, Side
from tests.real.test_moves_failures import failed

pytestmark = pytest.mark.real

LAUNCHER = "/usr/local/bin/kvmhv"
OTHER = "/opt/other"
NEWER = (
    ("wire/session.py", "VERSIONS = (1, 1)", "VERSIONS = (1, 2)"),
    ("messages.py", "    ran: bool = False", "    more: str = 'as newer versions say'\n    ran: bool = False"),
    ("core/source_state.py", "    move_id: str", "    more: str = ''\n    move_id: str"),
    ("core/target_state.py", "    move_id: str", "    more: str = ''\n    move_id: str"),
)
FOREIGN = (("wire/session.py", "VERSIONS = (1, 1)", "VERSIONS = (2, 3)"),)
MAKE = f"""
import compileall, json, pathlib, shutil, sys

other = pathlib.Path("{OTHER}")
shutil.rmtree(other, ignore_errors=True)
shutil.copytree("/opt/kvmhv/src/kvmhv", other / "kvmhv", ignore=shutil.ignore_patterns("__pycache__"))
for name, before, after in json.load(sys.stdin):
    file = other / "kvmhv" / name
    text = file.read_text()
    assert before in text, (name, before)
    file.write_text(text.replace(before, after, 1))
compileall.compile_dir(other, quiet=1)
"""
PUT = f"""
mv {LAUNCHER} {LAUNCHER}.kept
sed 's#PYTHONPATH=/opt/kvmhv/src PYTHONPYCACHEPREFIX=[^ ]*#PYTHONPATH={OTHER}#' {LAUNCHER}.kept > {LAUNCHER}.new
chmod 755 {LAUNCHER}.new
mv {LAUNCHER}.new {LAUNCHER}
"""


def make(side: Side, changes: tuple[tuple[str, str, str], ...]) -> None:
    """Make another version on a host, for `replaced`."""
    side.host.exec(["/opt/kvmhv/venv/bin/python", "-c", MAKE], text=json.dumps(changes))


@contextmanager
def replaced(side: Side) -> Iterator[None]:
    """Let a host run its other version for a while; its agent is replaced as an upgrade does it."""
    side.sh(PUT)
    try:
        side.host.agent_kill()
        side.host.agent_wait()
        yield
    finally:
        side.sh(f"mv {LAUNCHER}.kept {LAUNCHER}")
        side.host.agent_kill()
        side.host.agent_wait()
        side.sh(f"rm -r {OTHER}")


def test_what_both_speak_works_and_what_they_do_not_is_refused(pair: Pair) -> None:
    pair.boot("--disk", "size=4M")
    make(pair.b, NEWER)
    with replaced(pair.b):
        pair.moved(pair.a, pair.b)
        pair.works(pair.b)
        pair.moved(pair.b, pair.a)
        pair.works(pair.a)
    pid = pair.a.show()["pid"]
    make(pair.b, FOREIGN)
    with replaced(pair.b):
        for command in ("check", "move"):
            answer = pair.a.run("vm", command, "web01", "--to", "host2", "--include-storage")
            error = answer.json["error"]
            assert (answer.status, error["code"]) == (1, "protocol-version"), answer
            assert "(1, 1)" in error["message"] and "(2, 3)" in error["message"], answer
        assert pair.a.show()["pid"] == pid
        pair.works(pair.a)


@pytest.mark.parametrize("which", ["source", "target"])
def test_an_agent_is_replaced_in_the_middle_of_a_move(pair: Pair, which: str) -> None:
    pair.boot_fast(8 * MIB, "--disk", "size=4M")
    side = pair.a if which == "source" else pair.b
    make(side, NEWER)
    move = pair.a.begin(pair.b, "--bandwidth", "4M")
    pair.a.reaches(move, "memory", lambda report: report["remaining_bytes"] > 0)
    with replaced(side):
        answer = pair.a.wait(move)
        if answer.json["outcome"] == "done":
            pair.remember(pair.a)
        else:  # a new agent of the target may come too late for this source's patience
            failed(answer, "agent-restarted" if which == "source" else "peer-lost", "the VM runs on host1")
            pair.works(pair.a)
            pair.moved(pair.a, pair.b)
        assert not pair.a.has()
        pair.works(pair.b)
