"""Sector assignments in virtual time: cache, failures, repeated queries and the wall clock."""

import json
from collections import Counter
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time
from typing import Any
from zoneinfo import ZoneInfo

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs
from trio.testing import MockClock, wait_all_tasks_blocked

from trio_gateway.access import sectors
from trio_gateway.access.sector_database import Assignments, QueryFailed, WaiterKey
from trio_gateway.access.sectors import SectorAssignments
from trio_gateway.core.audiences import (
    BranchId,
    Endpoint,
    Principal,
    SectorId,
    TenantId,
    waiters,
)
from trio_gateway.core.resilience import Breaker, State
from trio_gateway.core.service_day import ServiceDays, read_windows
from trio_gateway.runtime.connection import Connection, ConnectionLimits
from trio_gateway.runtime.dispatch import Dispatch
from trio_gateway.runtime.hub import Hub
from trio_gateway.testing import FakeSocket, make_event, make_principal

NOON = datetime(2026, 3, 10, 12, tzinfo=UTC).timestamp()
TODAY, TOMORROW = date(2026, 3, 10), date(2026, 3, 11)
NIGHT = NOON + 16 * 3600  # 04:00, still of the service day before
TO_FLIP = 3600  # seconds from then to 05:00
FOR_EVER = ConnectionLimits(stale_after=float("inf"), receive_timeout=float("inf"))


@dataclass
class Database:
    """A database of assignments that can be slow or down."""

    rows: dict[tuple[int, int, str, date], set[tuple[int, str | None]]] = field(
        default_factory=dict
    )
    down: bool = False
    takes: float = 0.0  # seconds for an answer
    queries: int = 0
    failures: int = 0
    asked: list[tuple[float, WaiterKey, date]] = field(default_factory=list)
    most_at_once: Counter[WaiterKey] = field(default_factory=Counter)
    _now: Counter[WaiterKey] = field(default_factory=Counter)

    def assign(
        self,
        *serves: int,
        tenant: int = 1,
        branch: int = 1,
        user: int = 21,
        day: date = TODAY,
        shift: str | None = None,
    ) -> None:
        self.rows[tenant, branch, str(user), day] = {(sector, shift) for sector in serves}

    async def of(self, waiter: WaiterKey, day: date, /) -> Assignments:
        self.queries += 1
        self.asked.append((trio.current_time(), waiter, day))
        self._now[waiter] += 1
        self.most_at_once[waiter] = max(self.most_at_once[waiter], self._now[waiter])
        rows = self.rows.get((waiter.tenant, waiter.branch, waiter.user, day), set())
        found = frozenset((SectorId(sector), shift) for sector, shift in rows)
        try:
            await trio.sleep(self.takes)
        finally:
            self._now[waiter] -= 1
        if self.down:
            self.failures += 1
            raise QueryFailed("down")
        return found

    def close(self) -> None: ...


class Restaurant:
    """Sector assignments with everything they need, and connected waiters."""

    def __init__(
        self, nursery: trio.Nursery, *, ttl: float = 300, start: float = NOON, **days: Any
    ) -> None:
        self.nursery = nursery
        self.database = Database()
        self.hub = Hub()
        self.breaker = Breaker(threshold=5, recovery=30)
        self.stepped = 0.0  # what somebody did to the wall clock
        self.sector_assignments = SectorAssignments(
            self.database,
            self.hub,
            self.breaker,
            days=ServiceDays(**days),
            ttl=ttl,
            wall_clock=lambda: start + trio.current_time() + self.stepped,
        )

    async def enter(
        self, principal: Principal | None = None, *, assigned: bool = False
    ) -> Connection:
        """Connect a client as the gateway does."""
        found = principal or make_principal()

        async def serve(*, task_status: trio.TaskStatus[Connection]) -> None:
            known = found if assigned else await self.sector_assignments.assign(found)
            client = Connection(self.sector_assignments.latest(known), FOR_EVER)
            task_status.started(client)
            await client.run(FakeSocket(), self.hub)

        client: Connection = await self.nursery.start(serve)
        return client

    def change(self, *, tenant: int = 1, user: int | str = 21) -> None:
        """The backend announces that the assignments of a waiter have changed."""
        self.sector_assignments.receive(
            json.dumps({"tenant_id": tenant, "waiter_id": user}).encode()
        )


