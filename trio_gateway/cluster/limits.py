"""Limits over all processes: who joins needs a place in Redis, too.

One writer sends one script at a time. It writes how many places this process has, and asks for
new ones; those who come meanwhile share the next script. What Redis counts for this process is
therefore never less than it has.
"""

from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from itertools import islice
from typing import Any, Final, NoReturn, Protocol

import structlog
import trio

from ..broker.commands import Unavailable
from ..core.audiences import Principal
from ..core.capacity import CapacityLimits, Owner, of_tenant, owner_is_full, tenant_is_full
from ..runtime.hub import Hub, Place
from ..runtime.throttled_log import ThrottledLog
from .keys import Keys
from .places import (
    MOST_ASKS,
    MOST_COUNTS,
    TAKE,
    Answer,
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


class _Ask:
    """A client that waits for its place in Redis; its place in the hub is reserved."""

    __slots__ = ("answer", "given_up", "keys")

    def __init__(self, keys: tuple[Owner, Owner | None]) -> None:
        self.keys = keys
        self.answer: Answer | None = None
        self.given_up = False


class _Batch:
    """What waits for the same script."""

    __slots__ = ("asks", "done")

    def __init__(self) -> None:
        self.asks: list[_Ask] = []
        self.done = trio.Event()


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
        self._batches: deque[_Batch] = deque()
        self._sent = _Batch()
        self._asked: Counter[Owner] = Counter()  # reserved places that Redis has not granted
        self._written: dict[Owner, int] = {}  # what Redis has
        self._dirty: dict[Owner, None] = {}  # may have other counts than that
        self._written_at = 0.0
        self._work = trio.Event()
        self._scope = trio.CancelScope()
        self._throttled_log = ThrottledLog(log)
        self.alone = False  # Redis is unavailable: only the places of this process are known
        hub.on_freed = self._freed

    async def reserve(self, principal: Principal) -> Place:
        """Reserve a place in the hub, and over all processes.

        Raises :exc:`Rejected`. What must follow is described at :meth:`Hub.reserve`.
        """
        place = self._hub.reserve(principal)
        try:
            await self._take(principal)
        except BaseException:
            place.release()
            raise
        return place

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
        self._written.clear()
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
                await self._write_out()
            except Unavailable as error:
                self._go_on_alone(str(error))
                await trio.sleep(_RETRY)
                self._work.set()

    async def _take(self, principal: Principal) -> None:
        tenant = of_tenant(principal.tenant) if self._limits.per_tenant else None
        ask = _Ask((principal.owner, tenant))
        if self.alone:
            self._mark(ask.keys)
            await trio.lowlevel.checkpoint()
            return
        self._count(ask, 1)
        batch = self._newest_batch()
        batch.asks.append(ask)
        self._work.set()
        try:
            await batch.done.wait()
        finally:
            ask.given_up = ask.answer is None
            if ask.answer is not Answer.GRANTED:
                self._count(ask, -1)
        if ask.answer is Answer.OWNER_IS_FULL:
            raise owner_is_full(principal.owner)
        if ask.answer is Answer.TENANT_IS_FULL:
            raise tenant_is_full()

    def _newest_batch(self) -> _Batch:
        if not self._batches or len(self._batches[-1].asks) >= MOST_ASKS:
            self._batches.append(_Batch())
        return self._batches[-1]

    def _count(self, ask: _Ask, change: int) -> None:
        for key in ask.keys:
            if key is not None:
                self._asked[key] += change
                if not self._asked[key]:
                    del self._asked[key]

    def _freed(self, principal: Principal) -> None:
        self._mark((principal.owner, of_tenant(principal.tenant)))

    def _mark(self, keys: Iterable[Owner | None]) -> None:
        for key in keys:
            if key is not None:
                self._dirty[key] = None
        self._work.set()

    def _places(self, key: Owner) -> int:
        kind, tenant, _ = key
        places = (
            self._hub.places_of_tenant(tenant) if kind == "tenant" else self._hub.places_of(key)
        )
        return places - self._asked[key]

    async def _write_out(self) -> None:
        """Write until nothing is left to be written. Raises :exc:`Unavailable`."""
        while True:
            self._sent = self._batches.popleft() if self._batches else _Batch()
            await self._write(self._sent.asks)
            self._sent.done.set()
            if not self._batches and not self._dirty:
                return

    async def _write(self, asks: Sequence[_Ask]) -> None:
        for _ in range(_TRIES):
            waiting = [ask for ask in asks if not ask.given_up]
            limits = {key: self._limits.of(key) for ask in waiting for key in ask.keys if key}
            counts = {key: self._places(key) for key in limits}
            changed = list(islice(self._dirty, MOST_COUNTS))
            for key in changed:
                del self._dirty[key]
                if (places := self._places(key)) != self._written.get(key, 0):
                    counts[key] = places
            if not counts and not self._is_due():
                return
            self._number += 1
            sent_at = trio.current_time()
            try:
                reply = await self._send(limits, counts, waiting)
            except Unavailable:
                self._dirty |= dict.fromkeys(counts)
                if trio.current_time() - sent_at < 2 * _TIMEOUT:
                    raise
                continue  # this process was stopped meanwhile, and Redis may well answer
            if reply.outcome is Outcome.WRITTEN and trio.current_time() - sent_at < 2 * _TIMEOUT:
                self._learn(counts, waiting, reply)
                return
            self._dirty |= dict.fromkeys(counts)
            if reply.outcome is Outcome.NOT_LIVE:
                self.write_all()
                await self._beat()
            elif reply.outcome is Outcome.LATE:
                self._number = reply.before
        raise Unavailable("not live")

    def _is_due(self) -> bool:
        """Whether it is time to look whether Redis still has what was written."""
        since = trio.current_time() - self._written_at
        return self.alone or (bool(self._written) and since >= _REFRESH)

    async def _send(
        self, limits: Mapping[Owner, int], counts: Mapping[Owner, int], asks: Sequence[_Ask]
    ) -> Written:
        keys = [ask.keys for ask in asks]
        sent = arguments(self._name, self._number, limits, counts, keys)
        reply = await self._evaluate(TAKE, self._keys, sent, seconds=_TIMEOUT)
        try:
            return read_reply(reply)
        except (TypeError, ValueError, AttributeError):
            raise Unavailable("invalid reply") from None

    def _learn(self, counts: dict[Owner, int], asks: Sequence[_Ask], reply: Written) -> None:
        """Give out what was granted, and remember what Redis has now."""
        if reply.before < self._acknowledged:
            self.write_all()  # Redis has lost what was written, as a replica may
        self._acknowledged = self._number
        self._written_at = trio.current_time()
        for ask, answer in zip(asks, reply.answers, strict=True):
            if answer is Answer.GRANTED:
                for key in filter(None, ask.keys):
                    counts[key] += 1
                if ask.given_up:
                    self._mark(ask.keys)
                else:
                    self._count(ask, -1)
            ask.answer = answer
        for key, places in counts.items():
            if places:
                self._written[key] = places
            else:
                self._written.pop(key, None)
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
        for batch in (self._sent, *self._batches):
            for ask in batch.asks:
                if ask.answer is None and not ask.given_up:
                    ask.answer = Answer.GRANTED
                    self._count(ask, -1)
                    self._mark(ask.keys)
            batch.done.set()
        self._batches.clear()
