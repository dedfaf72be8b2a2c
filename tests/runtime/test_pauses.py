"""Pauses: in a burst on Pub/Sub, clients that read get everything, and delay nobody else."""

import math
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from tests.support.resume_world import GAP, Client, World, bounded
from trio_gateway.core.audiences import Endpoint
from trio_gateway.runtime import pauses
from trio_gateway.runtime.batches import Batches
from trio_gateway.runtime.queue import EventQueue
from trio_gateway.testing import FakeSocket, make_event, make_principal

STEP = 0.01  # seconds between two reads of a client
FAST = 20e6  # bytes a second


class Burst:
    """A world with a Pub/Sub queue, and clients that read at a pace."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.world = World(nursery)
        self.queue = EventQueue(100_000)
        self.published = 0
        self._nursery = nursery
        nursery.start_soon(Batches(self.world.dispatch).run, self.queue, 50)

    async def client(
        self, pace: float, user: int = 1, tenant: int = 1, step: float = STEP
    ) -> Client:
        """A client that takes so many bytes a second, all of a step at once."""
        socket = FakeSocket(room=0)
        client = await self.world.live(
            principal=make_principal(Endpoint.ADMIN, tenant=tenant, user=user),
            socket=socket,
            terms=bounded(write_timeout=math.inf),
        )
        self._nursery.start_soon(self._read, socket, pace, step)
        return client

    async def _read(self, socket: FakeSocket, pace: float, step: float) -> None:
        while pace:
            await trio.sleep(step)
            socket.read(pace * step)

    def publish(self, count: int, **keys: Any) -> None:
        for n in range(self.published, self.published + count):
            self.queue.offer(make_event(data=n, received_at=trio.current_time(), **keys))
        self.published += count

    async def delivered(self, *clients: Client) -> float:
        """Wait until all is delivered and these clients have it; return the seconds it took."""
        began = trio.current_time()
        while self.queue.undelivered or any(each.connection.is_behind for each in clients):
            await trio.sleep(STEP)
        return trio.current_time() - began


@pytest.fixture
async def burst(nursery: trio.Nursery) -> Burst:
    return Burst(nursery)


async def test_burst_reaches_whole_the_clients_that_read(
    autojump_clock: MockClock, burst: Burst
) -> None:
    clients = [await burst.client(pace, user=n) for n, pace in enumerate([1e6, 5e6, FAST])]
    burst.publish(7000)
    await burst.delivered(*clients)

    assert burst.world.replays.feeding.lags == 0
    assert clients[0].heard == list(range(7000))


async def test_client_whose_process_has_no_core_for_a_moment_gets_the_burst_whole(
    autojump_clock: MockClock, burst: Burst
) -> None:
    client = await burst.client(1e6, step=0.2)
    burst.publish(7000)
    await burst.delivered(client)

    assert burst.world.replays.feeding.lags == 0
    assert client.heard == list(range(7000))


async def test_time_in_which_the_gateway_had_no_core_counts_against_no_client(
    autojump_clock: MockClock, burst: Burst
) -> None:
    client = await burst.client(1e6)
    burst.publish(7000)
    for _ in range(5):
        await trio.sleep(5 * STEP)
        assert burst.queue.depth > 0
        autojump_clock.jump(0.5)
    await burst.delivered(client)

    assert burst.world.replays.feeding.lags == 0
    assert client.heard == list(range(7000))


async def test_client_that_does_not_read_delays_its_tenant_for_a_moment_and_no_other(
    autojump_clock: MockClock, burst: Burst
) -> None:
    reads, other = await burst.client(FAST), await burst.client(FAST, tenant=2)
    stuck = [await burst.client(0, user=n) for n in (2, 3)]
    burst.publish(2000)
    burst.publish(2, tenant_id=2)
    await trio.sleep(5 * STEP)
    assert other.heard == [2000, 2001]
    assert burst.queue.depth > 1000

    assert await burst.delivered(reads) <= 0.3
    assert burst.world.hub.lagging == {each.connection for each in stuck}
    burst.publish(2000)  # now nobody waits for them
    assert await burst.delivered(reads) <= 5 * STEP
    assert GAP not in reads.said


async def test_user_that_does_not_read_is_known_when_it_comes_again(
    autojump_clock: MockClock, burst: Burst
) -> None:
    reads, took = await burst.client(FAST), list[float]()
    for _ in range(5):
        stuck = await burst.client(0, user=2)
        burst.publish(1500)
        took.append(await burst.delivered(reads))
        await stuck.leave()

    assert took[0] > 0.1
    assert sum(took) <= 0.3 + 5 * 5 * STEP
    assert burst.world.replays.feeding.lags == 5


async def test_slow_client_at_an_ordinary_rate_delays_nobody(
    autojump_clock: MockClock, burst: Burst
) -> None:
    reads, slow = await burst.client(FAST), await burst.client(500, user=2)
    took = list[float]()
    for _ in range(1500):
        burst.publish(1)
        took.append(await burst.delivered(reads))

    assert slow.connection in burst.world.hub.lagging
    assert max(took) <= 3 * STEP


async def test_tenant_is_paused_for_a_tenth_of_the_time(
    autojump_clock: MockClock, burst: Burst
) -> None:
    slow, paused = await burst.client(1e6), 0.0
    for _ in range(1000):
        burst.publish(10, entity="x" * 2000)
        await trio.sleep(STEP)
        paused += STEP * (burst.queue.depth > 0)

    assert burst.world.replays.feeding.lags > 0
    assert GAP in slow.said
    assert pauses.MOST <= paused <= pauses.MOST + 0.1 * 10 + 0.5
