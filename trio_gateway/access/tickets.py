"""Tickets: one-time stand-ins for a token, so that no token needs to be in a URL."""

import hashlib
import secrets
from collections.abc import Awaitable, Callable
from typing import Final

from ..broker.commands import Commands, Unavailable
from ..core.close_codes import Close, Rejected

TICKET_LIFE: Final = 30  # seconds
_TICKET_BYTES: Final = 16


class Tickets:
    """Issues tickets and redeems them, each once, in any process.

    Redis holds the token for half a minute, under the ticket's hash.
    """

    def __init__(self, commands: Commands) -> None:
        self._commands = commands

    async def issue(self, token: str) -> str:
        """A ticket for this token, which the caller has found valid."""
        ticket = secrets.token_urlsafe(_TICKET_BYTES)
        await self._commands.set_for(_ticket_key(ticket), token, TICKET_LIFE)
        return ticket

    async def peek(self, ticket: str) -> str:
        """The token it stands for, which it does until :meth:`redeem`; else :exc:`Rejected`."""
        return await self._token(self._commands.get, ticket)

    async def redeem(self, ticket: str) -> str:
        """The token it stands for, once; else :exc:`Rejected`.

        To be called when nothing else can refuse the client any more.
        """
        return await self._token(self._commands.getdel, ticket)

    async def _token(self, give: Callable[[str], Awaitable[bytes | None]], ticket: str) -> str:
        try:
            token = await give(_ticket_key(ticket))
        except Unavailable:
            raise Rejected(
                Close.SERVER_OVERLOADED, "can't check the ticket now", "dependency"
            ) from None
        if token is None:
            raise Rejected(Close.AUTH_FAILED, "ticket invalid", "auth")
        return token.decode(errors="replace")


def _ticket_key(ticket: str) -> str:
    digest = hashlib.sha256(ticket.encode(errors="replace")).hexdigest()
    return f"gateway:ticket:{digest}"
