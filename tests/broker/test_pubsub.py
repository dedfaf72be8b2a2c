"""Pub/Sub: a dead or lagging connection is detected by PING, a slow one is kept."""

import json
from collections.abc import Callable

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.support.redis_links import Redis, link_to
from tests.support.stopwatch import Stopwatch
from trio_gateway.broker.connection import CONNECT_TIMEOUT, ENOUGH
from trio_gateway.broker.probe import EVERY, Probe
from trio_gateway.broker.pubsub import LIVENESS, PubSub
from trio_gateway.broker.topology import Topology, single
from trio_gateway.core.limits import DropAlarm
from trio_gateway.core.resilience import Breaker
from trio_gateway.core.slots import SlotMap
from trio_gateway.redis_url import RedisAddress
from trio_gateway.runtime.ingest import Ingest
from trio_gateway.runtime.queue import EventQueue
from trio_gateway.runtime.supervision import ConnectionLost, Demoted
from trio_gateway.testing import make_payload

PONG = b"*2\r\n$4\r\npong\r\n$0\r\n\r\n"


def make_pubsub() -> PubSub:
    queue = EventQueue(10, DropAlarm(60, 0.05, 300))
    return PubSub(single(RedisAddress()), ["*"], Ingest(), queue, Breaker(5, 30))


def message(size: int) -> bytes:
    return b"*3\r\n$7\r\nmessage\r\n$1\r\nx\r\n$%d\r\n%b\r\n" % (size, b"x" * size)


async def lost_after(redis: Redis) -> float:
    """When the link to this Redis counts as lost."""
    pubsub = make_pubsub()
    pubsub.listeners[b"x"] = lambda payload: None
    async with link_to(redis) as link:
        with pytest.raises(ConnectionLost, match="no answer to PING"):
            await pubsub._listen(link)
        return trio.current_time()


async def test_connection_that_delivers_a_byte_a_second_is_lost(autojump_clock: MockClock) -> None:
    async def redis(stream: trio.abc.Stream) -> None:
        await stream.send_all(PONG)
        for byte in message(1000):
            await trio.sleep(1)
            await stream.send_all(bytes([byte]))

    assert await lost_after(redis) == 2 * LIVENESS


@pytest.mark.parametrize("are_events", [False, True])
async def test_connection_that_falls_behind_is_lost_even_if_every_message_is_complete(
    autojump_clock: MockClock, are_events: bool
) -> None:
    async def redis(stream: trio.abc.Stream) -> None:
        await stream.send_all(PONG)
        while True:
            await trio.sleep(0.6)
            await stream.send_all(event_message(1) if are_events else message(10))

    assert await lost_after(redis) == 2 * LIVENESS


async def test_busy_connection_is_kept_however_late_the_answer(
    autojump_clock: MockClock,
) -> None:
    async def redis(stream: trio.abc.Stream) -> None:
        for _ in range(50):
            await trio.sleep(LIVENESS / 2)
            await stream.send_all(message(ENOUGH))
        await trio.sleep_forever()

    silence = await lost_after(redis) - 50 * LIVENESS / 2
    assert LIVENESS <= silence <= 2 * LIVENESS


async def test_connection_that_answers_is_kept(autojump_clock: MockClock) -> None:
    async def redis(stream: trio.abc.Stream) -> None:
        while await stream.receive_some():
            await trio.sleep(LIVENESS - 0.1)
            await stream.send_all(PONG)

    async with link_to(redis) as link:
        await link.send("PING")
        with trio.move_on_after(100) as scope:
            await make_pubsub()._listen(link)
        assert scope.cancelled_caught


async def test_redis_that_is_still_loading_is_a_lost_connection() -> None:
    async def redis(stream: trio.abc.Stream) -> None:
        await stream.send_all(b"*3\r\n$9\r\nsubscribe\r\n$1\r\nx\r\n:1\r\n")
        await trio.testing.wait_all_tasks_blocked()
        connected.append(pubsub.connected)
        await stream.send_all(b"-LOADING Redis is loading the dataset in memory\r\n")

    pubsub, connected = make_pubsub(), list[bool]()
    pubsub._unconfirmed = 1
    async with link_to(redis) as link:
        with pytest.raises(ConnectionLost, match="Redis says LOADING"):
            await pubsub._listen(link)
    assert connected == [False]


# A full queue


def event_message(n: int) -> bytes:
    payload = make_payload(n=n)
    return b"*4\r\n$8\r\npmessage\r\n$1\r\n*\r\n$1\r\nc\r\n$%d\r\n%b\r\n" % (len(payload), payload)


async def test_event_before_an_error_reply_is_received() -> None:
    async def redis(stream: trio.abc.Stream) -> None:
        await stream.send_all(event_message(7) + b"-ERR closing\r\n")

    queue = EventQueue(10)
    pubsub = PubSub(single(RedisAddress()), ["*"], Ingest(), queue, Breaker(5, 30))
    async with link_to(redis) as link:
        with pytest.raises(ConnectionLost, match="Redis says ERR"):
            await pubsub._listen(link)
    assert [json.loads(event.payload)["n"] for event in queue.take(9)] == [7]


