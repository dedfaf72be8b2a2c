"""Revocations: which credentials Redis says are revoked."""

import math
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Final, NoReturn, Self

import msgspec
import structlog
import trio

from ..broker.commands import Commands, Unavailable
from ..core.audiences import Principal
from ..core.close_codes import Close, Rejected
from ..core.control_messages import Revoked
from ..core.resilience import Backoff
from ..runtime.connection import Connection
from ..runtime.hub import Hub
from ..runtime.throttled_log import ThrottledLog

log = structlog.get_logger()

_BATCH: Final = 250  # principals in one MGET
_REST: Final = 0.005  # seconds between two
RECHECK_PERIOD: Final = (
    3.0  # seconds over which everybody is looked at after messages may have been lost
)


class _Check:
    """One principal's question, waiting for the MGET that answers it."""

    __slots__ = ("answered", "failed", "principal", "revoked")

    def __init__(self, principal: Principal) -> None:
        self.principal = principal
        self.answered = trio.Event()
        self.revoked = False
        self.failed = False


class CredentialWatch:
    """What is heard about one principal until it has joined the hub, or its token was renewed.

    From :meth:`start` to :meth:`stop` :meth:`Revocations.receive` finds it as it finds a live
    connection; as a context manager it does both.
    ``revocations`` is None where nobody checks them.
    """

    def __init__(self, revocations: "Revocations | None", principal: Principal) -> None:
        self.principal = principal
        self.revoked = False
        self.stale = False  # a message may have been lost, or the last look is a while ago
        self._revocations = revocations

    def start(self) -> None:
        if self._revocations is not None:
            self._revocations.watches.add(self)

    def stop(self) -> None:
        if self._revocations is not None:
            self._revocations.watches.discard(self)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    async def check(self) -> None:
        """Raise :exc:`Rejected` if the credential is revoked, or if nobody knows.

        Whatever is heard while this waits counts.
        """
        while True:
            self.stale = False
            if self._revocations is None:
                await trio.lowlevel.checkpoint()
            else:
                await self._revocations.check(self.principal)
            if self.is_current():
                return

    def is_current(self) -> bool:
        """Whether what was checked still holds; raises :exc:`Rejected` if it was revoked since."""
        if self.revoked:
            raise _revoked()
        return not self.stale


class Revocations:
    """Asks Redis whether a credential has been revoked: at connect, at intervals, when told to."""

    def __init__(self, commands: Commands, hub: Hub) -> None:
        self._commands = commands
        self._hub = hub
        self._throttled_log = ThrottledLog(log)
        self._ask, self._asked = trio.open_memory_channel[_Check](1000)
        self._messages_lost = trio.Event()  # whether a message may have been lost
        self.watches: set[CredentialWatch] = set()

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
            raise _revoked()

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
        """Look at every live connection once per interval, client traffic or not; and at all of
        them within seconds when a message may have been lost, or when Redis answers again.
        """
        soon = False
        while True:
            self._messages_lost = trio.Event()
            parts = math.ceil(len(self._hub) / _BATCH) or 1
            pause = (min(interval, RECHECK_PERIOD) if soon else interval) / parts
            soon = await self._sweep_all(0.0 if soon else pause, pause)

    async def _sweep_all(self, wait: float, pause: float) -> bool:
        """Wait, look at a batch, pause, look at the next; whether it all must be done again."""
        if await self._lost_messages_within(wait):
            return True
        connections = list(self._hub.connections)  # those that came during the wait, too
        for i in range(0, len(connections), _BATCH):
            if i and await self._lost_messages_within(pause):
                return True
            if not await self._sweep(batch := connections[i : i + _BATCH]):
                await self._sweep_again(batch)
                return True
        return False

    async def _lost_messages_within(self, seconds: float) -> bool:
        """Wait; end at once with True if a message may have been lost."""
        with trio.move_on_after(seconds):
            await self._messages_lost.wait()
        return self._messages_lost.is_set()

    async def _sweep_again(self, batch: Sequence[Connection]) -> None:
        """Until Redis answers."""
        backoff, failures = Backoff(first=0.5, most=1.0), 1
        await trio.sleep(backoff.after(failures))
        while not await self._sweep(batch):
            failures += 1
            await trio.sleep(backoff.after(failures))

    async def _sweep(self, batch: Sequence[Connection]) -> bool:
        """Close those whose token was revoked; whether Redis has answered."""
        asked = [connection.principal for connection in batch]
        try:
            revoked = await self._revoked(asked)
        except Unavailable as error:
            self._throttled_log.warning(
                "revocations not checked", connections=len(batch), error=str(error)
            )
            return False
        for connection, principal, is_revoked in zip(batch, asked, revoked, strict=True):
            # One whose token was renewed meanwhile was checked then.
            if is_revoked and _credential(connection.principal) == _credential(principal):
                connection.close(Close.AUTH_FAILED, "token revoked")
        return True

    def receive(self, payload: bytes) -> None:
        """A message on :data:`~.control_messages.REVOKED`: close whom it is about, at once."""
        try:
            message = msgspec.json.decode(payload, type=Revoked)
        except (msgspec.DecodeError, UnicodeError, RecursionError):
            self._throttled_log.warning("invalid revocation")
            return
        for connection in list(self._hub.connections):
            if _is_about(message, connection.principal):
                connection.close(Close.AUTH_FAILED, "token revoked")
        for watch in self.watches:
            if _is_about(message, watch.principal):
                watch.revoked = True

    def on_subscribed(self) -> None:
        """Messages may have been lost until now: look at everybody again, soon."""
        self._messages_lost.set()
        for watch in self.watches:
            watch.stale = True

    async def _revoked(self, principals: Sequence[Principal]) -> list[bool]:
        keys = [key for principal in principals for key in _keys(principal)]
        values = await self._commands.mget(keys) if keys else []
        found = dict(zip(keys, values, strict=True))
        return [_is_revoked(principal, found) for principal in principals]


def _revoked() -> Rejected:
    return Rejected(Close.AUTH_FAILED, "token revoked", "revoked")


def _credential(principal: Principal) -> tuple[str | None, float | None]:
    """What a revocation of one owner's token is compared with."""
    return principal.token_id, principal.issued_at


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


def _is_about(message: Revoked, principal: Principal) -> bool:
    if message.tenant_id is not None and message.tenant_id != principal.tenant:
        return False
    if message.jti is not None and message.jti == principal.token_id:
        return True
    return message.user_id is not None and str(message.user_id) == principal.user
