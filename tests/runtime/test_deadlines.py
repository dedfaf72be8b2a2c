"""Deadlines of many connections in one task: exact, also when they move; in virtual time."""

import gc
import weakref

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from trio_gateway.core.close_codes import Close
from trio_gateway.core.messages import Message
from trio_gateway.runtime.connection import Connection, ConnectionLimits, Handler, ignore
from trio_gateway.runtime.deadlines import Deadlines
from trio_gateway.runtime.hub import Hub
from trio_gateway.testing import FakeSocket, make_principal

SILENT = ConnectionLimits(stale_after=60, receive_timeout=90)


class World:
    """Connections whose deadlines are watched."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.deadlines = Deadlines()
        self.hub = Hub()
        self._nursery = nursery

    async def connect(
        self,
        limits: ConnectionLimits = SILENT,
        *,
        answer: Handler = ignore,
        expires_at: float = float("inf"),
    ) -> tuple[Connection, FakeSocket]:
        socket = FakeSocket()
        connection = Connection(
            make_principal(), limits, answer, expires_at, deadlines=self.deadlines
        )
        self._nursery.start_soon(connection.run, socket, self.hub)
        await wait_all_tasks_blocked()
        return connection, socket


@pytest.fixture
async def world(nursery: trio.Nursery) -> World:
    made = World(nursery)
    nursery.start_soon(made.deadlines.run)
    return made


async def test_each_connection_is_closed_at_its_own_time(
    autojump_clock: MockClock, world: World
) -> None:
    times = [30, 10, 20, 10, 50.5]
    found = [await world.connect(expires_at=each) for each in times]
    await trio.sleep(70)
    assert [connection.ended_at for connection, _ in found] == times
    assert {socket.closed for _, socket in found} == {Close.AUTH_FAILED}
    assert not world.hub.leaving


async def test_deadline_moves_back_with_each_message(
    autojump_clock: MockClock, world: World
) -> None:
    connection, socket = await world.connect()
    for _ in range(5):
        await trio.sleep(50)
        await socket.client.send("ping")
    await trio.sleep(59)
    assert not connection.ending
    await trio.sleep(2)
    assert connection.ended_at == 250 + 60
    assert (socket.closed, socket.reason) == (Close.HEARTBEAT_TIMEOUT, "no heartbeat")


async def test_renewed_credential_ends_at_its_own_time(
    autojump_clock: MockClock, world: World
) -> None:
    sooner, later = [(await world.connect(expires_at=30))[0] for _ in range(2)]
    await trio.sleep(10)
    sooner.renew(20)
    later.renew(40)
    await trio.sleep(100)
    assert (sooner.ended_at, later.ended_at) == (20, 40)


async def test_renewals_leave_one_entry_behind(autojump_clock: MockClock, world: World) -> None:
    connection, socket = await world.connect()
    for _ in range(20):
        await trio.sleep(50)
        connection.renew(trio.current_time() + 55)
        await socket.client.send("ping")
    await trio.sleep(50)
    assert len(world.deadlines._heap) <= 2


async def test_close_from_elsewhere_ends_the_wait_for_a_message(
    autojump_clock: MockClock, world: World
) -> None:
    connection, socket = await world.connect()
    connection.close(Close.GOING_AWAY, "retry in 1s")
    await world.hub.wait_empty()
    assert trio.current_time() == 0
    assert (socket.closed, socket.reason) == (Close.GOING_AWAY, "retry in 1s")
    assert not connection.chose_its_code


@pytest.mark.parametrize("ends_by", ["a close", "its deadline"])
async def test_end_of_a_connection_ends_its_answer(
    autojump_clock: MockClock, world: World, ends_by: str
) -> None:
    async def answer(_connection: Connection, _message: Message) -> None:
        await trio.sleep(1000)

    connection, socket = await world.connect(answer=answer)
    await trio.sleep(10)
    await socket.client.send("refresh_sectors")
    await trio.sleep(10)
    if ends_by == "a close":
        connection.close(Close.AUTH_FAILED, "token revoked")
    await world.hub.wait_empty()
    assert trio.current_time() == (20 if ends_by == "a close" else 10 + 60)


async def test_answer_is_not_cut_short_by_a_deadline_that_has_moved(
    autojump_clock: MockClock, world: World
) -> None:
    async def answer(connection: Connection, _message: Message) -> None:
        await trio.sleep(40)
        connection.send(b"answer")

    _, socket = await world.connect(answer=answer)
    await trio.sleep(50)
    await socket.client.send("refresh_sectors")
    await trio.sleep(41)
    assert socket.texts == ["answer"]
    await socket.client.send("ping")
    await wait_all_tasks_blocked()
    assert len(socket.texts) == 2


async def test_connection_that_has_left_is_not_kept(
    autojump_clock: MockClock, world: World
) -> None:
    connection, socket = await world.connect()
    await socket.client.leave()
    await world.hub.wait_empty()
    kept = weakref.ref(connection)
    del connection
    gc.collect()
    assert kept() is None
    await trio.sleep(100)
    assert not world.deadlines._heap


class Timed:
    """The least of a connection that is watched."""

    ending = False

    def __init__(self, deadline: float) -> None:
        self.timer = 0
        self.deadline = deadline
        self.closed_at: float | None = None

    def close_on_time(self, now: float) -> None:
        self.closed_at, self.ending = now, True


async def test_entries_of_many_that_have_left_do_not_pile_up(
    autojump_clock: MockClock, world: World
) -> None:
    stay = [Timed(1000 + n) for n in range(3000)]
    for each in stay:
        world.deadlines.watch(each)
        for _ in range(3):
            world.deadlines.watch(Timed(36_000))  # and it is gone
    assert len(world.deadlines._heap) <= 2 * len(stay) + 1
    await trio.sleep(5000)
    assert [each.closed_at for each in stay] == [each.deadline for each in stay]


async def test_deadlines_that_move_forward_often_leave_few_entries(
    autojump_clock: MockClock, world: World
) -> None:
    moved = Timed(36_000)
    for _ in range(5000):
        moved.deadline -= 1
        world.deadlines.watch(moved)
    assert len(world.deadlines._heap) <= 1024 + 1
    await trio.sleep(40_000)
    assert moved.closed_at == moved.deadline == 31_000
