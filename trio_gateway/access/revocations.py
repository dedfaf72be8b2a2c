"""Revocations: which credentials are revoked, according to Redis."""

import math
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from typing import Final, NoReturn, Self

import structlog
import trio

from ..broker.command_link import CommandLink
from ..broker.commands import Commands, Unavailable
from ..core.audiences import Principal
from ..core.close_codes import Close, Rejected
from ..core.control_messages import Revoked, read_control_message
from ..core.resilience import Backoff
from ..runtime.connection import Connection
from ..runtime.hub import Hub, Reservation
from ..runtime.throttled_log import ThrottledLog

log = structlog.get_logger()

_BATCH: Final = 250  # principals in one MGET
# Seconds between two MGETs for checks: the more checks one had, the longer the next is waited for.
_PAUSE: Final = 0.005
_PAUSE_PER_CHECK: Final = 0.0005
_LONGEST_PAUSE: Final = 0.01
_LONGEST_PAUSE_WITH_PLACES: Final = 0.02  # a script follows each
_LONGEST_PAUSE_WITHOUT_LINK: Final = 0.03  # one costs as much as several handshakes
_LINK_TIMEOUT: Final = 1.0  # seconds
RECHECK_PERIOD: Final = (
    3.0  # seconds over which everybody is looked at after messages may have been lost
)


#: Reserves a place for each; None for one that gets none.
ReserveAll = Callable[[Sequence[Principal]], Awaitable[Sequence[Reservation | None]]]
_Get = Callable[[Sequence[str]], Awaitable[Sequence[bytes | None]]]


class _Batch:
    """Principals that are checked by one MGET; ``until`` is when they stop waiting for it."""

    __slots__ = ("answered", "need_none", "places", "principals", "revoked", "until")

    def __init__(self, until: float) -> None:
        self.principals: list[Principal] = []
        self.until = until
        self.answered = trio.Event()
        self.revoked: Sequence[bool] | None = None  # of each; None if there was no answer
        self.need_none: set[int] = set()  # the numbers of those who do not wait for a place
        self.places: Sequence[Reservation | None] = ()  # of the others, by number


class CredentialWatch:
    """Notices a revocation of one principal until it has joined the hub or renewed its token.

    Between :meth:`start` and :meth:`stop`, :meth:`Revocations.receive` finds it as it finds a live
    connection. As a context manager it starts and stops itself. Without ``revocations`` nothing
    is ever revoked.
    """

    def __init__(self, revocations: "Revocations | None", principal: Principal) -> None:
        self.principal = principal
        self.revoked = False
        self.stale = False  # a message may have been lost, or the last check is too long ago
        self._revocations = revocations

    def start(self) -> None:
        """Notice revocations from now on."""
        if self._revocations is not None:
            self._revocations.watches.add(self)

    def stop(self) -> None:
        """Notice no more revocations."""
        if self._revocations is not None:
            self._revocations.watches.discard(self)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    async def check(self) -> None:
        """Raise :exc:`Rejected` if the credential is revoked, or if that cannot be checked.

        Includes revocations that are received while this waits.
        """
        while True:
            self.stale = False
            if self._revocations is None:
                await trio.lowlevel.checkpoint()
            else:
                await self._revocations.check(self.principal)
            if self.is_current():
                return

    async def enter(self) -> Reservation | None:
        """As :meth:`check`, and reserve a place, if that costs no waiting of its own.

        A caller that gets None looks for a place itself.
        """
        if self._revocations is None:
            await trio.lowlevel.checkpoint()
            return None
        place = await self._revocations.enter(self.principal)
        try:
            if not self.is_current():
                await self.check()
        except BaseException:
            if place is not None:
                place.give_up()
            raise
        return place

    def is_current(self) -> bool:
        """Whether the last check still holds. Raises :exc:`Rejected` if it was revoked since."""
        if self.revoked:
            raise _revoked()
        return not self.stale


