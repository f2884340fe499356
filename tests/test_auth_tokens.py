"""Bearer tokens: made once, kept as a hash, revoked at once."""

from pathlib import Path

import pytest

from kvmhv.drivers.auth.tokens import KIND, Tokens
from kvmhv.drivers.database import Database
from kvmhv.drivers.host import HostClock
from kvmhv.errors import CallerError, Refused


@pytest.fixture
def database(tmp_path: Path):  # type: ignore[no-untyped-def]
    opened = Database(tmp_path / "db", tmp_path / "run", 10)
    yield opened
    opened.close()


def test_a_token_opens_until_it_is_revoked(database: Database) -> None:
    tokens = Tokens(database, HostClock(), 10)
    token = tokens.create("ci")
    assert token.startswith("kvmhv_") and len(token) > 40
    assert tokens.name_of(token) == "ci"
    assert Tokens(database, HostClock(), 10).name_of(token) == "ci"
    assert all(token.encode() not in value for _, value in database.all(KIND))
    tokens.revoke("ci")
    assert tokens.name_of(token) is None
    assert tokens.list() == Tokens(database, HostClock(), 10).list() == ()


@pytest.mark.parametrize("wrong", ["", "kvmhv_", "x" * 10_000, "\udcff", "ü"])
def test_what_is_no_token_opens_nothing(database: Database, wrong: str) -> None:
    tokens = Tokens(database, HostClock(), 10)
    tokens.create("ci")
    assert tokens.name_of(wrong) is None


def test_names_and_limit(database: Database) -> None:
    tokens = Tokens(database, HostClock(), 2)
    tokens.create("a")
    for name, code in (("a", "token-exists"), ("two words", "name-invalid"), ("", "name-invalid")):
        with pytest.raises(CallerError) as caught:
            tokens.create(name)
        assert caught.value.code == code
    tokens.create("b")
    with pytest.raises(Refused, match="2 tokens"):
        tokens.create("c")
    with pytest.raises(CallerError):
        tokens.revoke("c")
