"""Bearer tokens for people and programs that reach the REST API over the network.

Only a token's SHA-256 is kept; a token has 256 random bits, so a slow hash would add nothing.
"""

import hashlib
import hmac
import re
import secrets

import msgspec

from kvmhv.errors import CallerError, Refused
from kvmhv.model import VM_NAME_PATTERN, Struct
from kvmhv.ports import Clock, Records

KIND = "token"
PREFIX = "kvmhv_"
TOKEN_MAX_CHARACTERS = 128


class TokenRecord(Struct, frozen=True, kw_only=True):
    """A token as it is kept."""

    name: str
    sha256: str
    created_at: float
    """UNIX time, for people."""


class Tokens:
    """The bearer tokens of this host."""

    def __init__(self, records: Records, clock: Clock, tokens_max: int) -> None:
        self._records = records
        self._clock = clock
        self._tokens_max = tokens_max
        self._known = {name: msgspec.json.decode(value, type=TokenRecord) for name, value in records.all(KIND)}

    def create(self, name: str) -> str:
        """Make a token and return it, this once only.

        Raises CallerError `name-invalid`, `token-exists`, Refused `token-limit`.
        """
        if re.match(VM_NAME_PATTERN, name) is None:
            raise CallerError("name-invalid", f"{name!r} is no name for a token", "use letters, digits, `.`, `_`, `-`")
        if name in self._known:
            raise CallerError(
                "token-exists", f"there is a token {name!r}", "revoke it first, or take another name", http_status=409
            )
        if len(self._known) >= self._tokens_max:
            raise Refused("token-limit", f"there are {self._tokens_max} tokens already", "revoke one", http_status=429)
        token = PREFIX + secrets.token_urlsafe(32)
        record = TokenRecord(name=name, sha256=_digest(token), created_at=self._clock.wall_s())
        self._records.put(KIND, name, msgspec.json.encode(record))
        self._known[name] = record
        return token

    def list(self) -> tuple[TokenRecord, ...]:
        """Return all tokens by name (never the token itself)."""
        return tuple(self._known[name] for name in sorted(self._known))

    def revoke(self, name: str) -> None:
        """End a token at once. Raises CallerError `token-unknown`."""
        if name not in self._known:
            raise CallerError("token-unknown", f"there is no token {name!r}", "see the list", http_status=404)
        self._records.delete(KIND, name)
        del self._known[name]

    def name_of(self, token: str) -> str | None:
        """Return the name of a valid token, None for anything else; takes the same time for every wrong one."""
        if len(token) > TOKEN_MAX_CHARACTERS:
            return None
        digest = _digest(token)
        found = None
        for record in self._known.values():
            if hmac.compare_digest(record.sha256, digest):
                found = record.name
        return found


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).hexdigest()