@asynccontextmanager
async def opened(**options: Any) -> AsyncIterator[Restaurant]:
    async with trio.open_nursery() as nursery:
        restaurant = Restaurant(nursery, **options)
        nursery.start_soon(restaurant.sector_assignments.retry_pending)
        nursery.start_soon(restaurant.sector_assignments.follow_clock)
        yield restaurant
        nursery.cancel_scope.cancel()


def serves(client: Connection | Principal, branch: int = 1) -> set[int]:
    principal = client.principal if isinstance(client, Connection) else client
    return set(principal.sectors.get(BranchId(branch), ()))


# The cache


async def test_query_counts_never_decrease(autojump_clock: MockClock) -> None:
    async with opened() as restaurant:
        restaurant.database.takes, restaurant.database.down = 1, True
        restaurant.nursery.start_soon(restaurant.sector_assignments.assign, make_principal())
        await trio.sleep(0.5)
        assert restaurant.sector_assignments.queries == {"answered": 0, "failed": 0}
        await trio.sleep(0.6)
        assert restaurant.sector_assignments.queries == {"answered": 0, "failed": 1}


async def test_cached_answer_expires(autojump_clock: MockClock) -> None:
    async with opened(ttl=300) as restaurant:
        restaurant.database.assign(5)
        assert serves(await restaurant.sector_assignments.assign(make_principal())) == {5}
        restaurant.database.assign(6)

        await trio.sleep(299.9)
        assert serves(await restaurant.sector_assignments.assign(make_principal())) == {5}
        assert restaurant.database.queries == 1
        await trio.sleep(0.1)
        assert serves(await restaurant.sector_assignments.assign(make_principal())) == {6}
        assert restaurant.database.queries == 2


async def test_empty_answer_is_cached(autojump_clock: MockClock) -> None:
    async with opened() as restaurant:
        claims = make_principal(sectors=[9])
        for _ in range(3):
            assert serves(await restaurant.sector_assignments.assign(claims)) == set()
        assert restaurant.database.queries == 1


async def test_cache_is_bounded_and_evicts_the_oldest_waiter(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sectors, "_MOST_CACHED", 3)
    async with opened() as restaurant:
        sector_assignments = restaurant.sector_assignments
        for user in (1, 2, 3, 4):
            await sector_assignments.assign(make_principal(user=user))
            assert sector_assignments.known <= 3
        await sector_assignments.assign(make_principal(user=4))
        assert restaurant.database.queries == 4
        await sector_assignments.assign(make_principal(user=1))
        assert restaurant.database.queries == 5


async def test_one_query_at_a_time_per_waiter_and_branch(autojump_clock: MockClock) -> None:
    async with opened() as restaurant:
        database, found = restaurant.database, list[set[int]]()
        database.takes = 1
        database.assign(5)
        database.assign(7, user=22)

        async def enter(user: int) -> None:
            found.append(
                serves(await restaurant.sector_assignments.assign(make_principal(user=user)))
            )

        async with trio.open_nursery() as nursery:
            for _ in range(50):
                nursery.start_soon(enter, 21)
                nursery.start_soon(enter, 22)
        assert trio.current_time() == 1
        assert database.queries == 2
        assert Counter(map(tuple, found)) == {(5,): 50, (7,): 50}


