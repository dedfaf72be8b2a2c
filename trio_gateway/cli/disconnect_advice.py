"""Texts for people: why a client is not connected, and what to do then."""

import ssl
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

import trio

from ..client import NoUpgrade
from ..core.close_codes import Close
from .url import no_listener

if TYPE_CHECKING:
    from ..client import Status

_ADVICE: Final = {
    Close.GOING_AWAY: "the gateway is shutting down: connect again after that time",
    Close.POLICY_VIOLATION: "pass an origin from its ALLOWED_ORIGINS with --origin",
    Close.INTERNAL_ERROR: "a bug in the gateway, see its log; try again later",
    Close.SERVER_OVERLOADED: "a limit is reached, or Redis is down: try again in a while",
    Close.AUTH_FAILED: "get a new token, signed with the secret of this gateway",
    Close.FORBIDDEN: "this token is not for this endpoint: use another --as or another token",
    Close.RATE_LIMITED: "too many messages or failed logins from this client: wait a minute",
}


def why(url: str, status: "Status") -> str:
    """Explain a client's status in one line."""
    where = urlsplit(url).netloc
    match status.error:
        case None:
            if status.code == Close.ABNORMAL:
                return f"the connection to {where} broke: is the gateway still there?"
            return _closed(status.code or 0, status.reason)
        case NoUpgrade(status=503):
            return f"the gateway at {where} is shutting down (HTTP 503): try again in a while"
        case NoUpgrade(status=int(code)):
            return f"{where} answers with HTTP {code}: there is no gateway, or it has another path"
        case NoUpgrade():
            return f"can't connect to {where}: the server does not speak WebSocket"
        case TimeoutError(strerror=None):
            return f"no answer from {where}: {status.reason}; is that a gateway?"
        case error:
            return _no_network(where, error)


def _closed(code: int, reason: str) -> str:
    try:
        close = Close(code)
        name, advice = f" {close.name}", _ADVICE.get(close)
    except ValueError:
        name, advice = "", None
    text = f"closed by the gateway: {code}{name}"
    text += f" ({reason})" if reason else ""
    return f"{text}: {advice}" if advice else text


def _no_network(where: str, error: Exception) -> str:
    cause: BaseException | None = error
    while cause is not None and not (isinstance(cause, OSError) and cause.strerror):
        # Several addresses were tried, each with its own error: report the first.
        match cause:
            case BaseExceptionGroup(exceptions=(first, *_)):
                cause = first
            case _:
                cause = cause.__cause__
    match cause:
        case ConnectionRefusedError():
            return no_listener(where)
        case ssl.SSLError():
            return f"no TLS with {where}: {cause.reason}"
        case OSError():
            return f"can't connect to {where}: {cause.strerror}"
    if isinstance(error, trio.BrokenResourceError):
        return f"can't connect to {where}: the connection broke"
    return f"can't connect to {where}: {type(error).__name__}"
