"""Sectors: which sectors a waiter serves today, from a cache, the database or the last answer."""

import math
import random
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from datetime import date
from typing import Final, NoReturn
from weakref import WeakKeyDictionary

import structlog
import trio

from ..core.audiences import BranchId, Endpoint, Principal, SectorId, Sectors, TenantId, UserId
from ..core.control_messages import SECTORS_CHANGED, SectorsChanged, read_control_message
from ..core.limits import RateLimit
from ..core.resilience import Backoff, Breaker
from ..core.service_day import Period, ServiceDays, holds
from ..runtime.connection import Connection
from ..runtime.hub import Hub
from ..runtime.throttled_log import ThrottledLog
from ..settings import InvalidSettings, Settings
from .sector_database import Assignments, AssignmentSource, QueryFailed, SectorDatabase, WaiterKey

log = structlog.get_logger()

REFRESHES: Final = 5  # refreshes of one connection that query the database, per window
REFRESH_WINDOW: Final = 10.0  # seconds
SPREAD: Final = 60.0  # seconds over which the change of day or shift is applied
_TICK: Final = 5.0  # seconds between two checks of the clock
_MOST_CACHED: Final = 50_000  # waiters


@dataclass(slots=True)
class _CachedAssignments:
    """The last answer of the database about a waiter in a branch."""

    day: date
    rows: Assignments
    queried_at: float  # on Trio's clock


@dataclass(slots=True)
class _Query:
    """A query in progress. Everybody who needs the same answer waits for it."""

    done: trio.Event = field(default_factory=trio.Event)
    outdated: bool = False  # assignments may have changed since it was sent
    answered: bool | None = None  # None: the query was cancelled


