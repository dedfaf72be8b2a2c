"""The credential: a token, where to get the next one, and which one was refused."""

from inspect import isawaitable

from .policy import expiry
from .values import TokenProvider


class NoToken(Exception):  # noqa: N818 - an outcome
    """There is none that could be tried."""


class Credential:
    """Of one client. No text of it holds a token."""

    def __init__(self, given: str | TokenProvider) -> None:
        self._given = given
        self._offered = ""  # to renew the present one, not answered yet
        self._refused = ""
        self._why = ""
        self.token = ""
        self.expires_at: float | None = None  # unix time; None if nobody knows

    @property
    def renewable(self) -> bool:
        return not isinstance(self._given, str)

    async def get(self) -> None:
        """Get a token to connect with; raises :exc:`NoToken`, and whatever the provider raises."""
        token = await self._ask(refused=bool(self._refused))
        if not token:
            raise NoToken("no token")
        if token == self._refused:
            raise NoToken(self._why)
        if not (token.isascii() and token.isprintable() and " " not in token):
            raise NoToken("a token that no header can hold")
        self.token, self._offered, self.expires_at = token, "", expiry(token)

    async def offer(self) -> str | None:
        """A token to renew the present one with, if there is another; may raise as above."""
        token = await self._ask(refused=False)
        if not token or token == self.token:
            return None
        self._offered = token
        return token

    def held(self) -> None:
        """The gateway has let us in with it."""
        self._refused = ""

    def renewed(self, expires_at: float) -> None:
        """The gateway has taken what was offered."""
        self.token, self._offered, self.expires_at = self._offered, "", expires_at

    def refused(self, why: str) -> None:
        """The gateway has refused what was offered last."""
        self._refused, self._why = self._offered or self.token, why

    async def _ask(self, *, refused: bool) -> str:
        if isinstance(self._given, str):
            return self._given
        given = self._given(refused)
        return await given if isawaitable(given) else given