class Revocations:
    """Checks for revoked credentials at connect, at intervals, and when a message arrives.

    ``patience`` is how long a check may take, in seconds. Checks at connect go through ``link``
    while that is open.
    """

    def __init__(
        self,
        commands: Commands,
        hub: Hub,
        *,
        patience: float = 5.0,
        link: CommandLink | None = None,
    ) -> None:
        self._commands = commands
        self._link = link
        self._hub = hub
        self._patience = patience
        self._throttled_log = ThrottledLog(log)
        self._batches: deque[_Batch] = deque()  # each principal in them has a task that waits
        self._idle = trio.lowlevel.ParkingLot()
        self._messages_lost = trio.Event()
        self.watches: set[CredentialWatch] = set()
        #: Reserves places over all processes, for those whose credential was just found valid.
        #: A second wake-up for that would cost each client as much as the place itself.
        self.reserve_all: ReserveAll | None = None

    async def check(self, principal: Principal) -> None:
        """Raise :exc:`Rejected` if the credential is revoked, or if that cannot be checked."""
        if _can_be_revoked(principal):
            batch, number = self._ask(principal)
            batch.need_none.add(number)
            await self._wait(batch, number)

    async def enter(self, principal: Principal) -> Reservation | None:
        """As :meth:`check`, and return a place that was reserved meanwhile, if one was."""
        if self.reserve_all is None or not _can_be_revoked(principal):
            await self.check(principal)
            return None
        batch, number = self._ask(principal)
        try:
            await self._wait(batch, number)
        except BaseException:
            batch.need_none.add(number)
            if batch.places and (place := batch.places[number]) is not None:
                place.give_up()
            raise
        return batch.places[number] if batch.places else None

    def _ask(self, principal: Principal) -> tuple[_Batch, int]:
        """Add it to the batch that is checked next; returns that, and its number in it."""
        batches = self._batches
        if not batches or len(batches[-1].principals) == _BATCH:
            batches.append(_Batch(trio.current_time() + self._patience))
            self._idle.unpark()
        batch = batches[-1]
        batch.principals.append(principal)
        return batch, len(batch.principals) - 1

    async def _wait(self, batch: _Batch, number: int) -> None:
        await batch.answered.wait()
        if batch.revoked is None:
            raise Rejected(Close.SERVER_OVERLOADED, "can't check the token now", "dependency")
        if batch.revoked[number]:
            raise _revoked()

    async def answer_checks(self) -> NoReturn:
        """Answer the calls of :meth:`check`; returns only when cancelled.

        Calls that arrive during one MGET, or a few milliseconds after it, share the next one. When
        many clients connect, an MGET each would cost as much as several handshakes.
        """
        while True:
            if not self._batches:
                await self._idle.park()
            batch = self._batches.popleft()
            # Batches are answered in order, so none waits longer than this for its turn.
            with trio.move_on_at(batch.until), suppress(Unavailable):
                batch.revoked = await self._revoked(batch.principals, self._get_quickly)
                await self._reserve_places(batch, batch.revoked)
            batch.answered.set()
            if (checks := len(batch.principals)) < _BATCH:
                await trio.sleep(min(_PAUSE + _PAUSE_PER_CHECK * checks, self._longest_pause))

    @property
    def _longest_pause(self) -> float:
        if self._link is None:
            return _LONGEST_PAUSE_WITHOUT_LINK
        return _LONGEST_PAUSE if self.reserve_all is None else _LONGEST_PAUSE_WITH_PLACES

    async def _reserve_places(self, batch: _Batch, revoked: Sequence[bool]) -> None:
        """Reserve places; a revoked credential must not take one, not even for a moment."""
        if self.reserve_all is None:
            return
        without = batch.need_none.union(n for n, is_revoked in enumerate(revoked) if is_revoked)
        wanted = [each for n, each in enumerate(batch.principals) if n not in without]
        if not wanted:
            return
        found = iter(await self.reserve_all(wanted))
        batch.places = [None if n in without else next(found) for n in range(len(revoked))]
        for number in batch.need_none - without:  # they have stopped waiting meanwhile
            if (place := batch.places[number]) is not None:
                place.give_up()

    async def _get_quickly(self, keys: Sequence[str]) -> Sequence[bytes | None]:
        """As :meth:`Commands.mget`, through the link if that is possible."""
        if (link := self._link) is not None and link.is_open:
            with suppress(Unavailable):  # then it is learned why, and a breaker is told
                values = await link.ask("MGET", *keys, seconds=_LINK_TIMEOUT)
                if isinstance(values, list) and len(values) == len(keys):
                    return values
        return await self._commands.mget(keys)

    async def sweep(self, interval: float) -> NoReturn:
        """Check every live connection once per interval (seconds); returns only when cancelled.

        Checks all of them within :data:`RECHECK_PERIOD` when a message may have been lost, or when
        Redis answers again.
        """
        soon = False
        while True:
            self._messages_lost = trio.Event()
            parts = math.ceil(len(self._hub) / _BATCH) or 1
            pause = (min(interval, RECHECK_PERIOD) if soon else interval) / parts
            soon = await self._sweep_all(0.0 if soon else pause, pause)

    async def _sweep_all(self, wait: float, pause: float) -> bool:
        """Wait, then check all in batches with pauses; whether to check all again soon."""
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
        """Wait; return True at once if a message may have been lost."""
        with trio.move_on_after(seconds):
            await self._messages_lost.wait()
        return self._messages_lost.is_set()

    async def _sweep_again(self, batch: Sequence[Connection]) -> None:
        """Retry a batch until Redis answers."""
        backoff, failures = Backoff(first=0.5, most=1.0), 1
        await trio.sleep(backoff.after(failures))
        while not await self._sweep(batch):
            failures += 1
            await trio.sleep(backoff.after(failures))

    async def _sweep(self, batch: Sequence[Connection]) -> bool:
        """Close the connections whose token is revoked; whether Redis answered."""
        principals = [connection.principal for connection in batch]
        try:
            revoked = await self._revoked(principals, self._commands.mget)
        except Unavailable as error:
            self._throttled_log.warning(
                "revocations not checked", connections=len(batch), error=str(error)
            )
            return False
        for connection, principal, is_revoked in zip(batch, principals, revoked, strict=True):
            # A token that was renewed in the meantime was checked at its renewal.
            if is_revoked and _credential(connection.principal) == _credential(principal):
                connection.close(Close.AUTH_FAILED, "token revoked")
        return True

    def receive(self, payload: bytes) -> None:
        """Handle a message on :data:`~.control_messages.REVOKED`: close the revoked connections."""
        try:
            message = read_control_message(payload, Revoked)
        except ValueError:
            self._throttled_log.warning("invalid revocation")
            return
        for connection in list(self._hub.connections):
            if _is_about(message, connection.principal):
                connection.close(Close.AUTH_FAILED, "token revoked")
        for watch in self.watches:
            if _is_about(message, watch.principal):
                watch.revoked = True

    def on_subscribed(self) -> None:
        """Check all connections soon: messages may have been lost until now."""
        self._messages_lost.set()
        for watch in self.watches:
            watch.stale = True

    async def _revoked(self, principals: Sequence[Principal], get: _Get) -> list[bool]:
        keys = [key for principal in principals for key in _keys(principal)]
        values = await get(keys) if keys else []
        if values.count(None) == len(values):  # as mostly
            return [False] * len(principals)
        found = dict(zip(keys, values, strict=True))
        return [_is_revoked(principal, found) for principal in principals]


def _can_be_revoked(principal: Principal) -> bool:
    return principal.token_id is not None or principal.user is not None


def _revoked() -> Rejected:
    return Rejected(Close.AUTH_FAILED, "token revoked", "revoked")


def _credential(principal: Principal) -> tuple[str | None, float | None]:
    """The part of a principal that distinguishes two tokens of the same owner."""
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
        return True  # a token without iat counts as older
    try:
        moment = datetime.fromisoformat(since.decode())
    except ValueError:  # something was to be revoked: rather one login too many
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
