"""Limits over all processes: who joins needs a place in Redis, too.

One writer sends one script at a time. It writes how many places this process has, and asks for
new ones; those who come meanwhile share the next script. What Redis counts for this process is
therefore never less than it has.
"""

from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from itertools import islice
from typing import Any, Final, NoReturn, Protocol

import structlog
import trio

from ..broker.commands import Unavailable
from ..core.audiences import Principal
from ..core.capacity import CapacityLimits, Owner, of_tenant, owner_is_full, tenant_is_full
from ..core.close_codes import Rejected
from ..runtime.hub import Hub, Reservation
from ..runtime.throttled_log import ThrottledLog
from .keys import Keys
from .places import (
    GRANTED,
    MOST_ASKS,
    MOST_COUNTS,
    OWNER_IS_FULL,
    TAKE,
    Outcome,
    Written,
    arguments,
    read_reply,
)

log = structlog.get_logger()

_TIMEOUT: Final = 1.0  # seconds for one script
_REFRESH: Final = 3.0  # seconds without a change after which it is written that nothing changed
_RETRY: Final = 0.5  # seconds
_TRIES: Final = 3


class Evaluate(Protocol):
    """Runs a script in Redis, as :meth:`Commands.evaluate` does."""

    async def __call__(
        self, script: str, keys: Sequence[str], arguments: Sequence[Any], *, seconds: float
    ) -> Any: ...


class _Batch:
    """Clients that share a script; each has a reserved place in the hub."""

    __slots__ = ("answers", "done", "given_up", "owners")

    def __init__(self) -> None:
        self.owners: list[Owner] = []
        self.given_up: list[Owner] = []  # those of them who do not wait any more
        self.answers: bytes | None = None  # one for each
        self.done = trio.Event()

    def answer(self, answers: bytes) -> None:
        self.answers = answers
        self.done.set()


