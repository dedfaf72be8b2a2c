"""The hub: which connections are in which audience, and how many there may be."""

from contextlib import suppress
from itertools import product

import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule
from trio.testing import MockClock, wait_all_tasks_blocked

from trio_gateway.core.audiences import (
    Audience,
    BranchId,
    Endpoint,
    Principal,
    SectorId,
    TenantId,
    admins,
    audiences_of,
    floor,
    waiters,
)
from trio_gateway.core.capacity import CapacityLimits, Owner
from trio_gateway.core.close_codes import Close, Rejected
from trio_gateway.core.routing import ROUTES
from trio_gateway.runtime.connection import Connection, ConnectionLimits
from trio_gateway.runtime.hub import Hub
from trio_gateway.testing import FakeSocket, make_event, make_principal

ONE = TenantId(1)
BRANCH = BranchId(1)
TYPES = ("ROUND_READY", "ROUND_PENDING", "PRODUCT_AVAILABILITY_CHANGED", "CART_SYNC", "NEW")
EVENTS = [
    make_event(type_, tenant_id=tenant, branch_id=branch, sector_id=sector, session_id=session)
    for type_, tenant, branch, sector, session in product(
        TYPES, (1, 2, 3), (0, 1, 2), (None, 5), (None, 7)
    )
]


def joined(hub: Hub, principal: Principal) -> Connection:
    hub.admit(principal)
    connection = Connection(principal, ConnectionLimits())
    hub.join(connection)
    return connection


def refusal(hub: Hub, principal: Principal) -> tuple[Close, str] | None:
    try:
        hub.admit(principal)
    except Rejected as rejected:
        return rejected.close, rejected.label
    return None


def test_total_is_limited() -> None:
    hub = Hub(CapacityLimits(total=2, per_user=9, per_session=9))
    joined(hub, make_principal(user=1))
    leaver = joined(hub, make_principal(user=2))

    assert refusal(hub, make_principal(user=3)) == (Close.SERVER_OVERLOADED, "total_limit")
    hub.leave(leaver)
    assert refusal(hub, make_principal(user=3)) is None


def test_number_of_messages_does_not_fall_while_a_connection_leaves() -> None:
    hub = Hub()
    seen = [hub.messages]
    stays, leaver = joined(hub, make_principal(user=1)), joined(hub, make_principal(user=2))
    stays.messages = 2
    leaver.messages = 3
    seen.append(hub.messages)
    hub.leave(leaver)
    seen.append(hub.messages)
    hub.finish(leaver)
    seen.append(hub.messages)

    assert seen == [0, 5, 5, 5]


@given(
    st.lists(
        st.builds(
            make_principal,
            st.sampled_from(list(Endpoint)),
            tenant=st.integers(1, 2),
            branches=st.sets(st.integers(1, 2)),
            sectors=st.sets(st.integers(5, 6)),
            session=st.integers(7, 8),
        ),
        max_size=3,
    )
)
def test_event_that_concerns_no_connection_has_no_recipient(principals: list[Principal]) -> None:
    hub = Hub()
    connections = [joined(hub, principal) for principal in principals]
    tenants = {principal.tenant for principal in principals}
    for event in EVENTS:
        assert hub.concerns(event) or not hub.hears(ROUTES.audiences(event))
        assert event.tenant in tenants or not hub.concerns(event)
    for connection in connections:
        hub.leave(connection)
        hub.finish(connection)
    assert not hub.concerns(make_event(session_id=7))
    assert not hub._branches


def test_user_limit_counts_all_endpoints() -> None:
    hub = Hub(CapacityLimits(total=99, per_user=3, per_session=9))
    for endpoint in (Endpoint.WAITER, Endpoint.KITCHEN, Endpoint.ADMIN):
        joined(hub, make_principal(endpoint, user=7))

    assert refusal(hub, make_principal(Endpoint.WAITER, user=7)) == (
        Close.SERVER_OVERLOADED,
        "user_limit",
    )
    assert refusal(hub, make_principal(Endpoint.WAITER, user=8)) is None


def test_same_user_number_in_another_tenant_is_another_user() -> None:
    hub = Hub(CapacityLimits(total=99, per_user=1, per_session=9))
    joined(hub, make_principal(tenant=1, user=7))

    assert refusal(hub, make_principal(tenant=1, user=7)) == (Close.SERVER_OVERLOADED, "user_limit")
    assert refusal(hub, make_principal(tenant=2, user=7)) is None


def test_session_has_a_limit_of_its_own() -> None:
    hub = Hub(CapacityLimits(total=99, per_user=1, per_session=2))
    for _ in range(2):
        joined(hub, make_principal(Endpoint.DINER, session=5))

    assert refusal(hub, make_principal(Endpoint.DINER, session=5)) == (
        Close.SERVER_OVERLOADED,
        "session_limit",
    )
    assert refusal(hub, make_principal(Endpoint.DINER, session=6)) is None
    assert refusal(hub, make_principal(Endpoint.DINER, tenant=2, session=5)) is None
    assert refusal(hub, make_principal(Endpoint.WAITER, user=5)) is None


