"""Revocations and tickets: what Redis knows about credentials."""

import hashlib
import secrets
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Final, NoReturn

import msgspec
import structlog
import trio

from ..core.audiences import Principal
from ..core.closing import Close, Rejected
from ..core.limits import LogLimit
from ..core.notices import Revoked
from ..runtime.connection import Connection
from ..runtime.hub import Hub
from .commands import Commands, Unavailable

log = structlog.get_logger()

_BATCH: Final = 250  # principals in one MGET
_REST: Final = 0.005  # seconds between two
TICKET_LIFE: Final = 30  # seconds
_TICKET_BYTES: Final = 16


class _Check:
    """One principal's question, waiting for the MGET that answers it."""

    __slots__ = ("answered", "failed", "principal", "revoked")

    def __init__(self, principal: Principal) -> None:
        self.principal = principal
        self.answered = trio.Event()
        self.revoked = False
        self.failed = False


class Revocations:
    """Asks Redis whether a credential has been revoked: at connect, at intervals, when told to."""

    def __init__(self, commands: Commands, hub: Hub) -> None:
        self._commands = commands
        self._hub = hub
        self._log_limit = LogLimit()
        self._ask, self._asked = trio.open_memory_channel[_Check](1000)

    async def check(self, principal: Principal) -> None:
        """Raise :exc:`Rejected` if the credential is revoked, or if nobody knows."""
        if not _keys(principal):
            return
        check = _Check(principal)
        try:
            self._ask.send_nowait(check)
        except trio.WouldBlock:
            await self._ask.send(check)
        await check.answered.wait()
        if check.failed:
            raise Rejected(Close.SERVER_OVERLOADED, "can't check the token now", "dependency")
        if check.revoked:
            raise Rejected(Close.AUTH_FAILED, "token revoked", "revoked")

    async def answer_checks(self) -> NoReturn:
        """Answer what :meth:`check` asks: whoever asks during one MGET, or in a few milliseconds
        after it, shares the next. In a storm one costs as much as the rest of several handshakes.
        """
        while True:
            checks = [await self._asked.receive()]
            while len(checks) < _BATCH:
                try:
                    checks.append(self._asked.receive_nowait())
                except trio.WouldBlock:
                    break
            try:
                revoked = await self._revoked([check.principal for check in checks])
                for check, is_revoked in zip(checks, revoked, strict=True):
                    check.revoked = is_revoked
            except Unavailable:
                for check in checks:
                    check.failed = True
            for check in checks:
                check.answered.set()
            await trio.sleep(_REST)

    async def sweep(self, interval: float) -> NoReturn:
        """Look at every live connection once per interval, client traffic or not."""
        while True:
            connections = list(self._hub.connections)
            batches = [connections[i : i + _BATCH] for i in range(0, len(connections), _BATCH)]
            for batch in batches or [[]]:
                await trio.sleep(interval / (len(batches) or 1))
                await self._sweep(batch)

    async def _sweep(self, batch: Sequence[Connection]) -> None:
        try:
            revoked = await self._revoked([connection.principal for connection in batch])
        except Unavailable as error:
            held_back = self._log_limit.allows("not checked", trio.current_time())
            if held_back is not None:
                log.warning(
                    "revocations not checked",
                    connections=len(batch),
                    error=str(error),
                    held_back=held_back,
                )
            return
        for connection, is_revoked in zip(batch, revoked, strict=True):
            if is_revoked:
                connection.close(Close.AUTH_FAILED, "token revoked")

    def hear(self, payload: bytes) -> None:
        """A message on :data:`~.notices.REVOKED`: close whom it is about, at once."""
        try:
            said = msgspec.json.decode(payload, type=Revoked)
        except (msgspec.DecodeError, UnicodeError, RecursionError):
            if (held_back := self._log_limit.allows("invalid", trio.current_time())) is not None:
                log.warning("invalid revocation", held_back=held_back)
            return
        for connection in list(self._hub.connections):
            if _is_about(said, connection.principal):
                connection.close(Close.AUTH_FAILED, "token revoked")

    async def _revoked(self, principals: Sequence[Principal]) -> list[bool]:
        keys = [key for principal in principals for key in _keys(principal)]
        values = await self._commands.mget(keys) if keys else []
        found = dict(zip(keys, values, strict=True))
        return [_is_revoked(principal, found) for principal in principals]


def _keys(principal: Principal) -> list[str]:
    keys = []
    if principal.token_id is not None:
        keys.append(f"auth:token:blacklist:{principal.token_id}")
    if principal.user is not None:
        keys.append(f"auth:user:revoked:{principal.user}")
    return keys


def _is_revoked(principal: Principal, found: dict[str, bytes | None]) -> bool:
    if found.get(f"auth:token:blacklist:{principal.token_id}") is not None:
        return True
    since = found.get(f"auth:user:revoked:{principal.user}")
    if since is None:
        return False
    if principal.issued_at is None:
        return True  # counts as older
    try:
        moment = datetime.fromisoformat(since.decode())
    except ValueError:  # something was meant to be revoked: better one login too many
        return True
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return moment.timestamp() > principal.issued_at


def _is_about(said: Revoked, principal: Principal) -> bool:
    if said.tenant_id is not None and said.tenant_id != principal.tenant:
        return False
    if said.jti is not None and said.jti == principal.token_id:
        return True
    return said.user_id is not None and str(said.user_id) == principal.user


class Tickets:
    """One-time stand-ins for a token, so that none needs to stand in a URL.

    Redis holds the token for half a minute, under the ticket's hash: any process can redeem it.
    """

    def __init__(self, commands: Commands) -> None:
        self._commands = commands

    async def issue(self, token: str) -> str:
        """A ticket for this token, which the caller has found valid."""
        ticket = secrets.token_urlsafe(_TICKET_BYTES)
        await self._commands.set_for(_ticket_key(ticket), token, TICKET_LIFE)
        return ticket

    async def redeem(self, ticket: str) -> str:
        """The token it stands for, once; else :exc:`Rejected`."""
        try:
            token = await self._commands.getdel(_ticket_key(ticket))
        except Unavailable:
            raise Rejected(
                Close.SERVER_OVERLOADED, "can't check the ticket now", "dependency"
            ) from None
        if token is None:
            raise Rejected(Close.AUTH_FAILED, "ticket invalid", "auth")
        return token.decode()


def _ticket_key(ticket: str) -> str:
    digest = hashlib.sha256(ticket.encode(errors="replace")).hexdigest()
    return f"gateway:ticket:{digest}"
