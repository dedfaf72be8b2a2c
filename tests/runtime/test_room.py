"""Making room: a connection that does not answer a ping in two seconds gives way to a new one."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from trio_gateway.core.audiences import Endpoint, Principal
from trio_gateway.core.capacity import CapacityLimits
from trio_gateway.core.close_codes import Close, Rejected
from trio_gateway.core.messages import Message
from trio_gateway.runtime.connection import Connection, ConnectionLimits
from trio_gateway.runtime.hub import Hub
from trio_gateway.runtime.room import Room
from trio_gateway.runtime.socket import Ping, Pong
from trio_gateway.testing import FakeSocket, make_principal

LIMITS = ConnectionLimits(stale_after=1e6, receive_timeout=1e6)
DINER = make_principal(Endpoint.DINER)


class Restaurant:
    """A hub in which a user may have three connections and a session two, and its clients."""

    def __init__(self, nursery: trio.Nursery, total: int = 100) -> None:
        self.nursery = nursery
        self.hub = Hub(CapacityLimits(total=total, per_user=3, per_session=2))
        self.closing = False
        self.room = Room(self.hub, lambda: self.closing)

    async def join(
        self, principal: Principal | None = None, *, answers_with: str | Ping | Pong | None = None
    ) -> FakeSocket:
        """A client that sends ``answers_with`` 0.25 s after each ping, or never answers."""
        socket = FakeSocket()
        client = Connection(principal or make_principal(), LIMITS)

        async def answer() -> None:
            pings = 0
            while True:
                await trio.sleep(0.25)
                if socket.pings > pings:
                    pings = socket.pings
                    assert answers_with is not None
                    await socket.client.send(answers_with)

        self.nursery.start_soon(client.run, socket, self.hub)
        if answers_with is not None:
            self.nursery.start_soon(answer)
        await trio.sleep(1)  # one is silent for longer than the next
        return socket

    async def arrive(
        self, principal: Principal | None = None, *, leaves_after: float = float("inf")
    ) -> str:
        """The outcome for a new connection, and after how many seconds."""
        started = trio.current_time()
        found = principal or make_principal()
        try:
            place, _ = await self.room.find(
                found, lambda: trio.current_time() - started >= leaves_after
            )
        except Rejected as rejected:
            return f"{int(rejected.close)} {rejected.label} {trio.current_time() - started:.1f}"
        with place:
            client = Connection(found, LIMITS)
            self.nursery.start_soon(client.run, FakeSocket(), self.hub)
            outcome = f"in {trio.current_time() - started:.1f}"
            await wait_all_tasks_blocked()  # it has joined, and others are closed
        return outcome


@asynccontextmanager
async def opened(total: int = 100) -> AsyncIterator[Restaurant]:
    async with trio.open_nursery() as nursery:
        restaurant = Restaurant(nursery, total)
        yield restaurant
        await wait_all_tasks_blocked()
        assert not restaurant.room._probes
        assert not restaurant.hub._reserved
        nursery.cancel_scope.cancel()


async def test_below_the_limit_no_connection_is_pinged(autojump_clock: MockClock) -> None:
    async with opened() as restaurant:
        sockets = [await restaurant.join() for _ in range(2)]
        assert await restaurant.arrive() == "in 0.0"
        assert not any(socket.pings for socket in sockets)


async def test_longest_silent_connection_is_closed_after_two_seconds(
    autojump_clock: MockClock,
) -> None:
    async with opened() as restaurant:
        first, second, third = [await restaurant.join() for _ in range(3)]
        await first.client.send("hello")  # so that the second is silent for longest
        assert await restaurant.arrive() == "in 2.0"
        assert (first.closed, second.closed, third.closed) == (None, Close.HEARTBEAT_TIMEOUT, None)
        assert len(restaurant.hub) == 3


async def test_nobody_is_closed_for_a_new_connection_that_has_left(
    autojump_clock: MockClock,
) -> None:
    async with opened() as restaurant:
        sockets = [await restaurant.join() for _ in range(3)]
        outcomes: list[str] = []

        async def arrive(leaves_after: float) -> None:
            outcomes.append(await restaurant.arrive(leaves_after=leaves_after))

        async with trio.open_nursery() as nursery:
            for leaves_after in (1.0, float("inf"), 1.5):
                nursery.start_soon(arrive, leaves_after)
        assert sorted(outcomes) == ["1013 user_limit 2.0"] * 2 + ["in 2.0"]
        assert [socket.closed for socket in sockets] == [Close.HEARTBEAT_TIMEOUT, None, None]


@pytest.mark.parametrize("answers_with", [Pong(), Ping(b""), "ping", "nonsense"], ids=str)
async def test_new_connection_is_refused_if_all_others_answer(
    autojump_clock: MockClock, answers_with: str | Ping | Pong
) -> None:
    async with opened() as restaurant:
        sockets = [await restaurant.join(answers_with=answers_with) for _ in range(3)]
        outcome = await restaurant.arrive()
        assert outcome.startswith("1013 user_limit 0.")
        assert not any(socket.closed for socket in sockets)


async def test_connections_that_answer_stay(autojump_clock: MockClock) -> None:
    async with opened() as restaurant:
        alive = [await restaurant.join(answers_with=Pong()) for _ in range(2)]
        dead = await restaurant.join()
        assert await restaurant.arrive() == "in 2.0"
        assert await restaurant.arrive() == "in 2.0"  # the newest one does not answer
        assert dead.closed is Close.HEARTBEAT_TIMEOUT
        assert not any(socket.closed for socket in alive)


async def test_new_connections_share_a_probe_and_no_dead_connection_is_counted_twice(
    autojump_clock: MockClock,
) -> None:
    async with opened() as restaurant, trio.open_nursery() as nursery:
        alive = await restaurant.join(answers_with=Pong())
        dead = [await restaurant.join() for _ in range(2)]
        outcomes: list[str] = []

        async def arrive(after: float) -> None:
            await trio.sleep(after)
            outcomes.append(await restaurant.arrive())

        for n in range(3):
            nursery.start_soon(arrive, n * 0.5)
        nursery.start_soon(arrive, 1.2)  # more than there are connections
        await trio.sleep(3)
        assert outcomes[0] == "1013 user_limit 0.0"  # the fourth
        assert [each.split()[0] for each in sorted(outcomes)] == ["1013", "1013", "in", "in"]
        assert [socket.closed for socket in dead] == [Close.HEARTBEAT_TIMEOUT] * 2
        assert alive.closed is None
        assert alive.pings == 1
        assert len(restaurant.hub) == 3


async def test_place_that_becomes_free_during_the_probe_is_taken_without_a_close(
    autojump_clock: MockClock,
) -> None:
    async with opened() as restaurant, trio.open_nursery() as nursery:
        sockets = [await restaurant.join() for _ in range(3)]
        outcomes: list[str] = []

        async def arrive() -> None:
            outcomes.append(await restaurant.arrive())

        nursery.start_soon(arrive)
        await trio.sleep(0.95)
        await sockets[0].client.leave()
        await trio.sleep(0.3)
        assert outcomes == ["in 1.0"]
        assert not any(socket.closed for socket in sockets[1:])


async def test_session_makes_room_among_its_own_connections_only(autojump_clock: MockClock) -> None:
    async with opened() as restaurant:
        dead = [await restaurant.join(DINER) for _ in range(2)]
        other = await restaurant.join(make_principal(Endpoint.DINER, tenant=2))
        assert await restaurant.arrive(DINER) == "in 2.0"
        assert [socket.closed for socket in dead] == [Close.HEARTBEAT_TIMEOUT, None]
        assert not other.pings


async def test_room_in_the_whole_process_is_made_only_for_an_owner_at_its_limit(
    autojump_clock: MockClock,
) -> None:
    async with opened(total=3) as restaurant:
        for _ in range(3):
            await restaurant.join()
        assert await restaurant.arrive(make_principal(user=22)) == "1013 total_limit 0.0"
        assert await restaurant.arrive() == "in 2.0"


async def test_new_connection_that_leaves_takes_no_place(autojump_clock: MockClock) -> None:
    async with opened() as restaurant:
        sockets = [await restaurant.join() for _ in range(3)]
        with trio.move_on_after(1):
            await restaurant.arrive()
        await trio.sleep(5)
        assert not any(socket.closed for socket in sockets)


async def test_no_connection_waits_for_room_during_shutdown(autojump_clock: MockClock) -> None:
    async with opened() as restaurant:
        for _ in range(3):
            await restaurant.join()
        restaurant.closing = True
        assert await restaurant.arrive() == "1013 user_limit 0.0"


async def test_pongs_caused_by_new_connections_do_not_count_towards_the_rate_limit(
    autojump_clock: MockClock,
) -> None:
    """Else a second device that comes again and again would end the first."""
    async with opened() as restaurant:
        sockets = [await restaurant.join(answers_with=Pong()) for _ in range(3)]
        for _ in range(50):
            assert (await restaurant.arrive()).startswith("1013")
        await trio.sleep(1)
        assert not any(socket.closed for socket in sockets)


class SlowSocket(FakeSocket):
    """One whose client takes a byte now and then, or can't be pinged."""

    def __init__(self, *, answers_pings: bool, outstanding: int, moves: bool) -> None:
        super().__init__()
        self.answers_pings = answers_pings
        self._outstanding = outstanding
        self._moves = moves

    def traffic(self) -> tuple[int, int]:
        return int(trio.current_time() * 2) if self._moves else 0, self._outstanding


