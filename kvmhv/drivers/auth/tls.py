"""TLS 1.3 contexts that accept exactly the pinned certificates.

A pinned self-signed certificate is OpenSSL's trust anchor, and an anchor could vouch for other certificates. So the
fingerprint of what the other side showed is checked too, as the last step of the handshake and before any byte of the
application goes either way.
"""

import ssl
from collections.abc import Callable
from typing import Any

from kvmhv.drivers.auth.certificate import Identity, fingerprint_of_der

Accepts = Callable[[str | None], bool]
"""Asked with the other side's fingerprint (None: it showed no certificate) when a handshake is complete."""


def server_context(identity: Identity, trusted_pems: tuple[str, ...], accepts: Accepts) -> ssl.SSLContext:
    """Context of the listener: a certificate is asked for; without one the routes decide by token."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.verify_mode = ssl.CERT_OPTIONAL
    # Without tickets every connection shows its certificate anew, so that a removed host cannot resume a session.
    context.num_tickets = 0
    _harden(context, identity, trusted_pems, accepts)
    return context


def client_context(identity: Identity, pinned_pem: str, accepts: Accepts) -> ssl.SSLContext:
    """Context for a connection to one trusted host, which must show exactly the pinned certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    # The pin says who it is; the address may be any name or number that leads there.
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    _harden(context, identity, (pinned_pem,), accepts)
    return context


def introduction_context(accepts: Accepts) -> ssl.SSLContext:
    """Context for hosts that do not know each other yet: this side shows no certificate, `accepts` checks theirs.

    There is no anchor to verify against: `accepts` must compare with a fingerprint that was got some other way.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    _harden(context, None, (), accepts)
    return context


def _harden(
    context: ssl.SSLContext, identity: Identity | None, trusted_pems: tuple[str, ...], accepts: Accepts
) -> None:
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    if identity is not None:
        context.load_cert_chain(identity.certificate_file, identity.key_file)
    if trusted_pems:
        context.load_verify_locations(cadata="".join(trusted_pems))
    context.sslobject_class = _pinned(accepts)


def _pinned(accepts: Accepts) -> type[ssl.SSLObject]:
    """Return an SSLObject whose handshake fails unless `accepts` says yes."""

    class PinnedObject(ssl.SSLObject):
        def do_handshake(self) -> None:
            super().do_handshake()
            der: Any = self.getpeercert(binary_form=True)
            if not accepts(fingerprint_of_der(der) if der else None):
                raise ssl.SSLCertVerificationError(1, "the certificate is not the pinned one")

    return PinnedObject
