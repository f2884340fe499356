"""The host's settings: initial values, changes, and what survives."""

import msgspec
import pytest

from kvmhv.agent.settings import KEY, KIND, Settings, rule_of
from kvmhv.config import Config
from kvmhv.errors import CallerError
from kvmhv.model import MoveRequest


class Records:
    def __init__(self) -> None:
        self.kept: dict[tuple[str, str], bytes] = {}

    def put(self, kind: str, key: str, value: bytes) -> None:
        self.kept[kind, key] = value

    def get(self, kind: str, key: str) -> bytes | None:
        return self.kept.get((kind, key))

    def all(self, kind: str) -> tuple[tuple[str, bytes], ...]:
        return tuple((key, value) for (known, key), value in self.kept.items() if known == kind)

    def delete(self, kind: str, key: str) -> None:
        self.kept.pop((kind, key), None)


def test_the_configuration_gives_the_first_networks_only() -> None:
    records = Records()
    settings = Settings(records, Config(name="h", migration_networks=("10.0.0.0/24@5",)))
    assert settings.current.networks == ("10.0.0.0/24@5",)
    settings.change({"migration.networks": ""})
    assert Settings(records, Config(name="h", migration_networks=("10.0.0.0/24@5",))).current.networks == ()


def test_changes_survive() -> None:
    records = Records()
    settings = Settings(records, Config(name="h"))
    settings.change({"migration.enabled": "yes", "migration.threshold_bytes": "8M"})
    again = Settings(records, Config(name="h"))
    assert again.current == settings.current
    assert again.shown()["migration.enabled"] is True
    assert again.shown()["migration.threshold_bytes"] == 8 << 20


def test_a_bad_change_changes_nothing() -> None:
    records = Records()
    settings = Settings(records, Config(name="h"))
    before = settings.current
    for changes in (
        {"migration.enabled": "true", "migration.unknown": "1"},
        {"migration.enabled": "true", "migration.moves_in": "101"},
        {"enabled": "true"},
    ):
        with pytest.raises(CallerError):
            settings.change(changes)
    assert settings.current == before
    assert records.kept == {}


def test_settings_that_a_newer_version_wrote_are_read() -> None:
    records = Records()
    records.put(KIND, KEY, msgspec.json.encode({"enabled": True, "moves_out": 5, "warp": 9}))
    settings = Settings(records, Config(name="h"))
    assert (settings.current.enabled, settings.current.moves_out, settings.current.moves_in) == (True, 5, 2)


def test_what_happens_over_a_limit_wants_a_limit() -> None:
    settings = Settings(Records(), Config(name="h"))
    asked = MoveRequest(vm="web01", target="b", on_overrun="throttle")
    with pytest.raises(CallerError, match="no limit"):
        rule_of(settings.current, asked)
    settings.change({"migration.blackout_limit_ms": "300"})
    rule = rule_of(settings.current, asked)
    assert (rule.blackout_limit_ms, rule.on_overrun) == (300, "throttle")
    with pytest.raises(CallerError, match="'wish'"):
        rule_of(settings.current, MoveRequest(vm="web01", target="b", on_overrun="wish"))
    with pytest.raises(CallerError):
        settings.change({"migration.on_overrun": "wish"})
