"""The agent's own key and certificate, made at its first start.

The certificate is self-signed: nobody vouches for it, other hosts pin its fingerprint (`trust.py`). Its validity says
nothing (it ends in the year 9999, which RFC 5280, 4.1.2.5, gives for "no end"), because trust ends when it is removed
and no decision may hang on a host's wall clock.
"""

import datetime
import hashlib
import os
import ssl
from pathlib import Path

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from kvmhv.errors import CallerError, HostError

CERTIFICATE_MAX_BYTES = 8192
"""Ours has about 700 bytes; a bigger one from another host is refused unread."""


class Identity(msgspec.Struct, frozen=True, kw_only=True):
    """A host's certificate and where its key lies."""

    name: str
    certificate_file: Path
    key_file: Path
    certificate_pem: str
    fingerprint: str
    """SHA-256 of the certificate (DER), hex."""


def load_or_make(directory: Path, name: str) -> Identity:
    """Return the identity kept in `directory`, made at the first call.

    Directory 0700, files 0600; both files appear complete or not at all. Raises HostError `identity`.
    """
    key_file = directory / "key.pem"
    certificate_file = directory / "certificate.pem"
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not certificate_file.exists():
            key_pem, certificate_pem = _make(name)
            _write_private(key_file, key_pem)
            _write_private(certificate_file, certificate_pem)
        pem = certificate_file.read_text()
        # Fails now, and not at the first connection, if the key is missing or another certificate's.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate_file, key_file)
        return Identity(
            name=name,
            certificate_file=certificate_file,
            key_file=key_file,
            certificate_pem=pem,
            fingerprint=fingerprint_of_pem(pem),
        )
    except (OSError, UnicodeDecodeError, CallerError) as error:
        raise HostError(
            "identity",
            f"{directory}: {error}",
            "mend the files, or remove the directory and make the trust with the other hosts anew",
        ) from error


def fingerprint_of_der(der: bytes) -> str:
    """SHA-256 of a certificate, hex: what trust is pinned to."""
    return hashlib.sha256(der).hexdigest()


def fingerprint_of_pem(pem: str) -> str:
    """SHA-256 of the one certificate in `pem`. Raises CallerError `certificate-invalid` for anything else."""
    if len(pem) > CERTIFICATE_MAX_BYTES:
        raise CallerError("certificate-invalid", f"a certificate has at most {CERTIFICATE_MAX_BYTES} bytes")
    try:
        (certificate,) = x509.load_pem_x509_certificates(pem.encode())
    except ValueError as error:
        raise CallerError("certificate-invalid", f"not one certificate in PEM: {error}") from error
    return fingerprint_of_der(certificate.public_bytes(serialization.Encoding.DER))


def normalized_pem(pem: str) -> str:
    """Return the one certificate in `pem` as it is written here, without whatever stood around it.

    Raises CallerError `certificate-invalid`.
    """
    fingerprint_of_pem(pem)
    return x509.load_pem_x509_certificate(pem.encode()).public_bytes(serialization.Encoding.PEM).decode()


def _make(name: str) -> tuple[bytes, bytes]:
    key = ec.generate_private_key(ec.SECP256R1())
    # A fresh random part in the subject: OpenSSL looks trust anchors up by subject, so that two certificates of one
    # host name (reinstalled) do not stand in each other's way.
    subject = x509.Name(
        [
            x509.NameAttribute(NameOID.COMMON_NAME, name[:64]),
            x509.NameAttribute(NameOID.SERIAL_NUMBER, os.urandom(8).hex()),
        ]
    )
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(datetime.datetime(2000, 1, 1, tzinfo=datetime.UTC))
        .not_valid_after(datetime.datetime(9999, 12, 31, 23, 59, 59, tzinfo=datetime.UTC))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_digital_signature_only(), critical=True)
        .sign(key, hashes.SHA256())
    )
    key_pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return key_pem, certificate.public_bytes(serialization.Encoding.PEM)


def _digital_signature_only() -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=False,
        crl_sign=False,
        encipher_only=False,
        decipher_only=False,
    )


def _write_private(file: Path, content: bytes) -> None:
    fresh = file.with_suffix(".new")
    fresh.unlink(missing_ok=True)
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    fresh.replace(file)
