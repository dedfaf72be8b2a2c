"""The policy: what comes after each way that a connection can end. Decides, does nothing."""

import re
from enum import Enum, auto
from typing import Final

from ..core.closing import Close
from ..core.tokens import claims_of


class Next(Enum):
    """What to do after a connection has ended."""

    BACK_OFF = auto()  # again, after a random time that grows
    COOL_DOWN = auto()  # again, in a while
    RENEW = auto()  # again, with another token
    STOP = auto()  # it would end like this again


_AFTER_CLOSE: Final = {
    Close.PROTOCOL_ERROR: Next.STOP,
    Close.UNSUPPORTED_DATA: Next.STOP,
    Close.INVALID_DATA: Next.STOP,
    Close.POLICY_VIOLATION: Next.STOP,
    Close.MESSAGE_TOO_BIG: Next.STOP,
    Close.FORBIDDEN: Next.STOP,
    Close.AUTH_FAILED: Next.RENEW,
    Close.RATE_LIMITED: Next.COOL_DOWN,
}
_PASSING: Final = frozenset({408, 425, 429})  # HTTP statuses below 500 that come and go
_HINT: Final = re.compile(r"\bretry in (\d+(?:\.\d+)?)s")
_SUPPOSED_LIFE: Final = 300.0  # seconds, of a token that seems expired and says nothing more


def after_close(code: int) -> Next:
    """After a close code; 1006 is a connection that broke, or was never made."""
    return _AFTER_CLOSE.get(code, Next.BACK_OFF)  # type: ignore[call-overload, no-any-return]


def after_status(status: int) -> Next:
    """After an HTTP status instead of an upgrade: proxies say 502, a gateway that drains 503."""
    return Next.BACK_OFF if status >= 500 or status in _PASSING else Next.STOP


def retry_hint(reason: str) -> float | None:
    """The seconds in a close reason's ``retry in 3.2s``."""
    found = _HINT.search(reason)
    return float(found[1]) if found else None


def expiry(token: str) -> float | None:
    """When a JWT says that it ends, unix time; not verified."""
    return _number(token, "exp")


def life_left(token: str, expires_at: float, now: float) -> float:
    """Seconds until then. A clock that is ahead finds every token expired: then it is the whole
    life that the token claims.
    """
    if (left := expires_at - now) > 0:
        return left
    expires, issued = _number(token, "exp"), _number(token, "iat")
    if expires is not None and issued is not None and expires > issued:
        return expires - issued
    return _SUPPOSED_LIFE


def _number(token: str, name: str) -> float | None:
    value = (claims_of(token) or {}).get(name)
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None
