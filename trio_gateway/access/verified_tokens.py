"""Verified tokens: what they say is remembered, so that a reconnect verifies no signature.

When many clients come back at once, they bring the tokens that they had. Whether a token is revoked
is not part of this: it is looked up each time.
"""

import hashlib
import secrets
from typing import Final, Generic, TypeVar

from ..core.tokens import Staff, Table

Verified = TypeVar("Verified", Staff, Table)

_MOST: Final = 10_000  # tokens; past it the one that was remembered first is forgotten
_DIGEST: Final = 16  # bytes; keyed, so nobody can look for two tokens with one hash


class VerifiedTokens(Generic[Verified]):
    """What valid tokens say, by a hash of the token. The tokens themselves are not kept."""

    def __init__(self, most: int = _MOST) -> None:
        self._most = most
        self._key = secrets.token_bytes(_DIGEST)
        self._found: dict[bytes, Verified] = {}
        self._keys: object = None
        self._now = float("-inf")

    def __len__(self) -> int:
        return len(self._found)

    def key_of(self, token: str) -> bytes:
        """Return the hash under which a token is remembered."""
        data = token.encode(errors="surrogatepass")
        return hashlib.blake2b(data, digest_size=_DIGEST, key=self._key).digest()

    def get(self, key: bytes, now: float, keys: object = None) -> Verified | None:
        """Return what a token says, if it was found valid before and still is.

        ``keys`` are those that count now: with others everything is forgotten. So it is when the
        clock was set back: ``nbf`` and ``iat`` may be in the future again.
        """
        if keys is not self._keys or now < self._now:
            self._found.clear()
            self._keys = keys
        self._now = now
        found = self._found.get(key)
        if found is not None and found.expires_at <= now:
            del self._found[key]
            return None
        return found

    def add(self, key: bytes, verified: Verified, keys: object = None) -> None:
        """Remember a token that was verified with these keys just now.

        Not if they have changed since the last :meth:`get`, which is soon followed by another.
        """
        if keys is not self._keys:
            return
        self._found[key] = verified
        if len(self._found) > self._most:
            del self._found[next(iter(self._found))]
