"""What an operator types or writes: agent.toml, settings, arguments, the environment. Taken, or refused by name."""

import contextlib
import io
import json
import os
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from hypothesis import given, settings
from hypothesis import strategies as st

from kvmhv import config
from kvmhv.cli import disk_spec, main, parameters
from kvmhv.errors import CallerError
from kvmhv.model import HostSettings
from tests.fuzz import garble

TOML = """
name = "host1"
listen = "[::]:6600"
advertise = "host1:6600"
switches = ["lan"]
metrics_subnets = ["10.0.0.0/8"]
migration_networks = ["10.1.0.0/24@5", "fd00::/64"]
migration_ports = [49152, 49215]
log_level = "debug"
[locations]
fast = "/srv/fast"
[limits]
qmp_timeout_s = 10
[timeouts]
grant_s = 15.0
[waits]
share_answer_s = 12
mount_s = 0.5
"""
SETTINGS = {
    "enabled": ("true", "no", "2"),
    "networks": ("10.0.0.0/24@3,fd00::/64", "10.0.0.1/24", "10.0.0.0/24@x"),
    "simultaneous": ("2", "-1", "1e3"),
    "threshold_bytes": ("1M", "1.5G", "٣M", "9" * 19),
    "profile": ("hyperv", "x"),
    "performance": ("smb", ""),
    "sources": ("10.0.0.0/8", "host"),
}
texts = st.one_of(st.sampled_from(garble.TEXTS), st.text(max_size=30))


@given(st.one_of(garble.spoilt(TOML.encode()), st.binary(max_size=100)))
@settings(max_examples=150)
def test_a_configuration_file_is_read_or_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "agent.toml"
    file.write_bytes(content)
    _taken(lambda: config.load(file), "config-invalid")


@given(garble.garbled(tomllib.loads(TOML)))
@settings(max_examples=150)
def test_each_value_of_the_configuration_is_taken_or_refused(data: Any) -> None:
    found = _taken(lambda: config.from_data(data, "agent.toml"), "config-invalid")
    if found is not None:
        assert config.split_address(found.listen)
        assert found.name


@given(st.data())
@settings(max_examples=150)
def test_settings_are_taken_or_refused(data: st.DataObject) -> None:
    keys = data.draw(st.lists(st.one_of(st.sampled_from(sorted(SETTINGS)), texts), max_size=3))
    changes = {
        f"migration.{key}": data.draw(st.one_of(st.sampled_from(SETTINGS.get(key, ("1",))), texts)) for key in keys
    }
    _taken(
        lambda: config.change_settings(HostSettings(), changes), "setting-invalid", "setting-unknown", "size-invalid"
    )


@given(st.one_of(texts, st.lists(st.sampled_from(("size=", "4G", ",", "lun=", "image=x", "1", "=", ",,")), max_size=6)))
@settings(max_examples=200)
def test_sizes_rates_and_disks_are_taken_or_refused(parts: Any) -> None:
    text = parts if isinstance(parts, str) else "".join(parts)
    for size in (config.parse_size, parameters.parse_rate):
        assert (_taken(lambda size=size: size(text), "size-invalid") or 0) >= 0
    _taken(lambda: disk_spec.parse(text), "disk-spec-invalid", "size-invalid")


def _taken(read: Callable[[], Any], *codes: str) -> Any:
    try:
        return read()
    except CallerError as error:
        assert error.code in codes
        assert error.message
        return None


# --- the command line

COMMANDS = (
    ("vm", "list"),
    ("vm", "show", "web01"),
    ("vm", "create", "web01", "--memory", "256M", "--disk", "size=4G", "--switch", "lan"),
    ("vm", "start", "web01"),
    ("vm", "stop", "web01", "--force"),
    ("vm", "remove", "web01"),
    ("vm", "move", "web01", "--to", "host2", "--include-storage", "--blackout-limit", "300"),
    ("vm", "move-storage", "web01", "--to", "fast"),
    ("move", "list"),
    ("move", "show", "m-1"),
    ("move", "resolve", "m-1", "--run-at", "source"),
    ("host", "show"),
    ("host", "set", "migration.enabled=true"),
    ("storage", "list"),
    ("image", "list"),
)
VARIABLES = ("KVMHV_TOKEN", "KVMHV_FINGERPRINT", "KVMHV_LAB", "COLUMNS", "NO_COLOR", "LANG")


@st.composite
def command_lines(draw: st.DrawFn) -> list[str]:
    """A command with some of its words replaced, left out, doubled or added to."""
    words = list(draw(st.sampled_from(COMMANDS)))
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(words)))
        act = draw(st.sampled_from(("replace", "leave out", "double", "add")))
        word = draw(
            st.one_of(texts, st.sampled_from(("--json", "--", "--help", "-h", "--no-such", "--to", "=", "--to=")))
        )
        if act == "add":
            words.insert(at, word)
        elif at < len(words):
            words[at : at + 1] = {"replace": [word], "leave out": [], "double": [words[at], words[at]]}[act]
    return words


@given(command_lines(), st.dictionaries(st.sampled_from(VARIABLES), texts, max_size=2))
@settings(max_examples=150)
def test_each_command_line_ends_with_a_known_status(
    tmp_path: Path, words: list[str], variables: dict[str, str]
) -> None:
    """No agent is there to answer: what could be asked ends with `agent-unreachable`."""
    variables = {name: text for name, text in variables.items() if "\0" not in text and _encodable(text)}
    quiet = {"KVMHV_SOCKET": str(tmp_path / "no.sock"), "KVMHV_HOST": "", "KVMHV_LAB": ""}
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.dict(os.environ, {**variables, **quiet}),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        status = main.main(["--json", *words])
    assert status in range(7), err.getvalue()
    if status and not err.getvalue().startswith("Usage:"):  # a group without a command shows its help
        told = json.loads(out.getvalue().splitlines()[-1])
        assert told["error"]["code"] != "internal", told


def _encodable(text: str) -> bool:
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        return False
    return True
