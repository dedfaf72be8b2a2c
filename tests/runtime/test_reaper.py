"""The reaper: pings the quiet, follows the wall clock, removes what failed to remove itself."""

import math
from typing import NoReturn

import pytest
import trio
from structlog.testing import capture_logs
from trio.testing import MockClock, wait_all_tasks_blocked

from trio_gateway.core.close_codes import Close
from trio_gateway.core.messages import Message
from trio_gateway.runtime.connection import Connection, ConnectionLimits, Handler, ignore
from trio_gateway.runtime.hub import Hub
from trio_gateway.runtime.reaper import clean_up, reap
from trio_gateway.runtime.socket import Ping, Pong
from trio_gateway.testing import FakeSocket, make_principal

PATIENT = ConnectionLimits(stale_after=math.inf, receive_timeout=math.inf)
HOUR = 3600.0


class Wall:
    """A wall clock that can be set; it says 1,000,000 when Trio's says 0."""

    def __init__(self) -> None:
        self.offset = 1e6

    def __call__(self) -> float:
        return trio.current_time() + self.offset


class World:
    """A hub with a reaper, and a wall clock."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.hub, self.wall = Hub(), Wall()
        self._nursery = nursery

    async def connect(
        self,
        terms: ConnectionLimits = PATIENT,
        *,
        expires_at: float = math.inf,
        socket: FakeSocket | None = None,
        answer: Handler = ignore,
    ) -> tuple[Connection, FakeSocket]:
        """``expires_at`` is on Trio's clock as it is before the wall clock is set."""
        socket = socket or FakeSocket()
        principal = make_principal(expires_at=expires_at + 1e6)
        connection = Connection(principal, terms, answer, expires_at=expires_at)
        self._nursery.start_soon(connection.run, socket, self.hub)
        await wait_all_tasks_blocked()
        return connection, socket


@pytest.fixture
async def world(nursery: trio.Nursery) -> World:
    """Tests take ``autojump_clock`` themselves: pytest-trio finds it only there."""
    found = World(nursery)

    async def run() -> NoReturn:
        await reap(found.hub, ping_interval=25, cleanup_interval=30, wall_clock=found.wall)

    nursery.start_soon(run)
    await wait_all_tasks_blocked()
    return found


async def test_client_that_was_sent_nothing_is_pinged(
    autojump_clock: MockClock, world: World
) -> None:
    _, socket = await world.connect()

    await trio.sleep(24.9)
    assert socket.pings == 0
    await trio.sleep(0.2)
    assert socket.pings == 1
    await trio.sleep(75)
    assert socket.pings == 4


async def test_client_that_was_sent_something_is_not_pinged(
    autojump_clock: MockClock, world: World
) -> None:
    connection, socket = await world.connect()

    for _ in range(20):
        await trio.sleep(20)
        connection.send(b"event")

    assert socket.pings == 0


async def test_client_that_only_sends_is_pinged_too(
    autojump_clock: MockClock, world: World
) -> None:
    _, socket = await world.connect()

    for _ in range(10):
        await trio.sleep(5)
        await socket.client.send("nothing that is answered")
    await trio.sleep(1)

    assert socket.pings == 2


async def test_pings_are_spread_over_a_tenth_of_the_interval(
    autojump_clock: MockClock, world: World
) -> None:
    await trio.sleep(1)
    _, socket = await world.connect()

    await trio.sleep(24.9)
    assert socket.pings == 0
    await trio.sleep(2.5)
    assert socket.pings == 1


async def test_client_that_only_answers_pings_is_closed(
    autojump_clock: MockClock, world: World
) -> None:
    connection, socket = await world.connect(ConnectionLimits())

    for n in range(1, 70):
        await trio.sleep(1)
        if n % 25 == 0:
            await socket.client.send(Pong())

    assert socket.pings == 2
    assert connection.code == Close.HEARTBEAT_TIMEOUT
    assert connection.ended_at == 60


async def test_other_tasks_run_while_many_connections_are_pinged(
    autojump_clock: MockClock, world: World
) -> None:
    sockets = [(await world.connect())[1] for _ in range(250)]
    seen = set()

    await trio.sleep(25)
    for _ in range(10):
        await trio.lowlevel.checkpoint()
        seen.add(sum(socket.pings for socket in sockets))

    assert seen <= {0, 100, 200, 250}
    assert seen & {100, 200}