@pytest.mark.parametrize(
    ("answers_pings", "outstanding", "moves", "stays"),
    [
        (True, 0, False, False),
        (True, 0, True, False),  # a proxy has acknowledged the ping, and no client answers it
        (True, 9, False, False),
        (True, 9, True, True),  # the ping is behind what it takes slowly
        (False, 0, False, True),  # a stream of events, or a socket over ASGI
        (False, 9, True, True),
        (False, 9, False, False),
    ],
)
async def test_connection_that_cannot_answer_is_alive_if_bytes_are_acknowledged(
    autojump_clock: MockClock, answers_pings: bool, outstanding: int, moves: bool, stays: bool
) -> None:
    async with opened() as restaurant:
        for _ in range(2):
            await restaurant.join(answers_with=Pong())
        socket = SlowSocket(answers_pings=answers_pings, outstanding=outstanding, moves=moves)
        client = Connection(make_principal(), LIMITS)
        restaurant.nursery.start_soon(client.run, socket, restaurant.hub)
        await trio.sleep(1)
        outcome = await restaurant.arrive()
        assert outcome.startswith("1013") is stays
        assert (socket.closed is None) is stays


async def test_client_whose_message_is_being_answered_is_alive(autojump_clock: MockClock) -> None:
    async def slow(_connection: Connection, _message: Message) -> None:
        await trio.sleep(5)

    async with opened() as restaurant:
        for _ in range(2):
            await restaurant.join(answers_with=Pong())
        socket, client = FakeSocket(), Connection(make_principal(), LIMITS, slow)
        restaurant.nursery.start_soon(client.run, socket, restaurant.hub)
        await socket.client.send("refresh_sectors")
        await trio.sleep(1)
        assert (await restaurant.arrive()).startswith("1013")
        assert socket.closed is None