def test_tenant_has_a_limit_of_its_own() -> None:
    hub = Hub(CapacityLimits(total=99, per_user=9, per_session=9, per_tenant=3))
    leaver = joined(hub, make_principal(user=1))
    joined(hub, make_principal(Endpoint.DINER, session=2))

    with hub.reserve(make_principal(user=3)):
        assert refusal(hub, make_principal(user=4)) == (Close.SERVER_OVERLOADED, "tenant_limit")
        assert refusal(hub, make_principal(tenant=2, user=4)) is None
    assert refusal(hub, make_principal(user=4)) is None
    joined(hub, make_principal(user=4))
    assert refusal(hub, make_principal(Endpoint.DINER)) == (Close.SERVER_OVERLOADED, "tenant_limit")
    hub.leave(leaver)
    assert refusal(hub, make_principal(Endpoint.DINER)) is None


def test_user_at_its_limit_in_a_full_tenant_is_told_of_its_own() -> None:
    """Room can be made there, which makes room in the tenant."""
    hub = Hub(CapacityLimits(total=1, per_user=1, per_session=1, per_tenant=1))
    joined(hub, make_principal(user=1))

    assert refusal(hub, make_principal(user=1)) == (Close.SERVER_OVERLOADED, "user_limit")
    assert refusal(hub, make_principal(user=2)) == (Close.SERVER_OVERLOADED, "tenant_limit")


def test_each_place_that_becomes_free_is_told_after_it_is() -> None:
    hub, told = Hub(CapacityLimits(total=9, per_user=9, per_session=9, per_tenant=9)), []

    def note(owner: Owner) -> None:
        told.append((hub.places_of(owner), hub.places_of_tenant(owner[1])))

    hub.on_freed = note
    principal = make_principal()
    first, second = joined(hub, principal), joined(hub, principal)
    with hub.reserve(principal):
        pass
    assert told == []  # it was given to whoever joins next
    with suppress(ValueError), hub.reserve(principal):
        raise ValueError
    hub.leave(first)
    hub.leave(second)
    hub.leave(second)
    assert told == [(2, 2), (1, 1), (0, 0)]


def test_check_for_admission_leaves_nothing_behind() -> None:
    hub = Hub(CapacityLimits(total=1, per_user=1, per_session=1))
    for user in range(100):
        hub.admit(make_principal(user=user))

    assert not hub._owned


def test_without_limits_all_are_admitted() -> None:
    hub = Hub()
    for _ in range(50):
        joined(hub, make_principal())

    assert len(hub) == 50
    assert hub.by_endpoint[Endpoint.WAITER] == 50


def test_member_of_several_audiences_is_found_once() -> None:
    hub = Hub()
    connection = joined(hub, make_principal(branches=(1, 2), sectors=(5, 6), roles=["ADMIN"]))

    assert len(connection.audiences) == 9
    assert hub.members(connection.audiences) == [connection]


def test_empty_audiences_have_no_members() -> None:
    hub = Hub()
    joined(hub, make_principal())

    assert hub.members([]) == []
    assert hub.members([admins(ONE, BRANCH)]) == []


def test_members_are_a_snapshot() -> None:
    hub = Hub()
    connection = joined(hub, make_principal())

    members = hub.members([floor(ONE, BRANCH)])
    hub.leave(connection)

    assert members == [connection]
    assert hub.members([floor(ONE, BRANCH)]) == []


def test_connection_that_moves_is_in_its_new_audiences_only() -> None:
    hub = Hub()
    connection = joined(hub, make_principal(sectors=(5,)))

    hub.move(connection, make_principal(sectors=(6,)))

    assert not hub.hears([waiters(ONE, BRANCH, SectorId(5))])
    assert hub.members([waiters(ONE, BRANCH, SectorId(6))]) == [connection]
    assert hub.members([floor(ONE, BRANCH)]) == [connection]


def test_connection_that_has_left_does_not_move() -> None:
    hub = Hub()
    connection = joined(hub, make_principal(sectors=(5,)))
    hub.leave(connection)

    hub.move(connection, make_principal(sectors=(6,)))

    assert not hub.hears([waiters(ONE, BRANCH, SectorId(6))])


def test_connection_that_left_is_leaving_until_it_is_finished() -> None:
    hub = Hub()
    connection = joined(hub, make_principal())

    hub.leave(connection)
    assert (len(hub), hub.leaving) == (0, {connection})
    hub.finish(connection)
    assert not hub.leaving
    assert hub.closed == {Close.ABNORMAL: 1}