class SectorAssignments:
    """The waiters' sectors: from a cache, the database, or its last answer.

    A failed query does not mean "no sectors": the last answer holds, or else the token's claim.
    The query is repeated until the database answers, and live connections then get the result.
    """

    def __init__(
        self,
        assignments: AssignmentSource,
        hub: Hub,
        breaker: Breaker,
        *,
        days: ServiceDays | None = None,
        ttl: float = 300,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._assignments = assignments
        self._hub = hub
        self._breaker = breaker
        self._days = days or ServiceDays()
        self._ttl = ttl
        self._wall_clock = wall_clock
        # By waiter, the least recently stored first; then by branch.
        self._cache: OrderedDict[tuple[TenantId, UserId], dict[BranchId, _CachedAssignments]] = (
            OrderedDict()
        )
        self._running: dict[WaiterKey, _Query] = {}
        self._periods: dict[tuple[TenantId, BranchId], Period] = {}  # of live waiters
        self._pending: dict[WaiterKey, None] = {}  # to be queried (again)
        self._unverified: dict[
            WaiterKey, None
        ] = {}  # queried after those: a change may have been missed
        self._subscribed_at = -math.inf  # answers from before may be outdated
        self._wake = trio.Event()
        self._answered = 0  # queries
        self._throttled_log = ThrottledLog(log)
        self._refreshes: WeakKeyDictionary[Connection, RateLimit] = WeakKeyDictionary()

    channel = SECTORS_CHANGED

    @property
    def known(self) -> int:
        """The number of cached answers."""
        return sum(map(len, self._cache.values()))

    @property
    def pending(self) -> int:
        """The number of queries to repeat for live connections because the database failed."""
        return len(self._pending)

    @property
    def queries(self) -> dict[str, float]:
        """The number of queries so far, by outcome."""
        return {"answered": self._answered, "failed": self._assignments.failures}

    def close(self) -> None:
        """Release the database connections."""
        self._assignments.close()

    async def assign(self, principal: Principal, *, fresh: bool = False) -> Principal:
        """Return the principal with today's sectors. Never fails; ``fresh`` bypasses the cache.

        Call :meth:`latest` before :meth:`Hub.join`, for changes in between.
        """
        if principal.endpoint is not Endpoint.WAITER or principal.user is None:
            return principal
        unknown: list[WaiterKey] = []

        async def query_branch(key: WaiterKey) -> None:
            if not await self._query(key, fresh=fresh):
                unknown.append(key)

        if not fresh and (found := self.assign_nowait(principal)) is not None:
            return found
        async with trio.open_nursery() as nursery:  # concurrently: one deadline for all branches
            for branch in principal.branches:
                key = WaiterKey(principal.tenant, branch, principal.user)
                if fresh or not self._is_fresh(key):
                    nursery.start_soon(query_branch, key)
        self._set_pending(unknown)  # only now: keys without a live connection are dropped
        return self._with_sectors(principal)

    def assign_nowait(self, principal: Principal) -> Principal | None:
        """As :meth:`assign`, but return None if the database would have to be asked."""
        if principal.endpoint is not Endpoint.WAITER or principal.user is None:
            return principal
        for branch in principal.branches:
            if not self._is_fresh(WaiterKey(principal.tenant, branch, principal.user)):
                return None
        return self._with_sectors(principal)

    async def refresh(self, connection: Connection) -> None:
        """Refresh a client's sectors on request. Over the limit the cache answers."""
        if (limit := self._refreshes.get(connection)) is None:
            limit = self._refreshes[connection] = RateLimit(REFRESHES, REFRESH_WINDOW)
        now = trio.current_time()
        fresh = not limit.is_full(now)
        if fresh:  # requests over the limit do not count, else a busy client would never be served
            limit.exceeded(now)
        await self.assign(connection.principal, fresh=fresh)
        self._apply(connection)

    def receive(self, payload: bytes) -> None:
        """Query a waiter again, by a message on :data:`~.control_messages.SECTORS_CHANGED`."""
        try:
            message = read_control_message(payload, SectorsChanged)
        except ValueError:
            self._throttled_log.warning("invalid sectors message")
            return
        self.changed(message)

    def changed(self, message: SectorsChanged) -> None:
        """Query a waiter again: the assignments have changed."""
        tenant, user = TenantId(message.tenant_id), UserId(str(message.waiter_id))
        for key, query in self._running.items():
            if key.tenant == tenant and key.user == user:
                query.outdated = True
        for known in self._cache.get((tenant, user), {}).values():
            known.queried_at = -math.inf
        self._set_pending(
            WaiterKey(tenant, branch, user)
            for connection in self._connections_of(tenant, user)
            for branch in connection.principal.branches
        )

    def on_subscribed(self) -> None:
        """Query all live waiters again: messages may have been lost until now.

        Cached answers are outdated. Waiters whose change was announced are queried first.
        """
        self._subscribed_at = trio.current_time()
        for query in self._running.values():
            query.outdated = True
        self._unverified.update(
            (WaiterKey(principal.tenant, branch, principal.user), None)
            for connection in self._waiters()
            if (principal := connection.principal).user is not None
            for branch in principal.branches
        )
        self._wake.set()

    def latest(self, principal: Principal) -> Principal:
        """Return the principal as :meth:`assign` would now, without waiting.

        Call :meth:`Hub.join` or :meth:`Hub.move` next, without an await in between. Answers that
        are outdated, because of a change during an earlier await, are queried again.
        """
        if principal.endpoint is not Endpoint.WAITER or principal.user is None:
            return principal
        keys = [
            WaiterKey(principal.tenant, branch, principal.user) for branch in principal.branches
        ]
        self._set_pending(key for key in keys if not self._is_fresh(key))
        return self._with_sectors(principal)

    async def retry_pending(self) -> NoReturn:
        """Repeat pending queries until they are answered; returns only when cancelled."""
        backoff, failures = Backoff(first=0.5, most=10), 0
        while True:
            while not (pending := self._pending or self._unverified):
                self._wake = trio.Event()
                await self._wake.wait()
            key = next(iter(pending))
            if not self._connections_of(key.tenant, key.user):
                del pending[key]
            elif await self._query(key, fresh=False):
                failures = 0
            else:
                failures += 1
                pending.pop(key, None)
                pending[key] = None  # last: perhaps only this query fails
                wait = self._breaker.wait(trio.current_time())
                await trio.sleep(max(wait, backoff.after(failures)))

    async def follow_clock(self) -> NoReturn:
        """Update live waiters, spread over a minute, when a branch's day or shift changes."""
        while True:
            changed: list[Connection] = []
            now: dict[tuple[TenantId, BranchId], Period] = {}
            for connection in self._waiters():
                tenant = connection.principal.tenant
                for branch in connection.principal.branches:
                    if (place := (tenant, branch)) not in now:
                        now[place] = self._period(*place)
                if any(
                    self._periods.get(place := (tenant, branch)) != now[place]
                    for branch in connection.principal.branches
                ):
                    changed.append(connection)
            self._periods = now
            random.shuffle(changed)
            started = trio.current_time()
            for i, connection in enumerate(changed, 1):
                if not connection.ending:
                    await self.assign(connection.principal)
                    self._apply(connection)
                await trio.sleep_until(started + i * min(SPREAD / len(changed), 1.0))
            await trio.sleep(_TICK)

    def _waiters(self) -> list[Connection]:
        return [
            connection
            for connection in self._hub.connections
            if connection.principal.endpoint is Endpoint.WAITER
        ]

    def _connections_of(self, tenant: TenantId, user: UserId) -> list[Connection]:
        return [
            connection
            for connection in self._waiters()
            if connection.principal.tenant == tenant and connection.principal.user == user
        ]

    def _apply(self, connection: Connection) -> None:
        """Move a connection to its current sectors in one step: no event is lost or doubled."""
        before = connection.principal
        after = self._with_sectors(before)
        if after is not before and not connection.ending:
            self._hub.move(connection, after)

    def _with_sectors(self, principal: Principal) -> Principal:
        """Return the principal with the cached sectors, and its own where there are none."""
        assert principal.user is not None
        sectors: dict[BranchId, frozenset[SectorId]] = {}
        for branch in principal.branches:
            key = WaiterKey(principal.tenant, branch, principal.user)
            period = self._period(key.tenant, branch)
            self._periods.setdefault((key.tenant, branch), period)
            if (known := self._cached(key)) is None:
                had = principal.sectors.get(branch)
            else:
                if known.day != period.day:  # better than nothing until the query is answered
                    self._set_pending([key])
                had = frozenset(sector for sector, shift in known.rows if holds(shift, period))
            if had:
                sectors[branch] = had
        return (
            principal if _same(sectors, principal.sectors) else replace(principal, sectors=sectors)
        )

    def _period(self, tenant: TenantId, branch: BranchId) -> Period:
        return self._days.period(tenant, branch, self._wall_clock())

    def _cached(self, key: WaiterKey) -> _CachedAssignments | None:
        return self._cache.get((key.tenant, key.user), {}).get(key.branch)

    def _is_fresh(self, key: WaiterKey) -> bool:
        known = self._cached(key)
        return (
            known is not None
            and known.day == self._period(key.tenant, key.branch).day
            and trio.current_time() - known.queried_at < self._ttl
            and known.queried_at > self._subscribed_at
        )

    async def _query(self, key: WaiterKey, *, fresh: bool) -> bool:
        """Query the database, or wait for the same query in progress; whether it answered.

        With ``fresh``, a query in progress is repeated, since it may have been sent too early.
        """
        while (running := self._running.get(key)) is not None:
            running.outdated |= fresh
            await running.done.wait()
            if running.answered is not None:
                return running.answered
        if not self._breaker.try_now(trio.current_time()):
            return False
        query = self._running[key] = _Query()
        try:
            known = await self._query_database(key, query)
        except QueryFailed as failed:
            query.answered = False
            self._breaker.failed(trio.current_time())
            self._throttled_log.warning("sectors not known", error=str(failed), tenant=key.tenant)
            return False
        except BaseException:
            self._breaker.abandoned(trio.current_time())
            raise
        finally:
            del self._running[key]
            query.done.set()
        query.answered = True
        self._breaker.succeeded()
        self._store(key, known)
        return True

    async def _query_database(self, key: WaiterKey, query: _Query) -> _CachedAssignments:
        """Return an answer that is newer than the last change that was announced."""
        while True:
            query.outdated = False
            day, queried_at = self._period(key.tenant, key.branch).day, trio.current_time()
            rows = await self._assignments.of(key, day)
            self._answered += 1
            if not query.outdated and day == self._period(key.tenant, key.branch).day:
                return _CachedAssignments(day, rows, queried_at)

    def _store(self, key: WaiterKey, known: _CachedAssignments) -> None:
        """Cache an answer, and apply a changed one to all connections of the waiter."""
        before = self._cached(key)
        person = (key.tenant, key.user)
        self._cache.setdefault(person, {})[key.branch] = known
        self._cache.move_to_end(person)
        if len(self._cache) > _MOST_CACHED:
            self._cache.popitem(last=False)
        is_pending = key in self._pending or key in self._unverified
        if is_pending or (before is not None and before.rows != known.rows):
            self._pending.pop(key, None)
            self._unverified.pop(key, None)
            for connection in self._connections_of(key.tenant, key.user):
                self._apply(connection)

    def _set_pending(self, keys: Iterable[WaiterKey]) -> None:
        for key in keys:
            self._pending[key] = None
            self._wake.set()


def _same(a: Sectors, b: Sectors) -> bool:
    return dict(a) == dict(b)


def make_sector_assignments(
    settings: Settings, hub: Hub, breaker: Breaker, clock: Callable[[], float]
) -> SectorAssignments:
    """Make the assignments from the database in ``DATABASE_URL``, which must be set.

    Raises :exc:`InvalidSettings` if the URL is unusable.
    """
    assert settings.database_url is not None
    try:
        assignments = SectorDatabase(
            settings.database_url, settings.sector_table, settings.sector_column_names
        )
    except ValueError as error:
        raise InvalidSettings([f"DATABASE_URL {error}"]) from None
    return SectorAssignments(
        assignments,
        hub,
        breaker,
        days=settings.service_days,
        ttl=settings.sector_cache_ttl,
        wall_clock=clock,
    )
