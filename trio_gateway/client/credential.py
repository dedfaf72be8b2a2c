"""The credential: a token, where to get the next one, and which one was refused."""

import time
from inspect import isawaitable
from typing import Final

import trio

from ..core.close_codes import Close
from .lifetime import RENEW_AT, Lifetime, claimed, expiry
from .values import TokenProvider

_SELDOM: Final = 0.1  # of a token's whole life, at least, between two renewals
_SELDOM_UNKNOWN: Final = 10.0  # seconds: the same if the token has no iat
_OVERDUE: Final = 30.0  # seconds until the provider is asked again, past the supposed expiry


class NoToken(Exception):  # noqa: N818 - an outcome
    """There is no token to connect with; ``code`` is that of the refusal."""

    def __init__(self, why: str, code: int = Close.AUTH_FAILED) -> None:
        super().__init__(why)
        self.code = code


class Credential:
    """The credential of one client. None of its texts holds a token.

    A token counts as refused only if it was presented and the refusal was certainly about it. While
    a renewal is not answered, a refusal may be about the present token or the offered one: the
    provider is then asked again, and whichever token it returns is presented.
    """

    def __init__(self, given: str | TokenProvider) -> None:
        self._given = given
        self._offered = ""  # for a renewal that is not answered yet
        self._refused = ""
        self._unwanted = False  # a token was refused since the last one that was accepted
        self._why, self._code = "", int(Close.AUTH_FAILED)
        self._lifetime = Lifetime()
        self._ends = 0.0  # Trio's time
        self._expires_at: float | None = None  # unix time, by the gateway's clock
        self.token = ""
        self.renew_at: float | None = None  # Trio's time; None: never

    async def get(self) -> None:
        """Get a token to connect with; raises :exc:`NoToken`, and whatever the provider raises."""
        self._offered = ""
        token = await self._ask(refused=self._unwanted)
        if not token:
            raise NoToken("no token")
        if token == self._refused:
            raise NoToken(self._why, self._code)
        if not (token.isascii() and token.isprintable() and " " not in token):
            raise NoToken("a token that no header can hold")
        self.token, self._expires_at, self.renew_at = token, expiry(token), None

    async def offer(self) -> str | None:
        """Get another token for a renewal, or None; raises whatever the provider raises."""
        token = await self._ask(refused=False)
        if not token or token == self.token:
            return None
        self._offered = token
        return token

    def held(self) -> None:
        """The gateway has admitted us with the present token."""
        self._refused, self._unwanted = "", False
        self._plan()

    def renewed(self, expires_at: float) -> None:
        """The gateway has accepted the offered token."""
        if not self._offered:
            return  # a duplicate reply
        self.token, self._offered, self._expires_at = self._offered, "", expires_at
        self._plan(seldom=True)

    def postpone(self) -> None:
        """Plan the next attempt: no renewal has succeeded yet, and the present token is valid."""
        now = trio.current_time()
        left = self._ends - now
        self.renew_at = now + (max(1.0, RENEW_AT * left) if left > 0 else _OVERDUE)

    def refused(self, code: int, why: str) -> None:
        """The gateway, or a proxy, has refused a token."""
        self._unwanted, self._why, self._code = True, why, code
        self._refused = "" if self._offered else self.token
        held = self.renew_at is not None and self._expires_at is not None
        if held and not self._offered and "expired" in why:
            assert self._expires_at is not None
            self._lifetime.expired(self._expires_at, time.time())

    def _plan(self, *, seldom: bool = False) -> None:
        """Plan the renewal. If a new token seems to have expired, the clock is wrong."""
        if isinstance(self._given, str) or self._expires_at is None:
            return
        now = trio.current_time()
        left = self._lifetime.left(self.token, self._expires_at, time.time())
        issued_at = claimed(self.token, "iat")
        least = 1.0
        if seldom and issued_at is None:
            least = _SELDOM_UNKNOWN
        elif seldom and issued_at is not None:
            least = max(1.0, _SELDOM * (self._expires_at - issued_at))
        self._ends = now + left
        self.renew_at = now + max(least, RENEW_AT * left)

    async def _ask(self, *, refused: bool) -> str:
        if isinstance(self._given, str):
            return self._given
        given = self._given(refused)
        return await given if isawaitable(given) else given
