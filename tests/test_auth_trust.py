"""The agent's certificate and the pinned ones of other hosts."""

import ssl
from pathlib import Path

import pytest
from cryptography import x509

from kvmhv.drivers.auth import certificate
from kvmhv.drivers.auth.certificate import Identity
from kvmhv.drivers.auth.trust import Trust
from kvmhv.drivers.database import Database
from kvmhv.errors import CallerError, HostError, Refused


@pytest.fixture
def database(tmp_path: Path):  # type: ignore[no-untyped-def]
    opened = Database(tmp_path / "db", tmp_path / "run", 10)
    yield opened
    opened.close()


@pytest.fixture
def own(tmp_path: Path) -> Identity:
    return certificate.load_or_make(tmp_path / "own", "host1")


@pytest.fixture
def other(tmp_path: Path) -> Identity:
    return certificate.load_or_make(tmp_path / "other", "host2")


def test_the_certificate_is_for_the_host_and_vouches_for_nobody(own: Identity) -> None:
    made = x509.load_pem_x509_certificate(own.certificate_pem.encode())
    names = made.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["host1"]
    assert made.extensions.get_extension_for_class(x509.BasicConstraints).value.ca is False
    assert not made.extensions.get_extension_for_class(x509.KeyUsage).value.key_cert_sign


def test_the_identity_is_made_once_and_private(tmp_path: Path, own: Identity) -> None:
    assert certificate.load_or_make(tmp_path / "own", "host1") == own
    assert (tmp_path / "own").stat().st_mode & 0o777 == 0o700
    assert {file.stat().st_mode & 0o777 for file in (tmp_path / "own").iterdir()} == {0o600}


def test_a_damaged_identity_is_told_and_not_replaced(tmp_path: Path, own: Identity, other: Identity) -> None:
    own.key_file.write_bytes(other.key_file.read_bytes())
    with pytest.raises(HostError) as caught:
        certificate.load_or_make(tmp_path / "own", "host1")
    assert caught.value.code == "identity"
    own.certificate_file.write_text("nonsense")
    with pytest.raises(HostError):
        certificate.load_or_make(tmp_path / "own", "host1")
    assert own.certificate_file.read_text() == "nonsense"


def test_a_start_that_was_cut_off_is_made_good(tmp_path: Path, own: Identity) -> None:
    own.certificate_file.unlink()
    again = certificate.load_or_make(tmp_path / "own", "host1")
    assert again.fingerprint != own.fingerprint


@pytest.mark.parametrize("pem", ["", "nonsense", "x" * 10_000])
def test_what_is_no_certificate(database: Database, own: Identity, pem: str) -> None:
    trust = Trust(database, own, 10)
    with pytest.raises(CallerError) as caught:
        trust.add("host2", "host2:1", pem)
    assert caught.value.code == "certificate-invalid"
    assert trust.list() == ()


def test_two_certificates_are_none(database: Database, own: Identity, other: Identity) -> None:
    with pytest.raises(CallerError):
        Trust(database, own, 10).add("host2", "host2:1", other.certificate_pem + own.certificate_pem)


def test_text_around_the_certificate_is_dropped(database: Database, own: Identity, other: Identity) -> None:
    trust = Trust(database, own, 10)
    added = trust.add("host2", "host2:1", f"hello\n{other.certificate_pem}\nworld\n")
    assert added.fingerprint == other.fingerprint
    assert b"hello" not in dict(database.all("trust"))["host2"]


def test_trust_survives_and_is_found_by_name_address_and_certificate(
    database: Database, own: Identity, other: Identity
) -> None:
    Trust(database, own, 10).add("host2", "10.0.0.2:6600", other.certificate_pem)
    trust = Trust(database, own, 10)
    (host,) = trust.list()
    assert trust.find("host2") == trust.find("10.0.0.2:6600") == trust.host_of(other.fingerprint) == host
    assert trust.find("host3") is None and trust.host_of(own.fingerprint) is None
    before = trust.server_context()
    trust.remove("host2")
    assert trust.server_context() is not before
    assert trust.list() == Trust(database, own, 10).list() == ()
    with pytest.raises(CallerError):
        trust.remove("host2")
    with pytest.raises(CallerError):
        trust.client_context(host)


def test_names_that_are_taken(database: Database, own: Identity, other: Identity, tmp_path: Path) -> None:
    third = certificate.load_or_make(tmp_path / "third", "host2")
    trust = Trust(database, own, 10)
    trust.add("host2", "host2:1", other.certificate_pem)
    for name, pem, code in (
        ("host1", other.certificate_pem, "trust-name-taken"),
        ("host9", own.certificate_pem, "trust-name-taken"),
        ("host2", third.certificate_pem, "trust-name-taken"),
        ("host9", other.certificate_pem, "trust-host-known"),
    ):
        with pytest.raises(CallerError) as caught:
            trust.add(name, "x:1", pem)
        assert (caught.value.code, caught.value.http_status) == (code, 409)
    assert [host.address for host in trust.list()] == ["host2:1"]


def test_the_number_of_hosts_is_bounded(database: Database, own: Identity, other: Identity, tmp_path: Path) -> None:
    trust = Trust(database, own, 1)
    trust.add("host2", "host2:1", other.certificate_pem)
    trust.add("host2", "host2:2", other.certificate_pem)
    third = certificate.load_or_make(tmp_path / "third", "host3")
    with pytest.raises(Refused, match="1 hosts"):
        trust.add("host3", "host3:1", third.certificate_pem)


def test_the_contexts_take_tls_1_3_only(database: Database, own: Identity, other: Identity) -> None:
    trust = Trust(database, own, 10)
    host = trust.add("host2", "host2:1", other.certificate_pem)
    contexts = (trust.server_context(), trust.client_context(host), trust.introduction_context(other.fingerprint))
    assert {context.minimum_version for context in contexts} == {ssl.TLSVersion.TLSv1_3}
    assert trust.server_context().num_tickets == 0
    assert trust.client_context(host).verify_mode is ssl.CERT_REQUIRED
