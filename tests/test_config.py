"""agent.toml and settings: strict, each error names the key."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmhv import config
from kvmhv.errors import CallerError
from kvmhv.model import MIB, HostSettings


def load(tmp_path: Path, text: str) -> config.Config:
    file = tmp_path / "agent.toml"
    file.write_text(text)
    return config.load(file)


def code(call: object, *arguments: object) -> tuple[str, str]:
    with pytest.raises(CallerError) as caught:
        call(*arguments)  # type: ignore[operator]
    return caught.value.code, caught.value.message


def test_the_defaults_suit_one_host() -> None:
    default = config.load(None)
    assert default.name
    assert default.advertise == f"{default.name}:6600"
    assert default.listen == "0.0.0.0:6600"
    assert default.socket_path == Path("/run/kvmhv/agent.sock")


def test_what_the_file_says(tmp_path: Path) -> None:
    read = load(
        tmp_path,
        'name = "host7"\nlisten = "10.0.0.7:6700"\nswitches = ["lan"]\n[limits]\nvms = 5\n[timeouts]\nundo_s = 9.5\n',
    )
    assert (read.name, read.advertise, read.switches) == ("host7", "host7:6700", ("lan",))
    assert (read.limits.vms, read.timeouts.undo_s) == (5, 9.5)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("nmae = 'x'", "nmae"),
        ("name = 5", "name"),
        ("listen = 'nowhere'", "nowhere"),
        ("listen = 'host:6600'", "host"),
        ("listen = '10.0.0.1:70000'", "no such port"),
        ("metrics_subnets = ['10.0.0.1/8']", "10.0.0.1/8"),
        ("migration_networks = ['10.0.0.0/24@high']", "10.0.0.0/24@high"),
        ("migration_ports = [100, 200]", "migration_ports"),
        ("migration_ports = [50000, 49999]", "migration_ports"),
        ("accel = 'xen'", "accel"),
        ("log_format = 'xml'", "log_format"),
        ("[limits]\nvms = 0", "vms"),
        ("[limits]\nvmss = 1", "vmss"),
        ("[timeouts]\nundo_s = 'long'", "undo_s"),
        ("[waits]\nmount_s = 0", "mount_s"),
        ("[waits]\nmount_s = 1e9", "mount_s"),
        ("[waits]\nmounts_s = 1", "mounts_s"),
        ("[libvirt]\ncall_s = -1", "call_s"),
        ("= broken", "agent.toml"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, named: str) -> None:
    found, message = code(load, tmp_path, text)
    assert found == "config-invalid"
    assert named in message


def test_a_file_that_is_not_there_or_no_text(tmp_path: Path) -> None:
    assert code(config.load, tmp_path / "none.toml")[0] == "config-invalid"
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    assert code(config.load, tmp_path / "binary.toml")[0] == "config-invalid"


@pytest.mark.parametrize(
    ("text", "expected"),
    [("host:1", ("host", 1)), ("[fd00::1]:6600", ("fd00::1", 6600)), ("10.0.0.1:0", ("10.0.0.1", 0))],
)
def test_addresses(text: str, expected: tuple[str, int]) -> None:
    assert config.split_address(text) == expected


@pytest.mark.parametrize("text", ["", "host", "host:", ":6600", "fd00::1:6600", "host:99999", "a b:1"])
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not host:port|no such port"):
        config.split_address(text)


@pytest.mark.parametrize(
    ("text", "size"),
    [("4096", 4096), ("64M", 64 * MIB), ("1.5G", 1536 * MIB), ("10TiB", 10 * 1024**4), (" 1 kb ", 1024), ("0", 0)],
)
def test_sizes(text: str, size: int) -> None:
    assert config.parse_size(text) == size


@given(st.text(max_size=30))
def test_any_text_is_a_size_or_a_clear_error(text: str) -> None:
    try:
        assert config.parse_size(text) >= 0
    except CallerError as error:
        assert error.code == "size-invalid"


@given(st.integers(0, 10**17))
def test_a_size_is_what_it_says_without_rounding(size: int) -> None:
    assert config.parse_size(str(size)) == size


def test_settings_change_all_or_none() -> None:
    old = HostSettings()
    new = config.change_settings(
        old,
        {
            "migration.enabled": "yes",
            "migration.moves_in": "5",
            "migration.networks": "10.0.0.0/24@50, 10.1.0.0/24",
            "migration.threshold_bytes": "8M",
        },
    )
    assert (new.enabled, new.moves_in, new.threshold_bytes) == (True, 5, 8 * MIB)
    assert new.networks == ("10.0.0.0/24@50", "10.1.0.0/24")
    assert config.change_settings(new, {"migration.networks": ""}).networks == ()
    assert old == HostSettings()


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("enabled", "yes", "setting-unknown"),
        ("migration.colour", "red", "setting-unknown"),
        ("migration.enabled", "perhaps", "setting-invalid"),
        ("migration.moves_in", "-1", "setting-invalid"),
        ("migration.moves_out", "101", "setting-invalid"),
        ("migration.moves_out", "two", "setting-invalid"),
        ("migration.networks", "10.0.0.1/24", "setting-invalid"),
        ("migration.sources", "host1", "setting-invalid"),
        ("migration.profile", "vmware", "setting-invalid"),
        ("migration.performance", "fastest", "setting-invalid"),
        ("migration.threshold_bytes", "some", "size-invalid"),
    ],
)
def test_settings_that_cannot_be(key: str, value: str, expected: str) -> None:
    assert code(config.change_settings, HostSettings(), {key: value})[0] == expected