async def test_wait_empty_of_an_empty_hub_returns(autojump_clock: MockClock) -> None:
    await Hub().wait_empty()

    assert trio.current_time() == 0


async def test_wait_empty_waits_for_the_last_close(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    hub, early, late = Hub(), FakeSocket(), FakeSocket()
    for socket in (early, late):
        nursery.start_soon(Connection(make_principal(), ConnectionLimits()).run, socket, hub)
    waited = []

    async def wait() -> None:
        await hub.wait_empty()
        waited.append(trio.current_time())

    await wait_all_tasks_blocked()
    for _ in range(3):  # each task that waits
        nursery.start_soon(wait)
    await trio.sleep(1)
    await early.client.leave()
    await trio.sleep(1)
    await late.client.leave()
    await trio.sleep(1)

    assert waited == [2, 2, 2]


async def test_wait_empty_waits_for_a_connection_that_joins_meanwhile(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    hub = Hub()
    first = joined(hub, make_principal())
    waited = []

    async def wait() -> None:
        await hub.wait_empty()
        waited.append(trio.current_time())

    nursery.start_soon(wait)
    await wait_all_tasks_blocked()
    hub.leave(first)
    hub.finish(first)
    second = joined(hub, make_principal())
    await trio.sleep(1)
    assert waited == []
    hub.leave(second)
    hub.finish(second)
    await wait_all_tasks_blocked()
    assert waited == [1]


ROLES = st.frozensets(st.sampled_from(["WAITER", "MANAGER", "ADMIN", "KITCHEN"]))
SMALL = st.sampled_from([1, 2])
PRINCIPALS = st.builds(
    make_principal,
    st.sampled_from(Endpoint),
    tenant=SMALL,
    user=SMALL,
    session=SMALL,
    branches=st.frozensets(SMALL, min_size=1),
    sectors=st.frozensets(st.integers(1, 3)),
    roles=ROLES,
)


class HubAgainstPlainSets(RuleBasedStateMachine):
    """The hub does what a dictionary of sets does, and empties to nothing."""

    inside = Bundle("inside")
    outside = Bundle("outside")

    def __init__(self) -> None:
        super().__init__()
        self.hub = Hub()
        self.model: dict[Connection, frozenset[Audience]] = {}
        self.leaving: set[Connection] = set()
        self.known: set[Audience] = set()

    @rule(target=inside, principal=PRINCIPALS)
    def join(self, principal: Principal) -> Connection:
        connection = joined(self.hub, principal)
        self.model[connection] = audiences_of(principal)
        return connection

    @rule(connection=inside, other=PRINCIPALS)
    def move(self, connection: Connection, other: Principal) -> None:
        mine = connection.principal
        principal = make_principal(
            mine.endpoint,
            tenant=mine.tenant,
            user=int(mine.user or 0),
            session=mine.session or 0,
            branches=other.branches,
            sectors=frozenset().union(*other.sectors.values()),
            roles=other.roles,
        )
        self.hub.move(connection, principal)
        self.model[connection] = audiences_of(principal)
        assert connection.principal is principal

    @rule(target=outside, connection=consumes(inside))
    def leave(self, connection: Connection) -> Connection:
        self.hub.leave(connection)
        del self.model[connection]
        self.leaving.add(connection)
        return connection

    @rule(connection=consumes(outside))
    def finish(self, connection: Connection) -> None:
        self.hub.finish(connection)
        self.leaving.discard(connection)

    @invariant()
    def members_are_exact(self) -> None:
        self.known.update(*self.model.values())
        for audience in self.known:
            expected = {c for c, audiences in self.model.items() if audience in audiences}
            found = self.hub.members([audience])
            assert len(found) == len(expected)
            assert set(found) == expected
            assert self.hub.hears([audience]) is bool(expected)
        members = self.hub.members(self.known)
        assert len(members) == len(self.model)
        assert set(members) == set(self.model)

    @invariant()
    def counts_are_exact(self) -> None:
        hub = self.hub
        assert list(hub.connections) == list(self.model)
        assert hub.leaving == self.leaving
        for endpoint in Endpoint:
            count = sum(c.principal.endpoint is endpoint for c in self.model)
            assert hub.by_endpoint[endpoint] == count
        for owner in {c.principal.owner for c in self.model}:
            assert set(hub._owned[owner]) == {c for c in self.model if c.principal.owner == owner}

    def teardown(self) -> None:
        for connection in list(self.model):
            self.hub.leave(connection)
            self.hub.finish(connection)
        assert not self.hub._members
        assert not self.hub._owned
        assert not any(self.hub.by_endpoint.values())


TestHubAgainstPlainSets = HubAgainstPlainSets.TestCase
TestHubAgainstPlainSets.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