async def test_waiting_call_queries_itself_when_the_shared_query_is_cancelled(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    async with opened() as restaurant:
        database, sector_assignments = restaurant.database, restaurant.sector_assignments
        database.assign(5)
        database.takes = 1
        scope = trio.CancelScope()

        async def give_up() -> None:
            with scope:
                await sector_assignments.assign(make_principal())

        nursery.start_soon(give_up)
        await wait_all_tasks_blocked()
        scope.deadline = 0.5
        assert serves(await sector_assignments.assign(make_principal())) == {5}
        assert trio.current_time() == 1.5
        assert database.most_at_once.total() == 1
        assert restaurant.breaker.state is State.CLOSED


async def test_all_branches_of_a_waiter_are_queried_concurrently(autojump_clock: MockClock) -> None:
    async with opened() as restaurant:
        restaurant.database.takes = 2
        for branch in (1, 2, 3):
            restaurant.database.assign(branch * 10, branch=branch)
        found = await restaurant.sector_assignments.assign(make_principal(branches=[1, 2, 3]))
        assert trio.current_time() == 2  # and not 6, which would be past the accept timeout
        assert [serves(found, branch) for branch in (1, 2, 3)] == [{10}, {20}, {30}]


@pytest.mark.parametrize("endpoint", [Endpoint.KITCHEN, Endpoint.ADMIN, Endpoint.DINER])
async def test_only_the_waiter_endpoint_has_sectors(
    autojump_clock: MockClock, endpoint: Endpoint
) -> None:
    async with opened() as restaurant:
        principal = make_principal(endpoint)
        assert await restaurant.sector_assignments.assign(principal, fresh=True) is principal
        assert restaurant.database.queries == 0


async def test_waiters_with_the_same_id_in_two_tenants_share_nothing(
    autojump_clock: MockClock,
) -> None:
    async with opened() as restaurant:
        restaurant.database.assign(5, tenant=1)
        restaurant.database.assign(6, tenant=2)
        one = await restaurant.enter(make_principal(tenant=1))
        two = await restaurant.enter(make_principal(tenant=2))
        assert (serves(one), serves(two)) == ({5}, {6})

        restaurant.database.assign(7, tenant=1)
        restaurant.database.assign(7, tenant=2)
        restaurant.change(tenant=2)
        await trio.sleep(1)
        assert (serves(one), serves(two)) == ({5}, {7})


# Failures


async def test_without_an_answer_the_claimed_sectors_hold_in_every_branch(
    autojump_clock: MockClock,
) -> None:
    async with opened() as restaurant:
        restaurant.database.down = True
        found = await restaurant.sector_assignments.assign(
            make_principal(branches=[1, 2], sectors=[9])
        )
        assert (serves(found, 1), serves(found, 2)) == ({9}, {9})
        nothing = await restaurant.sector_assignments.assign(make_principal())
        assert serves(nothing) == set()


async def test_failed_query_is_not_cached(autojump_clock: MockClock) -> None:
    async with opened() as restaurant:
        restaurant.database.assign(5)
        restaurant.database.down = True
        assert serves(await restaurant.sector_assignments.assign(make_principal())) == set()
        assert restaurant.sector_assignments.known == 0
        restaurant.database.down = False
        assert serves(await restaurant.sector_assignments.assign(make_principal())) == {5}


async def test_expired_answer_takes_precedence_over_the_claim(
    autojump_clock: MockClock,
) -> None:
    async with opened(ttl=300, start=NIGHT) as restaurant:
        restaurant.database.assign(5)
        await restaurant.sector_assignments.assign(make_principal())
        restaurant.database.down = True
        await trio.sleep(2 * 3600)  # much longer than the TTL, and into the next day
        assert serves(await restaurant.sector_assignments.assign(make_principal(sectors=[9]))) == {
            5
        }


async def test_failed_query_is_repeated_and_its_answer_reaches_the_live_connection(
    autojump_clock: MockClock,
) -> None:
    async with opened() as restaurant:
        restaurant.database.assign(5)
        restaurant.database.down = True
        client = await restaurant.enter(make_principal(sectors=[9]))
        await trio.sleep(600)
        assert serves(client) == {9}
        assert restaurant.sector_assignments.pending == 1

        restaurant.database.down = False
        await trio.sleep(40)  # the breaker's recovery time, and a back-off of at most 10 s
        assert serves(client) == {5}
        assert restaurant.sector_assignments.pending == 0
        assert restaurant.breaker.state is State.CLOSED
        paid = restaurant.database.queries
        await trio.sleep(100)
        assert restaurant.database.queries == paid


async def test_only_the_failed_branch_falls_back(autojump_clock: MockClock) -> None:
    async with opened() as restaurant:
        restaurant.database.assign(5)
        await restaurant.sector_assignments.assign(make_principal())
        restaurant.database.down = True
        found = await restaurant.sector_assignments.assign(
            make_principal(branches=[1, 2], sectors=[9])
        )
        assert (serves(found, 1), serves(found, 2)) == ({5}, {9})


async def test_open_breaker_stops_queries(autojump_clock: MockClock) -> None:
    async with opened() as restaurant:
        restaurant.database.down = True
        restaurant.database.takes = 2
        with capture_logs() as logs:
            for user in range(100, 200):
                await restaurant.sector_assignments.assign(make_principal(user=user))
        assert restaurant.database.queries == 5
        assert trio.current_time() == 10
        assert restaurant.breaker.state is State.OPEN
        assert [line["event"] for line in logs] == ["sectors not known"] * 5


async def test_half_open_breaker_lets_one_query_through_and_the_others_do_not_wait(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    async with opened() as restaurant:
        restaurant.database.down = True
        for user in range(100, 105):
            await restaurant.sector_assignments.assign(make_principal(user=user))
        await trio.sleep(30)
        restaurant.database.takes = 2
        nursery.start_soon(restaurant.sector_assignments.assign, make_principal(user=1))
        await wait_all_tasks_blocked()
        started = trio.current_time()
        await restaurant.sector_assignments.assign(make_principal(user=2))
        assert trio.current_time() == started


async def test_cancelled_query_does_not_keep_the_breaker_half_open(
    autojump_clock: MockClock,
) -> None:
    async with opened() as restaurant:
        restaurant.database.down = True
        for user in range(100, 105):
            await restaurant.sector_assignments.assign(make_principal(user=user))
        await trio.sleep(30)
        restaurant.database.down = False
        restaurant.database.takes = 2
        with trio.move_on_after(1):
            await restaurant.sector_assignments.assign(make_principal())
        await restaurant.sector_assignments.assign(make_principal())
        assert restaurant.breaker.state is State.CLOSED


async def test_pending_query_of_a_closed_connection_is_dropped(autojump_clock: MockClock) -> None:
    async with opened() as restaurant:
        restaurant.database.down = True
        client = await restaurant.enter()
        assert restaurant.sector_assignments.pending == 1
        client.close(1000)
        await trio.sleep(60)
        assert restaurant.sector_assignments.pending == 0
        asked = restaurant.database.queries
        await trio.sleep(600)
        assert restaurant.database.queries == asked


async def test_http_requests_leave_no_pending_queries(autojump_clock: MockClock) -> None:
    async with opened() as restaurant:
        restaurant.database.down = True
        for user in range(100):
            await restaurant.sector_assignments.assign(make_principal(user=user))
        await trio.sleep(60)
        assert restaurant.sector_assignments.pending == 0


async def test_query_that_always_fails_does_not_block_the_others(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened() as restaurant:
        database = restaurant.database
        database.down = True
        cursed, other = [
            await restaurant.enter(make_principal(user=user, sectors=[9])) for user in (1, 2)
        ]
        database.down = False
        database.assign(5, user=2)
        of = database.of

        async def except_for_1(waiter: WaiterKey, day: date, /) -> Assignments:
            if waiter.user == "1":
                raise QueryFailed("DataError")
            return await of(waiter, day)

        monkeypatch.setattr(database, "of", except_for_1)
        await trio.sleep(60)
        assert (serves(cursed), serves(other)) == ({9}, {5})
        assert restaurant.sector_assignments.pending == 1


async def test_bug_in_a_query_wakes_all_that_wait_for_it(autojump_clock: MockClock) -> None:
    async with opened() as restaurant:
        restaurant.database.rows = None  # type: ignore[assignment]
        for _ in range(2):
            with pytest.RaisesGroup(AttributeError):
                await restaurant.sector_assignments.assign(make_principal())


# Refresh


async def test_refresh_bypasses_the_cache_and_moves_the_connection(
    autojump_clock: MockClock,
) -> None:
    async with opened() as restaurant:
        restaurant.database.assign(5)
        client = await restaurant.enter()
        restaurant.database.assign(6, 7)
        await restaurant.sector_assignments.refresh(client)
        assert serves(client) == {6, 7}
        assert restaurant.hub.members(client.audiences) == [client]


async def test_refresh_reaches_the_waiters_other_devices(autojump_clock: MockClock) -> None:
    async with opened() as restaurant:
        restaurant.database.assign(5)
        phone, tablet = await restaurant.enter(), await restaurant.enter()
        restaurant.database.assign(6)
        await restaurant.sector_assignments.refresh(phone)
        assert serves(tablet) == {6}
        assert restaurant.database.queries == 2


async def test_refresh_repeats_a_running_query_that_may_predate_the_change(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    async with opened() as restaurant:
        restaurant.database.assign(5)
        client = await restaurant.enter()
        restaurant.database.takes = 1
        nursery.start_soon(restaurant.sector_assignments.refresh, client)
        await trio.sleep(0.5)
        restaurant.database.assign(6)
        await restaurant.sector_assignments.refresh(client)
        assert serves(client) == {6}


async def test_refresh_is_limited_per_connection_to_5_in_10_seconds(
    autojump_clock: MockClock,
) -> None:
    async with opened() as restaurant:
        client = await restaurant.enter()
        other = await restaurant.enter(make_principal(user=22))
        asked = restaurant.database.queries
        for n in range(8):
            restaurant.database.assign(n + 1)
            await restaurant.sector_assignments.refresh(client)
        assert restaurant.database.queries == asked + 5
        assert serves(client) == {5}  # the last that was asked for
        await restaurant.sector_assignments.refresh(other)
        assert restaurant.database.queries == asked + 6

        await trio.sleep(9.9)
        await restaurant.sector_assignments.refresh(client)
        assert restaurant.database.queries == asked + 6
        await trio.sleep(0.1)
        await restaurant.sector_assignments.refresh(client)
        assert restaurant.database.queries == asked + 7
        assert serves(client) == {8}


async def test_constant_refreshes_query_as_often_as_the_limit_allows(
    autojump_clock: MockClock,
) -> None:
    async with opened() as restaurant:
        client = await restaurant.enter()
        for _ in range(100):
            await restaurant.sector_assignments.refresh(client)
            await trio.sleep(1)
        assert restaurant.database.queries == 1 + 50


async def test_failed_refresh_changes_nothing_and_is_repeated(
    autojump_clock: MockClock,
) -> None:
    async with opened() as restaurant:
        restaurant.database.assign(5)
        client = await restaurant.enter()
        restaurant.database.assign(6)
        restaurant.database.down = True
        await restaurant.sector_assignments.refresh(client)
        assert serves(client) == {5}
        restaurant.database.down = False
        await trio.sleep(10)  # though the cache is still good
        assert serves(client) == {6}


# Push


async def test_change_is_applied_at_once_to_all_live_connections_of_the_waiter(
    autojump_clock: MockClock,
) -> None:
    async with opened() as restaurant:
        database = restaurant.database
        database.assign(5)
        phone, tablet = await restaurant.enter(), await restaurant.enter()
        other = await restaurant.enter(make_principal(user=22))
        asked = database.queries
        for user in (21, "21"):
            database.assign(*({6} if user == 21 else {7}))
            now = trio.current_time()
            restaurant.change(user=user)
            await wait_all_tasks_blocked()
            assert serves(phone) == serves(tablet) == ({6} if user == 21 else {7})
            assert trio.current_time() == now
        assert serves(other) == set()
        assert database.queries == asked + 2


async def test_change_during_a_query_repeats_the_query(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    async with opened() as restaurant:
        database = restaurant.database
        database.assign(5)
        database.takes = 1
        clients = list[Connection]()

        async def enter() -> None:
            clients.append(await restaurant.enter())

        nursery.start_soon(enter)
        await trio.sleep(0.5)
        database.assign(6)  # the query has read the row before
        restaurant.change()
        await trio.sleep(2)
        assert serves(clients[0]) == {6}
        assert database.queries == 2
        assert database.most_at_once.total() == 1


async def test_changes_announced_while_the_link_was_down_are_found(
    autojump_clock: MockClock,
) -> None:
    async with opened() as restaurant:
        restaurant.database.assign(5)
        restaurant.database.assign(5, user=22)
        client = await restaurant.enter()
        other = await restaurant.enter(make_principal(user=22))
        await trio.sleep(10)
        restaurant.database.assign(6)
        restaurant.sector_assignments.on_subscribed()
        await trio.sleep(1)
        assert (serves(client), serves(other)) == ({6}, {5})
        queries = restaurant.database.queries
        assert queries == 4
        await trio.sleep(100)
        assert restaurant.database.queries == queries


async def test_cached_answers_are_outdated_after_the_link_was_down(
    autojump_clock: MockClock,
) -> None:
    """Including an answer whose query was running when the link came back."""
    async with opened() as restaurant:
        restaurant.database.assign(5)
        await restaurant.sector_assignments.assign(make_principal())
        await trio.sleep(1)
        restaurant.database.assign(6)
        restaurant.sector_assignments.on_subscribed()
        assert serves(await restaurant.sector_assignments.assign(make_principal())) == {6}
        restaurant.database.takes = 1.5
        async with trio.open_nursery() as nursery:
            client = None

            async def enter() -> None:
                nonlocal client
                client = await restaurant.enter(make_principal(user=23))

            restaurant.database.assign(7, user=23)
            nursery.start_soon(enter)
            await trio.sleep(1)
            restaurant.database.assign(8, user=23)
            restaurant.sector_assignments.on_subscribed()
        assert client is not None
        assert serves(client) == {8}


async def test_announced_changes_are_queried_before_the_check_of_everybody(
    autojump_clock: MockClock,
) -> None:
    async with opened() as restaurant:
        clients = [await restaurant.enter(make_principal(user=user)) for user in range(100)]
        await trio.sleep(1)
        restaurant.database.takes = 0.5
        restaurant.sector_assignments.on_subscribed()
        await trio.sleep(0.1)
        restaurant.database.assign(6, user=99)
        restaurant.change(user=99)
        await trio.sleep(1)
        assert serves(clients[99]) == {6}
        assert max(restaurant.database.most_at_once.values()) == 1
        await trio.sleep(60)
        assert restaurant.database.queries == 200


async def test_change_between_the_answer_and_joining_is_applied(
    autojump_clock: MockClock,
) -> None:
    async with opened() as restaurant:
        restaurant.database.assign(5)
        principal = await restaurant.sector_assignments.assign(make_principal())
        await trio.sleep(1)
        restaurant.database.assign(6)
        restaurant.change()  # nobody of theirs is connected yet
        client = await restaurant.enter(principal, assigned=True)
        await trio.sleep(1)
        assert serves(client) == {6}


async def test_change_of_an_absent_waiter_is_queried_at_the_next_connect(
    autojump_clock: MockClock,
) -> None:
    async with opened() as restaurant:
        restaurant.database.assign(5)
        await restaurant.sector_assignments.assign(make_principal())
        restaurant.database.assign(6)
        restaurant.change()
        await trio.sleep(1)
        assert restaurant.database.queries == 1
        assert serves(await restaurant.enter()) == {6}


async def test_change_is_not_lost_when_its_query_fails(
    autojump_clock: MockClock,
) -> None:
    async with opened() as restaurant:
        restaurant.database.assign(5)
        client = await restaurant.enter()
        restaurant.database.assign(6)
        restaurant.database.down = True
        restaurant.change()
        await trio.sleep(5)
        assert serves(client) == {5}
        restaurant.database.down = False
        await trio.sleep(60)
        assert serves(client) == {6}


@pytest.mark.parametrize(
    "payload",
    [
        b"", b"{", b"[]", b"null", b"\xff", b"{}", b'{"tenant_id":1}', b'{"waiter_id":21}',
        b'{"tenant_id":"1","waiter_id":21}', b'{"tenant_id":1,"waiter_id":"x"}',
        b'{"tenant_id":true,"waiter_id":21}', b'{"tenant_id":1,"waiter_id":2.5}',
        b"[" * 100_000,
    ],
)  # fmt: skip
async def test_invalid_message_is_logged_and_changes_nothing(
    autojump_clock: MockClock, payload: bytes
) -> None:
    async with opened() as restaurant:
        await restaurant.enter()
        with capture_logs() as logs:
            restaurant.sector_assignments.receive(payload)
        await trio.sleep(1)
        assert [line["event"] for line in logs] == ["invalid sectors message"]
        assert restaurant.database.queries == 1


# The wall clock


async def test_change_of_day_reaches_live_connections_within_a_minute_and_a_tick(
    autojump_clock: MockClock,
) -> None:
    async with opened(start=NIGHT) as restaurant:
        restaurant.database.assign(5)
        restaurant.database.assign(6, day=TOMORROW)
        client = await restaurant.enter()
        await trio.sleep(TO_FLIP - 1)
        assert serves(client) == {5}
        await trio.sleep(1 + 66)
        assert serves(client) == {6}


async def test_first_waiter_of_a_branch_just_before_the_change_of_day_gets_it(
    autojump_clock: MockClock,
) -> None:
    async with opened(start=NIGHT) as restaurant:
        restaurant.database.assign(5)
        restaurant.database.assign(6, day=TOMORROW)
        await trio.sleep(TO_FLIP - 0.5)
        client = await restaurant.enter()
        assert serves(client) == {5}
        await trio.sleep(67)
        assert serves(client) == {6}


async def test_waiter_who_connects_after_the_change_of_day_does_not_hide_it_from_others(
    autojump_clock: MockClock,
) -> None:
    async with opened(start=NIGHT) as restaurant:
        restaurant.database.assign(5)
        restaurant.database.assign(6, day=TOMORROW)
        client = await restaurant.enter()
        await trio.sleep(TO_FLIP - 1)  # a look at the clock falls on the flip itself
        restaurant.stepped = 2
        await restaurant.enter(make_principal(user=22))
        assert serves(client) == {5}
        await trio.sleep(67)
        assert serves(client) == {6}


async def test_change_of_day_during_a_query_is_not_missed(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    async with opened(start=NIGHT) as restaurant:
        restaurant.database.assign(5)
        restaurant.database.assign(6, day=TOMORROW)
        await trio.sleep(TO_FLIP - 0.5)
        restaurant.database.takes = 1
        assert serves(await restaurant.sector_assignments.assign(make_principal())) == {6}


async def test_change_of_day_between_the_queries_of_two_branches_is_not_missed(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(start=NIGHT) as restaurant:
        database = restaurant.database
        of = database.of

        async def slow_for_2(waiter: WaiterKey, day: date, /) -> Assignments:
            await trio.sleep(2 if waiter.branch == 2 else 0)
            return await of(waiter, day)

        monkeypatch.setattr(database, "of", slow_for_2)
        database.assign(5)
        database.assign(6, day=TOMORROW)
        await trio.sleep(TO_FLIP - 1)
        client = await restaurant.enter(make_principal(branches=[1, 2]))
        assert trio.current_time() > TO_FLIP
        await trio.sleep(0.1)
        assert serves(client) == {6}


async def test_change_of_day_is_spread_over_a_minute_with_one_query_per_waiter(
    autojump_clock: MockClock,
) -> None:
    async with opened(start=NIGHT) as restaurant:
        clients = []
        for user in range(120):
            restaurant.database.assign(5, user=user)
            restaurant.database.assign(6, user=user, day=TOMORROW)
            clients.append(await restaurant.enter(make_principal(user=user)))
        restaurant.database.asked.clear()
        restaurant.database.takes = 0.1  # which does not make it longer
        await trio.sleep(TO_FLIP + 70 - trio.current_time())

        assert {frozenset(serves(client)) for client in clients} == {frozenset({6})}
        when = [at - TO_FLIP for at, _, _ in restaurant.database.asked]
        assert len(when) == 120
        assert 0 <= min(when) <= 5.25
        assert 59 <= max(when) - min(when) <= 60
        assert Counter(int((at - min(when)) // 10) for at in when) == dict.fromkeys(range(6), 20)


async def test_yesterdays_sectors_hold_while_the_database_is_down(
    autojump_clock: MockClock,
) -> None:
    async with opened(start=NIGHT) as restaurant:
        restaurant.database.assign(5)
        restaurant.database.assign(6, day=TOMORROW)
        client = await restaurant.enter()
        restaurant.database.down = True
        await trio.sleep(TO_FLIP + 3600)
        assert serves(client) == {5}
        restaurant.database.down = False
        await trio.sleep(40)
        assert serves(client) == {6}


async def test_shift_change_reaches_live_connections_without_a_query(
    autojump_clock: MockClock,
) -> None:
    windows = read_windows(("MORNING=06:00-14:00", "AFTERNOON=14:00-22:00"))
    async with opened(ttl=1e6, windows=windows) as restaurant:
        restaurant.database.rows[1, 1, "21", TODAY] = {
            (5, "MORNING"), (6, "AFTERNOON"), (7, None), (8, "NIGHT"),
        }  # fmt: skip
        client = await restaurant.enter()
        assert serves(client) == {5, 7, 8}
        await trio.sleep(2 * 3600 - 1)
        assert serves(client) == {5, 7, 8}
        await trio.sleep(1 + 66)
        assert serves(client) == {6, 7, 8}
        assert restaurant.database.queries == 1


async def test_each_branch_changes_day_at_its_own_hour(autojump_clock: MockClock) -> None:
    place = (TenantId(1), BranchId(2))
    async with opened(start=NOON + 7 * 3600, zones={place: ZoneInfo("Asia/Tokyo")}) as restaurant:
        database = restaurant.database
        database.assign(5)
        database.assign(6, day=TOMORROW)
        database.assign(5, branch=2)
        database.assign(6, branch=2, day=TOMORROW)
        client = await restaurant.enter(make_principal(branches=[1, 2]))
        await trio.sleep(3600 + 66)  # 05:01 in Tokyo
        assert (serves(client, 1), serves(client, 2)) == ({5}, {6})


@pytest.mark.parametrize("step", [-86_400.0, 86_400.0])
async def test_step_of_the_wall_clock_is_followed(autojump_clock: MockClock, step: float) -> None:
    async with opened() as restaurant:
        there = date.fromordinal(TODAY.toordinal() + int(step // 86_400))
        restaurant.database.assign(5)
        restaurant.database.assign(6, day=there)
        client = await restaurant.enter()
        await trio.sleep(10)
        restaurant.stepped = step
        await trio.sleep(10)
        assert serves(client) == {6}
        restaurant.stepped = 0
        await trio.sleep(10)
        assert serves(client) == {5}


async def test_no_change_costs_no_query(autojump_clock: MockClock) -> None:
    async with opened(start=NIGHT, cut_off=time(5)) as restaurant:
        await restaurant.enter()
        await trio.sleep(TO_FLIP - 1)
        assert restaurant.database.queries == 1


# Moves while events are delivered

_sets = st.frozensets(st.integers(1, 3), max_size=3)
_steps: st.SearchStrategy[list[tuple[str, Any]]] = st.lists(
    st.one_of(
        st.tuples(st.just("deliver"), st.lists(st.integers(0, 3), min_size=1, max_size=4)),
        st.tuples(st.just("serve"), _sets),
        st.tuples(st.just("yield"), st.integers(1, 4)),
    ),
    min_size=1,
    max_size=14,
)


@given(_steps, _sets, st.integers(1, 3))
def test_move_while_batches_are_delivered_neither_loses_nor_doubles_an_event(
    steps: list[tuple[str, Any]], first: Iterable[int], writes_per_checkpoint: int
) -> None:
    """Sector 9 is served throughout; 1 to 3 change, also between two writes of a batch."""

    async def run() -> None:
        hub = Hub()
        dispatch = Dispatch(hub, writes_per_checkpoint=writes_per_checkpoint)
        database = Database()
        sector_assignments = SectorAssignments(
            database, hub, Breaker(5, 30), wall_clock=lambda: NOON
        )
        published = 0
        throughout: list[int] = []  # what it must hear
        now_and_then: dict[int, int] = {}  # the sector of what it may hear
        served: set[int] = {9, *first}

        async with trio.open_nursery() as nursery:

            async def enter(principal: Principal) -> tuple[Connection, FakeSocket]:
                client = Connection(await sector_assignments.assign(principal), FOR_EVER)
                socket = FakeSocket()
                nursery.start_soon(client.run, socket, hub)
                await wait_all_tasks_blocked()
                return client, socket

            for user in range(30, 36):  # others, so that a batch takes several checkpoints
                database.assign(1, 2, 3, 9, user=user)
                await enter(make_principal(user=user))
            database.assign(1, 2, 3, 9, tenant=2)
            _, other_tenant = await enter(make_principal(tenant=2))
            database.assign(9, *first)
            client, socket = await enter(make_principal())

            async with trio.open_nursery() as work:
                for what, value in steps:
                    if what == "deliver":
                        batch = []
                        for sector in value:
                            (throughout if sector == 0 else []).append(published)
                            now_and_then[published] = sector
                            batch.append(make_event(sector_id=sector or 9, data=published))
                            published += 1
                        work.start_soon(dispatch.deliver, batch)
                    elif what == "serve":
                        served |= set(value)
                        database.assign(9, *value)
                        work.start_soon(sector_assignments.refresh, client)
                    else:
                        for _ in range(value):
                            await trio.lowlevel.checkpoint()

            heard = [json.loads(text)["data"] for text in socket.texts]
            assert len(heard) == len(set(heard))
            assert set(throughout) <= set(heard)
            assert all((now_and_then[n] or 9) in served for n in heard)
            assert other_tenant.texts == []
            assert hub.members(client.audiences)
            nursery.cancel_scope.cancel()

    trio.run(run, clock=MockClock(autojump_threshold=0))


@given(st.lists(_sets, min_size=1, max_size=6))
def test_after_any_moves_the_hub_has_exactly_the_last_sectors(
    serving: list[frozenset[int]],
) -> None:
    hub = Hub()
    client = Connection(make_principal(), FOR_EVER)
    hub.join(client)
    for each in serving:
        hub.move(client, make_principal(sectors=each))

    def heard() -> set[int]:
        here = (TenantId(1), BranchId(1))
        return {n for n in (1, 2, 3) if hub.hears([waiters(*here, SectorId(n))])}

    assert heard() == serving[-1]
    hub.leave(client)
    assert heard() == set()