class ClusterLimits:
    """The places of this process in Redis, and new ones.

    ``evaluate`` runs a script. ``beat`` writes that this process is live: what a process has
    counts only while it is. While Redis is unavailable, the limits apply to this process alone;
    nobody waits for it more than once.
    """

    def __init__(
        self,
        hub: Hub,
        limits: CapacityLimits,
        keys: Keys,
        name: str,
        evaluate: Evaluate,
        beat: Callable[[], Awaitable[None]],
    ) -> None:
        self._hub = hub
        self._limits = limits
        self._name = name
        self._keys = [keys.nodes, keys.gap, keys.places(name)]
        self._evaluate = evaluate
        self._beat = beat
        self._number = 0  # of the script that was sent last
        self._acknowledged = 0  # of the last one that was answered
        self._batches: deque[_Batch] = deque()  # the first may be under way
        self._is_sent = False
        self._dirty: dict[Owner, None] = {}  # have another count than Redis knows
        self._written_at = 0.0
        self._work = trio.Event()
        self._scope = trio.CancelScope()
        self._throttled_log = ThrottledLog(log)
        self.alone = False  # Redis is unavailable: only the places of this process are known
        hub.on_freed = self._mark

    async def reserve(self, principal: Principal) -> Reservation:
        """Reserve a place in the hub, and over all processes.

        Raises :exc:`Rejected`. What must follow is described at :meth:`Hub.reserve`.
        """
        place, owner = self._hub.reserve(principal), principal.owner
        (answer,) = await self._ask([place])
        if answer == GRANTED:
            return place
        raise owner_is_full(owner) if answer == OWNER_IS_FULL else tenant_is_full()

    async def reserve_all(self, principals: Sequence[Principal]) -> list[Reservation | None]:
        """As :meth:`reserve` for each of up to 250; None for one that is over a limit now."""
        places = [self._reserve_here(principal) for principal in principals]
        answers = iter(await self._ask([place for place in places if place is not None]))
        return [place if place and next(answers) == GRANTED else None for place in places]

    def _reserve_here(self, principal: Principal) -> Reservation | None:
        try:
            return self._hub.reserve(principal)
        except Rejected:
            return None

    async def _ask(self, places: Sequence[Reservation]) -> Sequence[int]:
        """Ask for these places over all processes; those that are not granted are released."""
        owners = [place.owner for place in places]
        if self.alone or not owners:
            for owner in owners:
                self._mark(owner)
            return bytes([GRANTED]) * len(places)
        batch = self._newest_batch(len(places))
        first = len(batch.owners)
        batch.owners += owners
        self._work.set()
        try:
            await batch.done.wait()
        except BaseException:
            if batch.answers is None:  # else it was answered since its cancellation
                batch.given_up += owners
            self._release(places)
            raise
        assert batch.answers is not None
        answers = batch.answers[first : first + len(places)]
        self._release([p for p, answer in zip(places, answers, strict=True) if answer != GRANTED])
        return answers

    def _release(self, places: Iterable[Reservation]) -> None:
        for place in places:
            place.release()
            self._mark(place.owner)  # it may have been counted since it was answered

    def most(self, owner: Owner) -> int:
        """The limit of a user or session."""
        return self._limits.of(owner)

    async def settle(self) -> None:
        """Wait until what has become free until now is written, or cannot be."""
        if not self.alone:
            batch = self._newest_batch()
            self._work.set()
            await batch.done.wait()

    def write_all(self) -> None:
        """Write all counts again: Redis does not have them."""
        self._dirty = dict.fromkeys(self._hub.owners)
        self._dirty |= dict.fromkeys(map(of_tenant, self._hub.limited_tenants))
        self._work.set()

    def stop(self) -> None:
        """Write nothing any more: this process is about to leave."""
        self._scope.cancel()

    async def run(self) -> None:
        """Write what changes, until it is stopped."""
        try:
            with self._scope:
                await self._write_changes()
        finally:
            self.alone = True
            self._answer_alone()  # nobody would answer them any more

    async def _write_changes(self) -> NoReturn:
        while True:
            with trio.move_on_after(_REFRESH):
                await self._work.wait()
            self._work = trio.Event()
            try:
                while self._batches or self._dirty or self._is_due():
                    await self._write()
            except Unavailable as error:
                self._go_on_alone(str(error))
                await trio.sleep(_RETRY)
                self._work.set()

    def _is_due(self) -> bool:
        """Whether it is time to look whether Redis still has what was written."""
        return self.alone or trio.current_time() - self._written_at >= _REFRESH

    def _newest_batch(self, places: int = 0) -> _Batch:
        """The batch that is sent next, or a later one if that has no room for this many more."""
        batches = self._batches
        if len(batches) <= self._is_sent or len(batches[-1].owners) + places > MOST_ASKS:
            batches.append(_Batch())
        return self._batches[-1]

    def _mark(self, owner: Owner) -> None:
        """Write this count, and that of its tenant."""
        self._dirty[owner] = None
        if self._limits.per_tenant:
            self._dirty[of_tenant(owner[1])] = None
        self._work.set()

    def _places(self, key: Owner) -> int:
        hub = self._hub
        return hub.places_of_tenant(key[1]) if key[0] == "tenant" else hub.places_of(key)

    def _waiting(self) -> Counter[Owner]:
        """How many places are reserved in the hub, and not granted by Redis yet."""
        found: Counter[Owner] = Counter()
        for batch in self._batches:
            found.update(batch.owners)
            found.subtract(batch.given_up)
        if self._limits.per_tenant:
            for owner, number in list(found.items()):
                found[of_tenant(owner[1])] += number
        return found

    async def _write(self) -> None:
        """Send one script, again if need be. Raises :exc:`Unavailable`."""
        batch = self._batches[0] if self._batches else _Batch()
        self._is_sent = bool(self._batches)
        try:
            for _ in range(_TRIES):
                if await self._try_to_write(batch):
                    if self._is_sent:
                        self._batches.popleft()
                    return
        finally:
            self._is_sent = False
        raise Unavailable("this process is not known to be live")

    async def _try_to_write(self, batch: _Batch) -> bool:
        """Send one script, and answer the batch; return whether that is done."""
        hub, waiting = self._hub, self._waiting()
        places_of = hub.places_of
        asks = [(owner, places_of(owner) - waiting[owner]) for owner in batch.owners]
        keys = dict.fromkeys(islice(self._dirty, MOST_COUNTS))
        for key in keys:
            del self._dirty[key]
        if self._limits.per_tenant:
            keys |= dict.fromkeys(of_tenant(owner[1]) for owner in batch.owners)
        counts = [(key, self._places(key) - waiting[key]) for key in keys]
        self._number += 1
        sent_at = trio.current_time()
        is_written = False
        try:
            sent = arguments(self._name, self._number, self._limits, asks, counts)
            found = await self._evaluate(TAKE, self._keys, sent, seconds=_TIMEOUT)
            reply = read_reply(found, len(asks))
            # If this process was stopped meanwhile, others may have taken its places.
            in_time = trio.current_time() - sent_at < 2 * _TIMEOUT
            is_written = reply.outcome is Outcome.WRITTEN and in_time
        except Unavailable:
            if trio.current_time() - sent_at < 2 * _TIMEOUT:
                raise
            return False  # and Redis may well answer
        except ValueError:
            raise Unavailable("invalid reply") from None
        finally:
            if not is_written:
                self._dirty |= keys | dict.fromkeys(batch.owners)
        if is_written:
            self._learn(batch, reply)
        elif reply.outcome is Outcome.NOT_LIVE:
            self.write_all()
            with trio.move_on_after(_TIMEOUT) as scope:
                await self._beat()
            if scope.cancelled_caught:
                raise Unavailable("the beat was not written in time")
        elif reply.outcome is Outcome.LATE:
            self._number = reply.before
        return is_written

    def _learn(self, batch: _Batch, reply: Written) -> None:
        """Give out what was granted."""
        if reply.before < self._acknowledged:
            self.write_all()  # Redis has lost what was written, as a replica may
        self._acknowledged = self._number
        self._written_at = trio.current_time()
        for owner in batch.given_up:  # it may have been granted
            self._mark(owner)
        batch.answer(reply.answers)
        if self.alone:
            self.alone = False
            log.info("limits apply over all processes again")

    def _go_on_alone(self, reason: str) -> None:
        if not self.alone:
            self.alone = True
            self._throttled_log.warning("limits apply to this process alone", error=reason)
        self._answer_alone()

    def _answer_alone(self) -> None:
        """Grant what the limits of this process have granted."""
        for batch in self._batches:
            for owner in batch.owners:
                self._mark(owner)
            batch.answer(bytes([GRANTED]) * len(batch.owners))
        self._batches.clear()
