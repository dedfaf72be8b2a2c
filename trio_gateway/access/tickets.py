"""Tickets: each replaces a token once, so that no token has to be in a URL."""

import hashlib
import secrets
from collections.abc import Awaitable, Callable
from typing import Final

from ..broker.commands import Commands, Unavailable
from ..core.close_codes import Close, Rejected, auth_failed

TICKET_LIFE: Final = 30  # seconds
_TICKET_BYTES: Final = 16


class Tickets:
    """Issues tickets and redeems each once, in any process of the gateway.

    Redis keeps the token for :data:`TICKET_LIFE` under the hash of the ticket's secret part. Before
    that part, a ticket has the tenant and a dot, by which a proxy may choose the process. The
    tenant in a ticket is not checked, and decides nothing else.
    """

    def __init__(self, commands: Commands) -> None:
        self._commands = commands

    async def issue(self, token: str, tenant: int) -> str:
        """Return a new ticket for this token of that tenant, which the caller has found valid."""
        ticket = f"{tenant}.{secrets.token_urlsafe(_TICKET_BYTES)}"
        await self._commands.set_for(_ticket_key(ticket), token, TICKET_LIFE)
        return ticket

    async def peek(self, ticket: str) -> str:
        """Return the ticket's token, and keep it valid. Raises :exc:`Rejected` if it is invalid."""
        return await self._token(self._commands.get, ticket)

    async def redeem(self, ticket: str) -> str:
        """Return the ticket's token and use it up. Raises :exc:`Rejected` if it is invalid.

        Call this last, when nothing else can reject the client any more.
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
            raise auth_failed("ticket invalid")
        return token.decode(errors="replace")


def _ticket_key(ticket: str) -> str:
    secret = ticket.rpartition(".")[2]
    digest = hashlib.sha256(secret.encode(errors="replace")).hexdigest()
    return f"gateway:ticket:{digest}"
