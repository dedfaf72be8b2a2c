"""How long a token remains valid. The clock of this device may be wrong."""

import base64
import json
from typing import Final

RENEW_AT: Final = 0.8  # of a token's remaining life
SUPPOSED_LIFE: Final = 75.0  # seconds, for a token that seems expired and has no iat
MARGIN: Final = 660.0  # seconds that the clock may be behind, while its error is unknown
_SHORT: Final = 60.0  # seconds; the margin is used only if more than MARGIN + _SHORT are left


class Lifetime:
    """Computes the remaining life of tokens, and how far this device's clock is behind."""

    def __init__(self) -> None:
        self._behind: float | None = None  # seconds; None: unknown

    def left(self, token: str, expires_at: float, now: float) -> float:
        """Return the seconds until a token that was just accepted expires, rather too few.

        ``expires_at`` and ``now`` are unix times; ``now`` is read from this device's clock. The
        clock is used unless the token contradicts it: no token was issued in the future, and an
        accepted token has not expired.
        """
        issued_at = claimed(token, "iat")
        whole = SUPPOSED_LIFE
        if issued_at is not None and issued_at < expires_at:
            whole = expires_at - issued_at
            self._behind = max(0.0 if self._behind is None else self._behind, issued_at - now)
        left = expires_at - now - (self._behind or 0.0)
        if left <= 0:  # the clock is ahead
            return whole
        if issued_at is not None:
            return min(left, whole)
        if self._behind is None and left > MARGIN + _SHORT:
            return min(left, (left - MARGIN) / RENEW_AT)
        return left

    def expired(self, expires_at: float, now: float) -> None:
        """Correct the clock: the gateway has said that a token has expired just now."""
        self._behind = expires_at - now


def claimed(token: str, name: str) -> float | None:
    """Return a numeric claim of a JWT, unverified; None if the token has no such claim."""
    _, *parts = token.split(".")
    if len(parts) != 2:
        return None
    try:
        claims = json.loads(base64.urlsafe_b64decode(parts[0] + "=" * (-len(parts[0]) % 4)))
    except (ValueError, RecursionError):
        return None
    value = claims.get(name) if isinstance(claims, dict) else None
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def expiry(token: str) -> float | None:
    """Return the expiry of a JWT as unix time, unverified; None if it has none."""
    return claimed(token, "exp")
