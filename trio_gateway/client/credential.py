"""The credential: the present token, its renewal, and which token was refused."""

import time
from inspect import isawaitable
from typing import Final

import trio

from ..core.close_codes import Close
from .lifetime import RENEW_AT, Lifetime, claimed, expiry
from .values import TokenProvider

_MIN_INTERVAL: Final = 0.1  # of a token's whole life, between two renewals
_MIN_INTERVAL_UNKNOWN: Final = 10.0  # seconds, between two renewals if the token has no iat
_OVERDUE: Final = 30.0  # seconds until the next attempt, after the supposed expiry


class NoToken(Exception):  # noqa: N818 - an outcome
    """There is no token to connect with; ``code`` is that of the refusal."""

    def __init__(self, reason: str, code: int = Close.AUTH_FAILED) -> None:
        super().__init__(reason)
        self.code = code


class Credential:
    """The credential of one client. No text of this class contains a token.

    A token counts as refused only if it was presented and the refusal certainly concerned it. While
    a renewal has no answer, a refusal may concern the present token or the offered one. Then the
    provider is called again, and the token that it returns is presented.
    """

    def __init__(self, given: str | TokenProvider) -> None:
        self._given = given
        self._offered = ""  # for a renewal that has no answer yet
        self._refused = ""
        self._was_refused = False  # a token, since the last accepted one
        self._reason, self._code = "", int(Close.AUTH_FAILED)
        self._lifetime = Lifetime()
        self._ends = 0.0  # Trio's time
        self._expires_at: float | None = None  # unix time, by the gateway's clock
        self.token = ""
        self.renew_at: float | None = None  # Trio's time; None: never

    async def get(self) -> None:
        """Get a token to connect with; raises :exc:`NoToken`, and whatever the provider raises."""
        self._offered = ""
        token = await self._ask(refused=self._was_refused)
        if not token:
            raise NoToken("no token")
        if token == self._refused:
            raise NoToken(self._reason, self._code)
        if not (token.isascii() and token.isprintable() and " " not in token):
            raise NoToken("a token with characters that a header can't contain")
        self.token, self._expires_at, self.renew_at = token, expiry(token), None

    async def offer(self) -> str | None:
        """Get another token for a renewal, or None; raises whatever the provider raises."""
        token = await self._ask(refused=False)
        if not token or token == self.token:
            return None
        self._offered = token
        return token

    def admitted(self) -> None:
        """Note that the gateway has admitted this client with the present token."""
        self._refused, self._was_refused = "", False
        self._plan()

    def renewed(self, expires_at: float) -> None:
        """Note that the gateway has accepted the offered token."""
        if not self._offered:
            return  # a duplicate reply
        self.token, self._offered, self._expires_at = self._offered, "", expires_at
        self._plan(is_renewal=True)

    def postpone(self) -> None:
        """Plan the next attempt, as long as no renewal has succeeded."""
        now = trio.current_time()
        left = self._ends - now
        self.renew_at = now + (max(1.0, RENEW_AT * left) if left > 0 else _OVERDUE)

    def refused(self, code: int, reason: str) -> None:
        """Note that the gateway, or a proxy, has refused a token."""
        self._was_refused, self._reason, self._code = True, reason, code
        self._refused = "" if self._offered else self.token
        was_admitted = self.renew_at is not None and self._expires_at is not None
        if was_admitted and not self._offered and "expired" in reason:
            assert self._expires_at is not None
            self._lifetime.expired(self._expires_at, time.time())

    def _plan(self, *, is_renewal: bool = False) -> None:
        """Plan the next renewal. If a new token seems to have expired, the clock is wrong."""
        if isinstance(self._given, str) or self._expires_at is None:
            return
        now = trio.current_time()
        left = self._lifetime.left(self.token, self._expires_at, time.time())
        issued_at = claimed(self.token, "iat")
        least = 1.0
        if is_renewal and issued_at is None:
            least = _MIN_INTERVAL_UNKNOWN
        elif is_renewal and issued_at is not None:
            least = max(1.0, _MIN_INTERVAL * (self._expires_at - issued_at))
        self._ends = now + left
        self.renew_at = now + max(least, RENEW_AT * left)

    async def _ask(self, *, refused: bool) -> str:
        if isinstance(self._given, str):
            return self._given
        given = self._given(refused)
        return await given if isawaitable(given) else given
