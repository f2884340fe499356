"""Invitations: how two hosts come to trust each other with one line of text.

The code names the inviting host, its address, its certificate's fingerprint and a secret of 192 bits. The joining host
connects, checks the fingerprint, and proves that it knows the secret with an HMAC over both certificates, its name and
its address, so nobody in between can put another certificate in. The secret itself never travels. It works once.
"""

import base64
import binascii
import hashlib
import hmac
import re
import secrets

import msgspec

from kvmhv.errors import CallerError, Refused
from kvmhv.model import VM_NAME_PATTERN
from kvmhv.ports import Clock

LIFETIME_MS = 15 * 60 * 1000.0
OPEN_MAX = 16
CODE_MAX_CHARACTERS = 512

_CODE = re.compile(
    r"(?P<name>[A-Za-z0-9._-]{1,63})@(?P<address>[A-Za-z0-9._:\[\]-]{3,300})/"
    r"(?P<fingerprint>[A-Za-z0-9_-]{43})/(?P<secret>[A-Za-z0-9_-]{32})"
)


class Invitation(msgspec.Struct, frozen=True, kw_only=True):
    """What an invitation's code says."""

    name: str
    address: str
    fingerprint: str
    """SHA-256 of the inviting host's certificate, hex."""
    secret: bytes

    def code(self) -> str:
        """Return it as one line: `name@host:port/fingerprint/secret`."""
        fingerprint = _text(bytes.fromhex(self.fingerprint))
        return f"{self.name}@{self.address}/{fingerprint}/{_text(self.secret)}"


def parse_code(code: str) -> Invitation:
    """Read a code. Raises CallerError `code-invalid`."""
    match = _CODE.fullmatch(code.strip()) if len(code) <= CODE_MAX_CHARACTERS else None
    if match is None or re.match(VM_NAME_PATTERN, match["name"]) is None:
        raise _code_invalid()
    try:
        return Invitation(
            name=match["name"],
            address=match["address"],
            fingerprint=_octets(match["fingerprint"]).hex(),
            secret=_octets(match["secret"]),
        )
    except binascii.Error as error:
        raise _code_invalid() from error


def proof(secret: bytes, host_fingerprint: str, guest_fingerprint: str, name: str, address: str) -> str:
    """Return the HMAC-SHA-256 (hex) that shows the secret and ties it to both certificates, name and address."""
    message = msgspec.json.encode(["kvmhv-join-1", host_fingerprint, guest_fingerprint, name, address])
    return hmac.new(secret, message, hashlib.sha256).hexdigest()


class Invitations:
    """The open invitations of this host. In memory only: a restart of the agent ends them."""

    def __init__(self, name: str, fingerprint: str, clock: Clock) -> None:
        self._name = name
        self._fingerprint = fingerprint
        self._clock = clock
        self._open: dict[bytes, float] = {}

    def invite(self, address: str) -> Invitation:
        """Open an invitation for 15 minutes. Raises Refused `invite-limit` when too many are open."""
        self._expire()
        if len(self._open) >= OPEN_MAX:
            raise Refused(
                "invite-limit",
                f"{OPEN_MAX} invitations are open already",
                "use one of them, or wait: each ends after 15 minutes",
                host=self._name,
                http_status=429,
            )
        secret = secrets.token_bytes(24)
        self._open[secret] = self._clock.monotonic_ms() + LIFETIME_MS
        return Invitation(name=self._name, address=address, fingerprint=self._fingerprint, secret=secret)

    def match(self, shown_proof: str, guest_fingerprint: str, name: str, address: str) -> bytes:
        """Return the secret of the open invitation that the proof was made with.

        Raises Refused `invite-unknown`: wrong, used, or older than 15 minutes.
        """
        self._expire()
        for secret in self._open:
            expected = proof(secret, self._fingerprint, guest_fingerprint, name, address)
            if hmac.compare_digest(expected.encode(), shown_proof.encode()):
                return secret
        raise Refused(
            "invite-unknown",
            f"{self._name} has no such invitation open: it was used, is older than 15 minutes, or its agent restarted",
            f"make a new one with `kvmhv host trust invite` on {self._name}",
            host=self._name,
        )

    def use_up(self, secret: bytes) -> None:
        """End an invitation: it has done its work."""
        self._open.pop(secret, None)

    def _expire(self) -> None:
        now_ms = self._clock.monotonic_ms()
        self._open = {secret: ends_ms for secret, ends_ms in self._open.items() if ends_ms > now_ms}


def _code_invalid() -> CallerError:
    return CallerError(
        "code-invalid", "this is no invitation", "copy the whole line that `kvmhv host trust invite` printed"
    )


def _text(octets: bytes) -> str:
    return base64.urlsafe_b64encode(octets).rstrip(b"=").decode()


def _octets(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
