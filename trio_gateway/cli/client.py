"""A client of the gateway, for ``tail`` and ``demo``."""

import ssl
from collections.abc import Callable
from typing import Final, NoReturn
from urllib.parse import urlsplit

import trio
from trio_websocket import (
    ConnectionClosed,
    ConnectionRejected,
    ConnectionTimeout,
    HandshakeError,
    open_websocket_url,
)

from ..core.closing import Close

PING_EVERY: Final = 25.0  # seconds: the gateway wants a word from us every 60
CONNECT_TIMEOUT: Final = 5.0
_PONG: Final = '{"type":"pong"}'
_GOODBYE: Final = 0.1  # seconds: enough to say it

ADVICE: Final = {
    Close.GOING_AWAY: "the gateway is going down: connect again after that time",
    Close.POLICY_VIOLATION: "give an origin that stands in its ALLOWED_ORIGINS with --origin",
    Close.INTERNAL_ERROR: "a bug in the gateway: its log says more; try again later",
    Close.SERVER_OVERLOADED: "a limit is reached, or Redis is down: try again in a while",
    Close.AUTH_FAILED: "get a new token, signed with the secret of this gateway",
    Close.FORBIDDEN: "this token is not for this endpoint: take another --as or another token",
    Close.HEARTBEAT_TIMEOUT: "connect again",
    Close.SLOW_CONSUMER: "this side did not read fast enough: connect again",
    Close.RATE_LIMITED: "too many messages from this side: wait a little",
    Close.ABNORMAL: "the connection broke: is the gateway still there?",
}


class Closed(Exception):  # noqa: N818 - an outcome
    """The gateway closed the connection; the text has the code, its name and what to do."""

    def __init__(self, code: int, reason: str) -> None:
        try:
            close = Close(code)
            name, advice = f" {close.name}", ADVICE.get(close)
        except ValueError:
            name, advice = "", None
        text = f"closed by the gateway: {code}{name}"
        text += f" ({reason})" if reason else ""
        super().__init__(f"{text}: {advice}" if advice else text)
        self.code = code


class NoConnection(Exception):  # noqa: N818 - an outcome
    """There is no gateway to talk to; the text says why and what to do."""


async def listen(
    url: str,
    token: str,
    hear: Callable[[str], None],
    *,
    origin: str | None = None,
    admitted: Callable[[], None] = lambda: None,
) -> NoReturn:
    """Connect and call ``hear`` with every message, ``admitted`` once the gateway let us in.

    The token goes into a header. Raises :exc:`Closed` or :exc:`NoConnection`; when cancelled, it
    says goodbye first.
    """
    headers = [(b"Authorization", b"Bearer " + token.encode())]
    if origin is not None:
        headers.append((b"Origin", origin.encode()))
    try:
        async with open_websocket_url(
            url,
            extra_headers=headers,
            connect_timeout=CONNECT_TIMEOUT,
            disconnect_timeout=_GOODBYE,
        ) as client:
            next_ping = trio.current_time()
            is_admitted = False
            try:
                while True:
                    if trio.current_time() >= next_ping:
                        await client.send_message("ping")
                        next_ping = trio.current_time() + PING_EVERY
                    with trio.move_on_at(next_ping):
                        message = await client.get_message()
                        if message != _PONG:
                            hear(str(message))
                        elif not is_admitted:
                            is_admitted = True
                            admitted()
            finally:
                with trio.move_on_after(_GOODBYE, shield=True):
                    await client.aclose()
                # It leaves its socket open when the gateway closed first.
                await trio.aclose_forcefully(client._stream)
    except ConnectionClosed as closed:
        if closed.reason is None:
            raise Closed(Close.ABNORMAL, "") from None
        raise Closed(closed.reason.code, closed.reason.reason or "") from None
    except (HandshakeError, ssl.SSLError, trio.BrokenResourceError) as error:
        raise NoConnection(_why(url, error)) from None


def _why(url: str, error: Exception) -> str:
    where = urlsplit(url).netloc
    match error:
        case ConnectionRejected(status_code=503):
            return f"the gateway at {where} is going down (HTTP 503): try again in a while"
        case ConnectionRejected(status_code=status):
            return f"{where} answers with HTTP {status}: no gateway there, or under another path"
        case ConnectionTimeout():
            return f"no answer from {where} in {CONNECT_TIMEOUT:g} s: is that a gateway?"
    cause: BaseException | None = error
    while cause is not None and not (isinstance(cause, OSError) and cause.strerror):
        # Several addresses were tried, each with a failure of its own: the first will do.
        match cause:
            case BaseExceptionGroup(exceptions=(first, *_)):
                cause = first
            case _:
                cause = cause.__cause__
    match cause:
        case ConnectionRefusedError():
            return (
                f"nobody listens on {where}: start the gateway (trio-gateway serve),"
                " or say with --url where it is"
            )
        case ssl.SSLError():
            return f"no TLS with {where}: {cause.reason}"
        case OSError():
            return f"can't connect to {where}: {cause.strerror}"
    return f"can't connect to {where}: what answers there speaks no WebSocket"