class Burst:
    """Publishes 100 events at once, and then a message for a listener, to a queue for 10."""

    def __init__(self, max_wait: float) -> None:
        self.queue = EventQueue(10)
        self.received_at: float | None = None
        self.pubsub = PubSub(
            single(RedisAddress()), ["*"], Ingest(), self.queue, Breaker(5, 30), max_wait=max_wait
        )
        self.pubsub.listeners[b"x"] = self._receive

    def _receive(self, payload: bytes) -> None:
        self.received_at = trio.current_time()

    async def redis(self, stream: trio.abc.Stream) -> None:
        await stream.send_all(PONG + b"".join(map(event_message, range(100))) + message(1))
        while await stream.receive_some():
            await stream.send_all(PONG)

    async def run(self) -> None:
        async with link_to(self.redis) as link:
            await self.pubsub._listen(link)


async def test_burst_waits_in_redis_and_loses_nothing(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    burst = Burst(max_wait=2)
    nursery.start_soon(burst.run)
    taken: list[int] = []
    while burst.received_at is None:
        await trio.sleep(0.1)
        taken += [json.loads(event.payload)["n"] for event in burst.queue.take(9)]
    assert taken + [json.loads(e.payload)["n"] for e in burst.queue.take(99)] == list(range(100))
    assert burst.queue.dropped == 0


@pytest.mark.parametrize("max_wait", [0.0, 2.0, 5.0])
async def test_events_are_dropped_once_the_oldest_has_waited_for_too_long(
    autojump_clock: MockClock, nursery: trio.Nursery, max_wait: float
) -> None:
    burst = Burst(max_wait)
    nursery.start_soon(burst.run)
    await trio.sleep(max(0.0, max_wait - 0.1))
    assert (burst.queue.dropped, burst.received_at) == (0, None) or not max_wait
    await trio.sleep(0.2)

    assert burst.queue.dropped == 90
    assert burst.received_at == max_wait  # nothing delays a revocation for longer


async def test_link_is_not_lost_by_a_pause(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    burst = Burst(max_wait=60)
    nursery.start_soon(burst.run)
    await trio.sleep(30)
    while burst.queue.take(99):
        await wait_all_tasks_blocked()

    assert (burst.queue.dropped, burst.received_at) == (0, 30)


# Probes


class Probed:
    """A link to a Redis that answers each PING, with what ``before`` returns in front."""

    def __init__(self, before: Callable[[], bytes]) -> None:
        self.before = before
        self.probe = Probe()
        self.wrong = 0
        self.lost_at: float | None = None
        self.pubsub = PubSub(
            single(RedisAddress()), [], Ingest(), EventQueue(10), Breaker(5, 30),
            probe=self.probe, on_wrong_server=self._note,
        )  # fmt: skip

    def _note(self) -> None:
        self.wrong += 1

    def came_back(self, number: int) -> bytes:
        payload = b"%d" % number
        channel = self.probe.channel
        return b"*3\r\n$7\r\nmessage\r\n$%d\r\n%b\r\n$%d\r\n%b\r\n" % (
            len(channel), channel, len(payload), payload,
        )  # fmt: skip

    async def redis(self, stream: trio.abc.Stream) -> None:
        await stream.send_all(PONG)
        while await stream.receive_some():
            await stream.send_all(self.before() + PONG)

    async def publish(self) -> None:
        """As the connection for streams does."""
        while True:
            await trio.sleep(EVERY)
            self.probe.next_command()
            self.probe.published(1, trio.current_time())

    async def run(self) -> None:
        async with link_to(self.redis) as link, trio.open_nursery() as nursery:
            nursery.start_soon(self.publish)
            with pytest.raises(Demoted, match="a probe did not come back"):
                await self.pubsub._listen(link)
            self.lost_at = trio.current_time()
            nursery.cancel_scope.cancel()


async def test_link_that_leads_to_another_redis_is_left_within_five_seconds(
    autojump_clock: MockClock,
) -> None:
    probed = Probed(lambda: b"")
    with trio.fail_after(5):
        await probed.run()
    assert probed.wrong == 1


async def test_probe_that_waits_behind_other_messages_is_not_missed(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    probed = Probed(lambda: probed.came_back(probed.probe._sent))
    nursery.start_soon(probed.run)
    await trio.sleep(100)
    assert probed.lost_at is None


async def test_probes_of_other_processes_are_no_events() -> None:
    pubsub = make_pubsub()
    pubsub._patterns = [b"*"]
    reply = [b"pmessage", b"*", b"gateway:probe:0", b"1"]
    assert pubsub._event_in(reply) is None
    pubsub._take(reply)  # nor is it unexpected


async def test_server_that_says_nothing_is_left_when_another_one_is_the_primary() -> None:
    (frozen,) = await trio.open_tcp_listeners(0, host="127.0.0.1")  # accepts, by its kernel
    primaries = [("127.0.0.1", frozen.socket.getsockname()[1]), ("127.0.0.1", 1)]

    async def look(before: SlotMap) -> SlotMap:
        return SlotMap.of_one(primaries.pop(0))

    topology = Topology(look, lambda node: RedisAddress(*node))
    queue = EventQueue(10, DropAlarm(60, 0.05, 300))
    pubsub = PubSub(topology, [], Ingest(), queue, Breaker(5, 30))
    watch = Stopwatch()
    async with frozen, trio.open_nursery() as nursery:
        nursery.start_soon(lose, pubsub)
        await wait_all_tasks_blocked(0.05)
        assert len(primaries) == 1
        await topology.look_again()
    assert watch.net < CONNECT_TIMEOUT - 0.5


async def lose(pubsub: PubSub) -> None:
    try:
        await pubsub.run()
    except* Demoted:
        pass
