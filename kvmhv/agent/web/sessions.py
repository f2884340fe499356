"""The live page's cookie: who has shown a token once is known for half a day, until the token is revoked.

Nothing is kept: the cookie names the token and the time it ends, sealed with what is stored of that token. So it
outlives a restart of the agent and dies with the token, and opens the page but not the API.
"""

import hashlib
import hmac

from kvmhv.drivers.auth.tokens import Tokens
from kvmhv.ports import Clock

COOKIE = "kvmhv_page"
LASTS_S = 12 * 3600
COOKIE_MAX_CHARACTERS = 256


class Sessions:
    """Makes and reads the cookie's value."""

    def __init__(self, tokens: Tokens, clock: Clock) -> None:
        self._tokens = tokens
        self._clock = clock

    def open(self, token: str) -> str | None:
        """Return the cookie's value for who shows this token; None for a token that is not valid."""
        name = self._tokens.name_of(token)
        if name is None:
            return None
        ends_s = int(self._clock.wall_s()) + LASTS_S
        seal = self._seal(name, ends_s)
        return None if seal is None else f"{name}:{ends_s}:{seal}"

    def name_of(self, value: str) -> str | None:
        """Return the token's name of a valid cookie, None for anything else."""
        if len(value) > COOKIE_MAX_CHARACTERS or not value.isascii():
            return None
        name, _, rest = value.partition(":")
        ends, _, seal = rest.partition(":")
        if not ends.isdigit() or int(ends) <= self._clock.wall_s():
            return None
        right = self._seal(name, int(ends))
        return name if right is not None and hmac.compare_digest(seal, right) else None

    def _seal(self, name: str, ends_s: int) -> str | None:
        for record in self._tokens.list():
            if record.name == name:
                key = hashlib.sha256(f"page {record.sha256}".encode()).digest()
                return hmac.new(key, f"{name}:{ends_s}".encode(), hashlib.sha256).hexdigest()
        return None
