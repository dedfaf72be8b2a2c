"""The policy: what comes after each way that a connection can end. Decides, does nothing."""

from email.utils import parsedate_to_datetime
from enum import Enum, auto
from typing import Final

from ..core.close_codes import Close


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
_LONGEST_HINT: Final = 3600.0  # seconds of a Retry-After that are believed


def after_close(code: int) -> Next:
    """After a close code; 1006 is a connection that broke, or was never made."""
    return _AFTER_CLOSE.get(code, Next.BACK_OFF)  # type: ignore[call-overload, no-any-return]


def after_status(status: int) -> Next:
    """After an HTTP status instead of an upgrade: proxies say 502, a gateway that drains 503.

    A 401 comes from a proxy that checks the credential itself.
    """
    if status == 401:
        return Next.RENEW
    return Next.BACK_OFF if status >= 500 or status in _PASSING else Next.STOP


def retry_after(value: str, date: str) -> float | None:
    """The seconds of an HTTP ``Retry-After`` (RFC 9110, 10.2.3); None if it says nothing of use.

    A time of day is compared with the ``Date`` of the same answer: this device's clock may be
    wrong.
    """
    if value.isascii() and value.isdigit():
        seconds = float(value[:9])
    else:
        try:
            then, now = parsedate_to_datetime(value), parsedate_to_datetime(date)
            seconds = (then - now).total_seconds()
        except (TypeError, ValueError):
            return None
    return min(max(0.0, seconds), _LONGEST_HINT)