@pytest.mark.parametrize("step", [HOUR, -HOUR])
async def test_clock_change_moves_the_expiry(
    autojump_clock: MockClock, world: World, step: float
) -> None:
    connection, _ = await world.connect(expires_at=2 * HOUR)
    forever, _ = await world.connect()

    await trio.sleep(10)
    world.wall.offset += step
    await trio.sleep(4 * HOUR)

    assert connection.code == Close.AUTH_FAILED
    assert connection.ended_at == 2 * HOUR - step
    assert not forever.ending


async def test_clock_set_beyond_the_expiry_ends_the_connection_at_the_next_clean_up(
    autojump_clock: MockClock, world: World
) -> None:
    connection, _ = await world.connect(expires_at=600)

    await trio.sleep(10)
    world.wall.offset += HOUR
    await trio.sleep(30)

    assert connection.code == Close.AUTH_FAILED
    assert connection.ended_at == 30


@pytest.mark.parametrize("step", [HOUR, -HOUR])
async def test_clock_change_moves_no_interval(
    autojump_clock: MockClock, world: World, step: float
) -> None:
    connection, socket = await world.connect(ConnectionLimits())

    await trio.sleep(10)
    world.wall.offset += step
    await trio.sleep(90)

    assert socket.pings == 2
    assert connection.code == Close.HEARTBEAT_TIMEOUT
    assert connection.ended_at == 60


async def test_clock_drift_of_less_than_a_second_moves_nothing(
    autojump_clock: MockClock, world: World
) -> None:
    connection, _ = await world.connect(expires_at=100)

    world.wall.offset += 0.9
    await trio.sleep(200)

    assert connection.ended_at == 100


async def test_overdue_connection_is_closed(autojump_clock: MockClock) -> None:
    hub = Hub()
    overdue = Connection(make_principal(), ConnectionLimits(), expires_at=10)
    in_time = Connection(make_principal(), ConnectionLimits())
    for connection in (overdue, in_time):  # without a task that reads from them
        hub.join(connection)

    clean_up(hub, 20)

    assert overdue.code == Close.AUTH_FAILED
    assert not in_time.ending
    clean_up(hub, 61)
    assert in_time.code == Close.HEARTBEAT_TIMEOUT


class Stuck(FakeSocket):
    """Its close does not end before an abort."""

    def __init__(self) -> None:
        super().__init__()
        self.aborting = trio.Event()

    async def close(self, code: int, reason: str) -> None:
        await self.aborting.wait()

    def abort(self) -> None:
        super().abort()
        self.aborting.set()


async def test_stuck_close_is_aborted(autojump_clock: MockClock, world: World) -> None:
    connection, socket = await world.connect(socket=Stuck())

    with capture_logs() as logs:
        await trio.sleep(1)
        connection.close(Close.NORMAL)
        await trio.sleep(58)
        assert not socket.aborted
        await world.hub.wait_empty()

    assert trio.current_time() == 60  # the first clean-up after 30 seconds
    assert [log["event"] for log in logs] == ["stuck connections aborted"]
    assert world.hub.closed == {Close.NORMAL: 1}


async def test_connection_that_does_not_notice_its_end_is_aborted(
    autojump_clock: MockClock, world: World
) -> None:
    """Its ``answer`` waits for something that cannot be cancelled, as a thread."""

    async def answer(connection: Connection, message: Message) -> None:
        with trio.CancelScope(shield=True):
            await trio.sleep(300)

    connection, socket = await world.connect(ConnectionLimits(), answer=answer)
    await socket.client.send("refresh_sectors")

    await trio.sleep(60 + 29)
    assert (connection.ending, socket.aborted) == (False, False)
    await trio.sleep(62)
    assert connection.code == Close.HEARTBEAT_TIMEOUT
    assert socket.aborted
    await world.hub.wait_empty()
    assert trio.current_time() == 300
    assert world.hub.closed == {Close.HEARTBEAT_TIMEOUT: 1}


async def test_client_that_was_answered_is_not_pinged(
    autojump_clock: MockClock, world: World
) -> None:
    _, socket = await world.connect()

    for _ in range(10):
        await trio.sleep(20)
        await socket.client.send(Ping(b""))
        await wait_all_tasks_blocked()

    assert socket.pings == 0
    assert len(socket.pongs) == 10
