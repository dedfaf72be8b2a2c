"""The policy: what to do after a connection has ended, by close code or HTTP status."""

from email.utils import parsedate_to_datetime
from enum import Enum, auto
from typing import Final

from ..core.close_codes import Close


class Next(Enum):
    """What to do after a connection has ended."""

    BACK_OFF = auto()  # reconnect, after a random time that grows
    COOL_DOWN = auto()  # reconnect, after a longer time
    RENEW = auto()  # reconnect with another token
    STOP = auto()  # reconnecting would end in the same way


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
_TEMPORARY: Final = frozenset({408, 425, 429})  # temporary HTTP statuses below 500
_MAX_RETRY_AFTER: Final = 3600.0  # seconds; a longer Retry-After is reduced to this


def after_close(code: int) -> Next:
    """What to do after a close code; 1006 means that the connection broke or failed."""
    return _AFTER_CLOSE.get(code, Next.BACK_OFF)  # type: ignore[call-overload, no-any-return]


def after_status(status: int) -> Next:
    """What to do after an HTTP status: proxies send 502, a draining gateway sends 503.

    A 401 comes from a proxy that checks the credential itself.
    """
    if status == 401:
        return Next.RENEW
    return Next.BACK_OFF if status >= 500 or status in _TEMPORARY else Next.STOP


def retry_after(value: str, date: str) -> float | None:
    """Read an HTTP ``Retry-After`` (RFC 9110, 10.2.3), in seconds; None if it is invalid.

    A date is compared with the ``Date`` header of the same response, because this device's clock
    may be wrong.
    """
    if value.isascii() and value.isdigit():
        seconds = float(value[:9])
    else:
        try:
            then, now = parsedate_to_datetime(value), parsedate_to_datetime(date)
            seconds = (then - now).total_seconds()
        except (TypeError, ValueError):
            return None
    return min(max(0.0, seconds), _MAX_RETRY_AFTER)
