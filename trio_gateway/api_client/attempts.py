"""Attempts: what a failed attempt means, and whether the call is tried again."""

import random
from typing import Any, Final, TypeVar

import httpx
import msgspec

from ..core.printable import printable
from .calls import Call
from .errors import CallFailed

T = TypeVar("T")

_AGAIN: Final = 2  # further attempts
_PAUSE: Final = 0.2  # seconds to the second attempt; the third comes after twice that
_MOST_PAUSE: Final = 2.0  # seconds; if the gateway wants more, the caller has to wait
# The request did not leave, or was not accepted.
_NOT_SENT: Final = (
    httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout, httpx.ProxyError,
    httpx.UnsupportedProtocol,
)  # fmt: skip
_TOO_MANY, _UNAVAILABLE = 429, 503  # the gateway did nothing; an order may have been given
_SERVER_ERRORS: Final = 500
_PROXY_ERRORS: Final = (502, 504)  # the gateway may have done it
_MOST_TEXT: Final = 300  # characters of the gateway's text


class Attempts:
    """The attempts of one call."""

    def __init__(self, call: Call[Any]) -> None:
        self._call = call
        self._made = 0
        self._in_doubt = False

    def pause_after(self, failed: CallFailed) -> float:
        """The seconds until the next attempt. Raises the failure if there is none."""
        self._in_doubt |= failed.in_doubt
        self._made += 1
        again = failed.status in (None, _TOO_MANY, _UNAVAILABLE, *_PROXY_ERRORS)
        pause = failed.retry_after or _PAUSE * self._made * random.uniform(0.5, 1)  # noqa: S311
        if (
            not again
            or (failed.in_doubt and not self._call.repeatable)
            or self._made > _AGAIN
            or pause > _MOST_PAUSE
        ):
            failed.in_doubt = self._in_doubt
            raise failed
        return pause


def read_answer(call: Call[T], response: httpx.Response) -> T:
    """What a call returns. Raises :exc:`CallFailed`."""
    status = response.status_code
    where = f"{response.request.url.netloc.decode()} {response.request.url.path}"
    if status == httpx.codes.OK:
        try:
            return call.read(response)
        except (ValueError, RecursionError):
            text = f"{where} sent an invalid answer: is there a gateway?"
            raise CallFailed(text, status=status, in_doubt=True) from None
    text = f"{where} answered with HTTP {status}"
    if reason := _reason(response):
        text = f"{text}: {reason}"
    raise CallFailed(
        text,
        status=status,
        retry_after=_retry_after(response),
        in_doubt=call.is_order if status == _UNAVAILABLE else status >= _SERVER_ERRORS,
    )


def not_answered(error: httpx.HTTPError, url: httpx.URL) -> CallFailed:
    """The failure of an attempt that brought no answer."""
    text = f"no answer from {url.netloc.decode()} {url.path}: {_cause(error)}"
    return CallFailed(text, in_doubt=not isinstance(error, _NOT_SENT))


def _cause(error: BaseException) -> str:
    """What an error says, or what has caused it if it says nothing."""
    name, cause = type(error).__name__, error
    while not str(cause) and (further := cause.__cause__ or cause.__context__) is not None:
        cause = further
    return printable(str(cause) or name)


class _Problem(msgspec.Struct):
    error: str


def _reason(response: httpx.Response) -> str:
    try:
        text = msgspec.json.decode(response.content, type=_Problem).error
    except (ValueError, RecursionError):
        return ""
    # Whatever answers there: the secret that it was sent is in no error.
    _, _, secret = response.request.headers.get("Authorization", "").partition(" ")
    return printable(text.replace(secret, "…") if secret else text)[:_MOST_TEXT]


def _retry_after(response: httpx.Response) -> float | None:
    try:
        return max(0.0, float(response.headers["Retry-After"]))
    except (KeyError, ValueError):  # a date is for browsers
        return None
