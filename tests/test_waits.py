"""Which waits an operator can change: all but those of the kinds that ARCHITECTURE (Bounds) names."""

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from kvmhv import config
from kvmhv.config import Config

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "kvmhv"

PATIENCE_OF_PEOPLE = ("cli/", "agent/api/", "agent/web/", "lab/")
"""Rooms whose waits are for a request, a person or a test."""

BY_NAME = re.compile(r"(^|_)(POLL|AGAIN|EVERY|HEARTBEAT|KEEPALIVE|BUCKETS|PER)_S$")
"""A pace, a heartbeat, a histogram, a rate: the name says it."""

KINDS = {
    "a pace": {
        *("agent/move_queue.py:LOOK_S", "agent/locations.py:WATCH_S", "agent/vm_states.py:SWEEP_S"),
        *("agent/link.py:RETRY_FIRST_S", "agent/link.py:RETRY_LONGEST_S", "drivers/libvirt/connection.py:RETRY_S"),
        *("drivers/qemu/qmp.py:RECONNECT_DELAY_S", "drivers/qemu/qmp.py:RECONNECT_DELAY_MAX_S"),
        *("drivers/qemu/instance.py:CONSOLE_LOG_CHECK_S", "core/steered_end.py:LOOK_S", "agent/metrics.py:LAG_PROBE_S"),
        "agent/answer_gap.py:KEEP_WARM_S",
    },
    "a measurement: without it the report has no such figure": {
        *("agent/network_gap.py:FIRST_FRAME_S", "agent/answer_gap.py:ANSWER_S", "agent/answer_gap.py:CHECK_S"),
        *("drivers/flows.py:DUMP_TIMEOUT_S", "drivers/qemu/requests.py:LOOK_S", "drivers/probes.py:QUESTION_S"),
        *("drivers/qemu/dirty_rate.py:READ_TIMEOUT_S", "drivers/qemu/dirty_rate.py:FINE_S"),
    },
    "a moment for the last words of what has ended": {
        *("agent/open_moves.py:LAST_WORDS_S", "drivers/qemu/instance.py:LAST_EVENTS_S", "drivers/qemu/qmp.py:DYING_S"),
        *(
            "drivers/qemu/probe.py:DIES_S",
            "drivers/storage/qemu_img.py:DIES_S",
            "drivers/peer.py:CLOSE_S",
        ),
    },
    "a number of a rule, an estimate": {
        *("core/blackout.py:RATE_OVER_S", "core/blackout.py:PATIENCE_MIN_S", "core/progress.py:BLACKOUT_FIXED_S"),
        *("core/progress.py:CLEANUP_S", "core/progress.py:RATE_AFTER_S", "core/progress.py:NEAR_S"),
        "core/progress.py:IMMINENT_S",
        *("agent/bases.py:SETTLED_S", "drivers/qemu/send_queues.py:SHORT_FOR_S"),
        "drivers/qemu/starts.py:TURN_S",
        *("drivers/qemu/memory.py:QEMU_WINDOW_S", "agent/vm_states.py:PAUSE_MIN_S", "model.py:WAIT_MAX_S"),
        *("agent/move_queue.py:PROMISE_S", "agent/sharing.py:SHOWN_S"),
    },
    "the patience of an answer of the API, or of systemd": {
        *("agent/moves.py:CANCEL_WAIT_S", "agent/moves.py:RESOLVE_WAIT_S", "agent/assembly.py:STOP_S"),
    },
}
LITERALS = {
    "agent/vm_states.py": "changes are told again each second",
    "agent/runner.py": "the same",
    "drivers/database.py": "SQLite's own lock",
}
"""Files with a number where a wait stands, and why."""

MODULES = {str(path.relative_to(PACKAGE)): ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}
JUDGED = {name: module for name, module in MODULES.items() if not name.startswith(PATIENCE_OF_PEOPLE)}
WAIT = re.compile(r"_?[A-Z_0-9]*(_S|_SECONDS|TIMEOUT|DEADLINE)")


def _constants() -> set[str]:
    found = set()
    for name, module in JUDGED.items():
        for node in module.body:
            targets = node.targets if isinstance(node, ast.Assign) else []
            targets = [node.target] if isinstance(node, ast.AnnAssign) else targets
            for target in targets:
                if isinstance(target, ast.Name) and re.fullmatch(
                    r"_?[A-Z_0-9]*(_S|_SECONDS|TIMEOUT|DEADLINE)", target.id
                ):
                    found.add(f"{name}:{target.id}")
    return found


def test_each_wait_is_configuration_or_of_a_kind_that_is_none() -> None:
    left = {one for one in _constants() if not BY_NAME.search(one.partition(":")[2])}
    known = set().union(*KINDS.values())
    assert left - known == set(), "make it a key of [waits], or put it into a kind (ARCHITECTURE, Bounds)"
    assert known - left == set(), "these are gone: strike them out"


def test_no_wait_is_a_bare_number() -> None:
    """As the argument of something named timeout, or as one whose name says seconds."""
    found = []
    for name, module in JUDGED.items():
        for call in (node for node in ast.walk(module) if isinstance(node, ast.Call)):
            called = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
            waits = list(call.args) if called in ("timeout", "settimeout", "wait_for", "wait_gone") else []
            waits += [word.value for word in call.keywords if word.arg and word.arg in ("timeout", "timeout_s")]
            found += [f"{name}:{call.lineno}" for wait in waits if isinstance(wait, ast.Constant) and wait.value]
    assert {one.partition(":")[0] for one in found} == LITERALS.keys(), found


USED = {
    node.attr
    for name, module in MODULES.items()
    if name not in ("config.py", "core/bounds.py")
    for node in ast.walk(module)
    if isinstance(node, ast.Attribute)
}


def _keys() -> Iterator[tuple[str, str]]:
    tables = {"waits": config.Waits, "limits": config.Limits, "timeouts": config.Timeouts}
    for table, kind in tables.items():
        for key in kind.__struct_fields__:
            yield table, key
    yield from (("libvirt", key) for key in ("call_s", "look_s", "act_s"))


@pytest.mark.parametrize(("table", "key"), list(_keys()))
def test_each_bound_is_used(table: str, key: str) -> None:
    assert key in USED, f"{table}.{key} bounds nothing"


def _written(page: str) -> Config:
    """Return the configuration that a page of the manual shows with all defaults."""
    blocks = re.findall(r"```toml\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    return msgspec.convert(tomllib.loads(next(block for block in blocks if "_s = " in block)), Config)


def test_the_manual_has_all_defaults() -> None:
    text = (ROOT / "docs/manual.md").read_text() + (ROOT / "docs/libvirt.md").read_text()
    assert _written("docs/manual.md") == _written("docs/libvirt.md") == Config()
    for table, key in _keys():
        assert re.search(rf"^{key} = ", text, re.MULTILINE), f"{table}.{key} is not in the manual"
