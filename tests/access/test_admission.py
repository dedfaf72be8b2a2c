"""Admission checks again after an await what it checked before; in virtual time."""

import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from trio_gateway.access.admission import Admission, PendingAdmission
from trio_gateway.access.revocations import Revocations
from trio_gateway.access.tickets import Tickets
from trio_gateway.broker.commands import Unavailable
from trio_gateway.core.audiences import BranchId, Endpoint, Principal, SectorId
from trio_gateway.core.client_request import ClientRequest
from trio_gateway.core.close_codes import Close, Rejected
from trio_gateway.runtime.connection import Connection, ConnectionLimits
from trio_gateway.runtime.hub import Hub, Reservation
from trio_gateway.settings import Settings
from trio_gateway.testing import FakeSocket, make_jwt, make_principal

SECRET = "0123456789abcdef" * 4
NOW = 1_790_000_000.0
FOR_EVER = ConnectionLimits(stale_after=float("inf"), receive_timeout=float("inf"))


class Redis:
    """Keys that take a tenth of a second to read; reading fails while it is down."""

    def __init__(self) -> None:
        self.seconds = 0.1
        self.keys: dict[str, bytes] = {}
        self.down = False
        self.reads = 0

    async def mget(self, keys: Sequence[str]) -> list[bytes | None]:
        self.reads += 1
        found = [self.keys.get(key) for key in keys]
        await trio.sleep(self.seconds)
        if self.down:
            raise Unavailable("down")
        return found

    async def get(self, key: str) -> bytes | None:
        return (await self.mget([key]))[0]

    async def getdel(self, key: str) -> bytes | None:
        found = await self.get(key)
        self.keys.pop(key, None)
        return found

    async def set_for(self, key: str, value: str, _seconds: int) -> None:
        self.keys[key] = value.encode()


