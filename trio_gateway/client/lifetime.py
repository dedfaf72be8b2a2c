"""How long a token still lives. The clock of this device may be wrong: it alone never decides."""

from typing import Final

from ..core.tokens import claims_of

RENEW_AT: Final = 0.8  # of what is left of a token's life
SUPPOSED_LIFE: Final = 75.0  # seconds, of a token that seems expired and has no iat
UNSURE: Final = 660.0  # seconds that a clock may be behind, until something has shown how far it is
_SHORT: Final = 60.0  # what is left beyond that must be at least this, or the margin is not used


class Lifetime:
    """Computes what is left of a token's life, and learns from tokens how late the clock is."""

    def __init__(self) -> None:
        self._behind: float | None = None  # seconds; None: nothing has shown it

    def left(self, token: str, expires_at: float, now: float) -> float:
        """Seconds until a token that the gateway has just accepted expires, rather too few.

        ``now`` is this device's clock, which is used as far as the token does not contradict it:
        a token was not issued in the future, and an accepted one has not expired.
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
        if self._behind is None and left > UNSURE + _SHORT:
            return min(left, (left - UNSURE) / RENEW_AT)
        return left

    def expired(self, expires_at: float, now: float) -> None:
        """The gateway has said that a connection's token expires now."""
        self._behind = expires_at - now


def claimed(token: str, name: str) -> float | None:
    """A number that a JWT claims, not verified; None if it does not."""
    value = (claims_of(token) or {}).get(name)
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def expiry(token: str) -> float | None:
    """When a JWT says that it ends, unix time; not verified."""
    return claimed(token, "exp")
