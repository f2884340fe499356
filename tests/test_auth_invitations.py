"""Invitations: the code, the proof, once and for 15 minutes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmhv.drivers.auth.invitations import LIFETIME_MS, OPEN_MAX, Invitations, parse_code, proof
from kvmhv.errors import CallerError, Refused

OWN, OTHER, THIRD = "aa" * 32, "bb" * 32, "cc" * 32


class Clock:
    now_ms = 0.0

    def monotonic_ms(self) -> float:
        return self.now_ms

    def wall_s(self) -> float:
        return 0.0


@pytest.mark.parametrize("address", ["host1:6600", "10.0.0.1:6600", "[fd00::1]:6600"])
def test_the_code_is_one_line_and_reads_back(address: str) -> None:
    invitation = Invitations("host1", OWN, Clock()).invite(address)
    code = invitation.code()
    assert len(code.splitlines()) == 1 and " " not in code
    assert parse_code(f" {code}\n") == invitation
    assert (invitation.name, invitation.address, invitation.fingerprint) == ("host1", address, OWN)


@given(st.text(max_size=600))
def test_anything_else_is_no_code(text: str) -> None:
    with pytest.raises(CallerError) as caught:
        parse_code(text)
    assert caught.value.code == "code-invalid"


def test_the_proof_opens_once() -> None:
    open_ones = Invitations("host1", OWN, Clock())
    secret = open_ones.invite("host1:1").secret
    shown = proof(secret, OWN, OTHER, "host2", "host2:1")
    assert open_ones.match(shown, OTHER, "host2", "host2:1") == secret
    open_ones.use_up(secret)
    with pytest.raises(Refused):
        open_ones.match(shown, OTHER, "host2", "host2:1")


@pytest.mark.parametrize(
    ("fingerprint", "name", "address"),
    [(THIRD, "host2", "host2:1"), (OTHER, "host3", "host2:1"), (OTHER, "host2", "evil:1")],
)
def test_the_proof_is_bound_to_everything(fingerprint: str, name: str, address: str) -> None:
    open_ones = Invitations("host1", OWN, Clock())
    shown = proof(open_ones.invite("host1:1").secret, OWN, OTHER, "host2", "host2:1")
    with pytest.raises(Refused):
        open_ones.match(shown, fingerprint, name, address)


def test_a_proof_for_another_inviting_host_is_none() -> None:
    open_ones = Invitations("host1", OWN, Clock())
    shown = proof(open_ones.invite("host1:1").secret, THIRD, OTHER, "host2", "host2:1")
    with pytest.raises(Refused):
        open_ones.match(shown, OTHER, "host2", "host2:1")


def test_it_ends_after_its_time_and_the_open_ones_are_bounded() -> None:
    clock = Clock()
    open_ones = Invitations("host1", OWN, clock)
    secrets = {open_ones.invite("host1:1").secret for _ in range(OPEN_MAX)}
    assert len(secrets) == OPEN_MAX
    with pytest.raises(Refused) as caught:
        open_ones.invite("host1:1")
    assert caught.value.http_status == 429
    clock.now_ms = LIFETIME_MS - 1
    shown = proof(next(iter(secrets)), OWN, OTHER, "host2", "host2:1")
    assert open_ones.match(shown, OTHER, "host2", "host2:1") in secrets
    clock.now_ms = LIFETIME_MS
    with pytest.raises(Refused):
        open_ones.match(shown, OTHER, "host2", "host2:1")
    open_ones.invite("host1:1")


def test_a_proof_with_strange_characters_is_wrong_and_no_crash() -> None:
    open_ones = Invitations("host1", OWN, Clock())
    open_ones.invite("host1:1")
    with pytest.raises(Refused):
        open_ones.match("ünïcode", OTHER, "host2", "host2:1")