class Link:
    """A way to the same keys of its own; whoever takes it fails while it is broken."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self.is_open = True
        self.is_broken = False
        self.answers = 0

    async def ask(self, _command: str, *keys: str, seconds: float) -> list[bytes | None]:
        if self.is_broken:
            raise Unavailable("broken")
        self.answers += 1
        with trio.fail_after(seconds):
            return await self._redis.mget(keys)


class Places:
    """Reserves places in the hub, which takes a tenth of a second; full owners get none."""

    def __init__(self, hub: Hub) -> None:
        self.hub = hub
        self.asked = 0
        self.has_room = True

    async def reserve_all(self, principals: Sequence[Principal]) -> list[Reservation | None]:
        self.asked += len(principals)
        found = [self.hub.reserve(each) if self.has_room else None for each in principals]
        await trio.sleep(0.1)
        return found


class SlowSectorAssignments:
    """Takes a second and a half to find the sectors, unless it knows them."""

    def __init__(self, *, knows: bool) -> None:
        self.sectors = {5}
        self.knows = knows

    def assign_nowait(self, principal: Principal) -> Principal | None:
        return self.latest(principal) if self.knows else None

    async def assign(self, principal: Principal) -> Principal:
        found = self.latest(principal)
        await trio.sleep(1.5)
        return found

    def latest(self, principal: Principal) -> Principal:
        sectors = frozenset(map(SectorId, self.sectors))
        return replace(principal, sectors={BranchId(1): sectors})


class World:
    """An admission with everything it needs."""

    def __init__(
        self,
        *,
        checks_revocations: bool = True,
        knows_sectors: bool = False,
        has_link: bool = False,
    ) -> None:
        self.redis = Redis()
        self.sector_assignments = SlowSectorAssignments(knows=knows_sectors)
        self.hub = Hub()
        commands: Any = self.redis
        self.link = Link(self.redis)
        link: Any = self.link
        self.revocations = Revocations(commands, self.hub, link=link if has_link else None)
        settings = Settings(jwt_secret=SECRET, table_token_secret=SECRET[::-1])
        sector_assignments: Any = self.sector_assignments
        self.tickets = Tickets(commands)
        self.admission = Admission(
            settings,
            tickets=self.tickets,
            revocations=self.revocations if checks_revocations else None,
            sector_assignments=sector_assignments,
            clock=lambda: NOW + trio.current_time(),
        )
        self.outcome: PendingAdmission | Principal | Rejected | None = None

    async def admit(self, **query: str) -> None:
        try:
            self.outcome = await self.admission.admit(ClientRequest(Endpoint.WAITER, query, {}))
        except Rejected as rejected:
            self.outcome = rejected

    async def try_to_admit(self, **query: str) -> None:
        try:
            self.outcome = await self.admission.try_admit(ClientRequest(Endpoint.WAITER, query, {}))
        except Rejected as rejected:
            self.outcome = rejected

    async def renew(self, token: str) -> None:
        try:
            self.outcome = await self.admission.renew(make_principal(), token)
        except Rejected as rejected:
            self.outcome = rejected

    @property
    def refusal(self) -> tuple[Close, str] | None:
        outcome = self.outcome
        return (outcome.close, outcome.text) if isinstance(outcome, Rejected) else None


@asynccontextmanager
async def opened(interval: float = 300, **options: bool) -> AsyncIterator[World]:
    async with trio.open_nursery() as nursery:
        world = World(**options)
        nursery.start_soon(world.revocations.answer_checks)
        nursery.start_soon(world.revocations.sweep, interval)
        yield world
        nursery.cancel_scope.cancel()


def token(**claims: Any) -> str:
    found: dict[str, Any] = {"jti": "a", "iat": NOW - 60, "exp": NOW + 600} | claims
    return make_jwt(SECRET, **found)


def by_message(world: World) -> None:
    world.revocations.receive(b'{"jti":"a"}')


def by_users_message(world: World) -> None:
    world.revocations.receive(b'{"user_id":21}')


def by_key(world: World) -> None:
    world.redis.keys["auth:token:blacklist:a"] = b"1"


def by_users_key(world: World) -> None:
    world.redis.keys["auth:user:revoked:21"] = b"2030-01-01T00:00:00"


def by_key_alone_since_the_message_was_lost(world: World) -> None:
    by_key(world)
    world.revocations.on_subscribed()


REVOCATIONS = [by_message, by_users_message, by_key, by_users_key]
REVOKED = (Close.AUTH_FAILED, "token revoked")


@pytest.mark.parametrize("revoke", REVOCATIONS)
@pytest.mark.parametrize("way", ["token", "ticket", "renewal"])
async def test_token_that_is_revoked_while_its_sectors_are_looked_up_is_refused(
    autojump_clock: MockClock, way: str, revoke: Any
) -> None:
    async with opened() as world, trio.open_nursery() as nursery:
        if way == "renewal":
            nursery.start_soon(world.renew, token())
        elif way == "ticket":
            ticket = await world.tickets.issue(token(), 7)
            nursery.start_soon(lambda: world.admit(ticket=ticket))
        else:
            nursery.start_soon(lambda: world.admit(token=token()))
        await trio.sleep(1)
        revoke(world)
        await trio.sleep(2)
        assert world.refusal == REVOKED
        assert not world.revocations.watches


@pytest.mark.parametrize("revoke", [*REVOCATIONS, by_key_alone_since_the_message_was_lost])
async def test_token_that_is_revoked_while_its_revocation_is_looked_up_is_refused_or_closed(
    autojump_clock: MockClock, revoke: Any
) -> None:
    async with opened() as world, trio.open_nursery() as nursery:
        nursery.start_soon(lambda: world.admit(token=token()))
        await trio.sleep(1.55)  # Redis has read the keys, and is on the way to us
        revoke(world)
        await trio.sleep(2)
        if revoke in {by_key, by_users_key}:  # as one that is revoked right after it has joined
            assert isinstance(world.outcome, PendingAdmission)
        else:
            assert world.refusal == REVOKED


async def test_revocation_between_admission_and_joining_is_noticed(
    autojump_clock: MockClock,
) -> None:
    async with opened() as world:
        await world.admit(token=token())
        pending = world.outcome
        assert isinstance(pending, PendingAdmission)
        with pending:
            assert world.admission.confirm(pending) is not None
            by_key_alone_since_the_message_was_lost(world)
            assert world.admission.confirm(pending) is None  # look again
            with pytest.raises(Rejected, match="revoked"):
                await world.admission.recheck(pending)
            by_message(world)
            with pytest.raises(Rejected, match="revoked"):
                world.admission.confirm(pending)
        assert not world.revocations.watches


async def test_token_that_expires_during_admission_is_refused(autojump_clock: MockClock) -> None:
    async with opened() as world:
        await world.admit(token=token(exp=NOW + 1))
        assert isinstance(world.outcome, PendingAdmission)
        with world.outcome as pending, pytest.raises(Rejected, match="expired"):
            world.admission.confirm(pending)


async def test_client_joins_with_sectors_that_changed_during_admission(
    autojump_clock: MockClock,
) -> None:
    async with opened() as world:
        await world.admit(token=token())
        assert isinstance(world.outcome, PendingAdmission)
        world.sector_assignments.sectors = {6}
        with world.outcome as pending:
            found = world.admission.confirm(pending)
        assert found is not None
        assert found.sectors == {BranchId(1): frozenset({SectorId(6)})}


async def test_cancelled_admission_is_no_longer_watched(autojump_clock: MockClock) -> None:
    async with opened() as world:
        for seconds in (0.5, 1.55):
            with trio.move_on_after(seconds):
                await world.admit(token=token())
            assert world.outcome is None
            assert not world.revocations.watches


@pytest.mark.parametrize(
    "revoke", [by_message, by_users_message, by_key_alone_since_the_message_was_lost]
)
async def test_client_that_waits_for_revocations_alone_is_refused_if_it_is_revoked(
    autojump_clock: MockClock, revoke: Any
) -> None:
    async with opened(knows_sectors=True) as world, trio.open_nursery() as nursery:
        nursery.start_soon(lambda: world.try_to_admit(token=token()))
        await trio.sleep(0.05)  # Redis has read the keys, and is on the way to us
        revoke(world)
        await trio.sleep(1)
        assert world.refusal == REVOKED
        assert not world.revocations.watches


async def test_client_with_known_sectors_waits_for_revocations_alone(
    autojump_clock: MockClock,
) -> None:
    async with opened(knows_sectors=True) as world:
        began = trio.current_time()
        await world.try_to_admit(token=token())
        assert isinstance(world.outcome, PendingAdmission)
        assert trio.current_time() - began < 0.2
        assert world.outcome.principal.sectors == {1: {5}}
        assert world.outcome.watch in world.revocations.watches


@pytest.mark.parametrize(("knows_sectors", "name"), [(False, "token"), (True, "ticket")])
async def test_client_that_has_to_wait_for_more_than_revocations_is_left_to_a_slower_way(
    autojump_clock: MockClock, name: str, *, knows_sectors: bool
) -> None:
    async with opened(knows_sectors=knows_sectors) as world:
        await world.try_to_admit(**{name: token()})
        assert world.outcome is None
        assert not world.redis.reads


async def test_check_of_a_crowd_ends_in_time_if_redis_does_not_answer(
    autojump_clock: MockClock,
) -> None:
    failed: list[float] = []

    async def check(world: World) -> None:
        with pytest.raises(Rejected) as refused:
            await world.revocations.check(make_principal())
        assert refused.value.close is Close.SERVER_OVERLOADED
        failed.append(trio.current_time())

    async with opened() as world:
        world.redis.seconds = 60
        began = trio.current_time()
        async with trio.open_nursery() as nursery:
            for _ in range(1000):  # several commands
                nursery.start_soon(check, world)
        assert len(failed) == 1000
        assert max(failed) - began < 5.1
        world.redis.seconds = 0.1
        await world.revocations.check(make_principal())


async def test_ticket_is_valid_until_it_is_redeemed(autojump_clock: MockClock) -> None:
    async with opened() as world:
        ticket = await world.tickets.issue(token(), 7)
        await world.admit(ticket=ticket)
        first = world.outcome
        await world.admit(ticket=ticket)
        assert isinstance(first, PendingAdmission)
        assert isinstance(world.outcome, PendingAdmission)
        assert first.ticket is not None
        await world.admission.redeem(first.ticket)
        with pytest.raises(Rejected, match="ticket invalid"):
            await world.admission.redeem(ticket)


async def test_tenant_in_a_ticket_is_a_hint_that_decides_nothing(
    autojump_clock: MockClock,
) -> None:
    async with opened() as world:
        ticket = await world.tickets.issue(token(), 7)
        hint, secret = ticket.split(".")
        assert hint == "7"
        for changed in (secret, f".{secret}", f"8.{secret}", f"x.y.{secret}", ticket):
            assert await world.tickets.peek(changed) == token()
        for wrong in (hint, f"{hint}.", f"{secret}.{hint}", ""):
            with pytest.raises(Rejected, match="ticket invalid"):
                await world.tickets.peek(wrong)
        assert await world.tickets.redeem(f"8.{secret}") == token()
        with pytest.raises(Rejected, match="ticket invalid"):
            await world.tickets.redeem(ticket)


async def test_recheck_without_revocations_returns_at_once(
    autojump_clock: MockClock,
) -> None:
    async with opened(checks_revocations=False) as world:
        await world.admit(token=token())
        assert isinstance(world.outcome, PendingAdmission)
        with world.outcome as pending:
            pending.watch.stale = True
            assert world.admission.confirm(pending) is None
            await world.admission.recheck(pending)
            assert world.admission.confirm(pending) is not None


# Live connections


@asynccontextmanager
async def connected(world: World, **keys: Any) -> AsyncIterator[tuple[Connection, FakeSocket]]:
    principal = replace(make_principal(), token_id="a", issued_at=NOW - 60, **keys)
    client, socket = Connection(principal, FOR_EVER), FakeSocket()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.run, socket, world.hub)
        await wait_all_tasks_blocked()
        yield client, socket
        nursery.cancel_scope.cancel()


async def test_all_connections_are_checked_within_seconds_after_messages_may_have_been_lost(
    autojump_clock: MockClock,
) -> None:
    async with opened() as world, connected(world) as (_, socket):
        await trio.sleep(10)
        by_key(world)
        await trio.sleep(10)
        assert socket.closed is None
        world.revocations.on_subscribed()
        await trio.sleep(1)
        assert socket.closed is Close.AUTH_FAILED


async def test_check_of_all_connections_is_spread_over_seconds_in_batches(
    autojump_clock: MockClock,
) -> None:
    async with opened() as world, trio.open_nursery() as nursery:
        for user in range(1000):
            client = Connection(make_principal(user=user), FOR_EVER)
            nursery.start_soon(client.run, FakeSocket(), world.hub)
        await trio.sleep(1)
        before = world.redis.reads
        world.revocations.on_subscribed()
        await trio.sleep(0.5)
        assert world.redis.reads - before == 1
        await trio.sleep(3)
        assert world.redis.reads - before == 4
        await trio.sleep(60)
        assert world.redis.reads - before == 4
        nursery.cancel_scope.cancel()


async def test_failed_sweep_is_repeated_as_soon_as_redis_is_back(
    autojump_clock: MockClock,
) -> None:
    async with opened() as world, connected(world) as (_, socket):
        world.redis.down = True
        by_key(world)
        await trio.sleep(400)
        assert socket.closed is None
        world.redis.down = False
        await trio.sleep(2)
        assert socket.closed is Close.AUTH_FAILED


async def test_sweep_does_not_close_a_connection_whose_token_was_renewed(
    autojump_clock: MockClock,
) -> None:
    async with opened() as world, connected(world) as (client, socket):
        by_key(world)
        await trio.sleep(300.05)  # the answer is on the way
        world.hub.move(client, replace(client.principal, token_id="b"))
        await trio.sleep(10)
        assert socket.closed is None
        world.redis.keys["auth:token:blacklist:b"] = b"1"
        await trio.sleep(300)
        assert socket.closed is Close.AUTH_FAILED


async def test_sector_change_during_a_sweep_does_not_hide_a_revocation(
    autojump_clock: MockClock,
) -> None:
    async with opened() as world, connected(world) as (client, socket):
        by_key(world)
        await trio.sleep(300.05)
        world.hub.move(client, replace(client.principal, sectors={}))
        await trio.sleep(1)
        assert socket.closed is Close.AUTH_FAILED


async def test_revocation_message_affects_only_its_pending_admission(
    autojump_clock: MockClock,
) -> None:
    async with opened() as world:
        await world.admit(token=token())
        assert isinstance(world.outcome, PendingAdmission)
        with world.outcome as pending:
            for other in ({"jti": "b"}, {"user_id": 22}, {"jti": "a", "tenant_id": 2}):
                world.revocations.receive(json.dumps(other).encode())
            assert world.admission.confirm(pending) is not None


@pytest.mark.parametrize("value", [None, b"", b"1"])
@pytest.mark.parametrize("way", ["is open", "is closed", "fails"])
async def test_check_at_connect_goes_through_the_link_or_else_through_the_commands(
    autojump_clock: MockClock, way: str, value: bytes | None
) -> None:
    async with opened(has_link=True, knows_sectors=True) as world:
        world.link.is_open, world.link.is_broken = way != "is closed", way == "fails"
        if value is not None:  # the key exists, whatever it holds
            world.redis.keys["auth:token:blacklist:a"] = value
        await world.try_to_admit(token=token())
        assert world.link.answers == (way == "is open")
        assert world.redis.reads == 1
        assert world.refusal == (None if value is None else REVOKED)


@asynccontextmanager
async def opened_with_places() -> AsyncIterator[tuple[World, Places]]:
    """The places of those who wait for one are reserved while their revocation is checked."""
    async with opened(knows_sectors=True) as world:
        places = Places(world.hub)
        world.revocations.reserve_all = places.reserve_all
        yield world, places
        assert not world.revocations.watches
        assert not world.hub.taken


async def test_client_is_woken_once_for_its_check_and_its_place(autojump_clock: MockClock) -> None:
    async with opened_with_places() as (world, _):
        await world.try_to_admit(token=token())
        assert trio.current_time() == pytest.approx(0.2)
        assert isinstance(world.outcome, PendingAdmission)
        assert world.hub.taken == 1
        with world.outcome as pending:
            taken = pending.take_place()
            assert taken is not None
            assert pending.take_place() is None
            with taken:
                assert world.hub.taken == 1


async def test_place_is_given_back_unless_it_is_taken(autojump_clock: MockClock) -> None:
    async with opened_with_places() as (world, _):
        await world.try_to_admit(token=token())
        assert isinstance(world.outcome, PendingAdmission)
        with world.outcome:
            assert world.hub.taken == 1


@pytest.mark.parametrize("revoke", [by_key, by_users_key])
async def test_revoked_token_takes_no_place(autojump_clock: MockClock, revoke: Any) -> None:
    async with opened_with_places() as (world, places):
        revoke(world)
        await world.try_to_admit(token=token())
        assert world.refusal == REVOKED
        assert not places.asked


@pytest.mark.parametrize("revoke", [by_message, by_key_alone_since_the_message_was_lost])
async def test_token_that_is_revoked_while_its_place_is_reserved_gives_it_back(
    autojump_clock: MockClock, revoke: Any
) -> None:
    async with opened_with_places() as (world, places), trio.open_nursery() as nursery:
        nursery.start_soon(lambda: world.try_to_admit(token=token()))
        await trio.sleep(0.15)
        revoke(world)
        assert places.asked == 1
        await trio.sleep(1)
        assert world.refusal == REVOKED


@pytest.mark.parametrize("seconds", [0.05, 0.15, 0.2])
async def test_client_that_goes_while_its_place_is_reserved_leaves_none_behind(
    autojump_clock: MockClock, seconds: float
) -> None:
    async with opened_with_places() as (world, _):
        with trio.move_on_after(seconds):
            await world.try_to_admit(token=token())
        if isinstance(world.outcome, PendingAdmission):  # it was woken in time
            world.outcome.__exit__()
        await trio.sleep(1)


async def test_who_gets_no_place_at_once_is_to_look_for_one(autojump_clock: MockClock) -> None:
    async with opened_with_places() as (world, places):
        places.has_room = False
        await world.try_to_admit(token=token())
        assert isinstance(world.outcome, PendingAdmission)
        with world.outcome as pending:
            assert pending.take_place() is None


async def test_check_that_takes_too_long_while_places_are_reserved_is_no_refusal(
    autojump_clock: MockClock,
) -> None:
    async with opened_with_places() as (world, _):
        world.revocations.reserve_all = never
        await world.try_to_admit(token=token())
        assert trio.current_time() == pytest.approx(5)
        assert isinstance(world.outcome, PendingAdmission)
        with world.outcome as pending:
            assert pending.take_place() is None


async def never(_principals: Sequence[Principal]) -> list[Reservation | None]:
    await trio.sleep_forever()
    return []
