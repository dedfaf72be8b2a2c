"""Publishing for backends: each event is told as published only if it certainly is."""

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import hiredis
import pytest
import redis
import trio

from tests.support.gateways import valkey
from tests.support.ports import free_port
from tests.support.redis_server import QUICK_REPLICA, RedisServer
from trio_gateway.broker import publications, publishing
from trio_gateway.broker.publications import Confirm, Outcome, Problem, Publication
from trio_gateway.broker.publishing import Publishing
from trio_gateway.broker.sentinel_replicas import SentinelReplicas
from trio_gateway.broker.topologies import make_topology
from trio_gateway.redis_sets import Cluster, Node, SentinelSet
from trio_gateway.redis_url import RedisKind, RedisUrl

STREAM = "events:critical"
PAYLOAD = b'{"type":"ROUND_READY","tenant_id":1,"branch_id":1}'


@asynccontextmanager
async def opened(url: str) -> AsyncIterator[Publishing]:
    parsed = RedisUrl.from_url(url)
    replicas = SentinelReplicas(parsed) if parsed.kind is RedisKind.SENTINEL else None
    found = Publishing(make_topology(parsed), replicas)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(found.run)
        yield found
        nursery.cancel_scope.cancel()


def entry(*, again: bool = False, stream: str = STREAM, payload: bytes = PAYLOAD) -> Publication:
    return Publication.to_stream(stream, payload, 1000, again=again)


def message() -> Publication:
    return Publication.on_channel("channel:session:456", PAYLOAD)


async def publish(
    publishing: Publishing, *publications: Publication, confirm: Confirm = 0
) -> list[Outcome | None]:
    with trio.fail_after(30):
        await publishing.publish(publications, confirm)
    return [each.outcome for each in publications]


Answer = bytes | None  # None: it closes the connection


class FakeRedis:
    """A server that answers XADD, PUBLISH, WAIT and so on with what the test says."""

    def __init__(self) -> None:
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}"
        self.sent: list[str] = []  # names of commands, without those of a greeting
        self.greetings = 0
        self.role = b"master"
        self.script: list[Answer] = []  # answers to come; then everything succeeds
        self.answers = True

    def _answer(self, name: str) -> Answer:
        if name == "CLIENT":
            self.greetings += 1
            return b"+OK\r\n"
        if name == "HELLO":
            return b"*2\r\n$4\r\nrole\r\n$%d\r\n%b\r\n" % (len(self.role), self.role)
        self.sent.append(name)
        if self.script:
            return self.script.pop(0)
        return b"$3\r\n7-1\r\n" if name == "XADD" else b":1\r\n"

    async def _talk(self, stream: trio.SocketStream) -> None:
        reader = hiredis.Reader()
        async with stream:
            async for data in stream:
                reader.feed(bytes(data))
                answer = b""
                while (words := reader.gets()) is not False:
                    part = self._answer(words[0].decode())
                    if part is None:
                        await stream.send_all(answer)
                        return
                    answer += part
                if self.answers:
                    await stream.send_all(answer)

    async def serve(self, task_status: Any = trio.TASK_STATUS_IGNORED) -> None:
        await trio.serve_tcp(self._talk, self.port, host="127.0.0.1", task_status=task_status)


@pytest.fixture
async def fake(nursery: trio.Nursery) -> FakeRedis:
    server = FakeRedis()
    await nursery.start(server.serve)
    return server


async def test_all_of_a_request_go_in_one_piece_and_in_order(fake: FakeRedis) -> None:
    async with opened(fake.url) as publishing:
        found = await publish(publishing, entry(), message(), entry())
    assert found == [Outcome("7-1"), Outcome(), Outcome("7-1")]
    assert fake.sent == ["XADD", "PUBLISH", "XADD"]
    assert fake.greetings == 1


async def test_a_connection_is_used_again(fake: FakeRedis) -> None:
    async with opened(fake.url) as publishing:
        for _ in range(3):
            assert await publish(publishing, entry()) == [Outcome("7-1")]
    assert fake.greetings == 1


async def test_lost_replies_leave_events_without_an_id_in_doubt(fake: FakeRedis) -> None:
    fake.script = [b"$3\r\n1-1\r\n", None]
    async with opened(fake.url) as publishing:
        found = await publish(publishing, entry(), entry(), message())
    doubt = Outcome(None, Problem.IN_DOUBT)
    assert found == [Outcome("1-1"), doubt, doubt]
    assert fake.sent == ["XADD", "XADD"]


async def test_event_with_an_id_is_sent_again_after_a_lost_reply_but_not_a_third_time(
    fake: FakeRedis,
) -> None:
    async with opened(fake.url) as publishing:
        fake.script = [None]
        assert await publish(publishing, entry(again=True)) == [Outcome("7-1")]
        assert fake.sent == ["XADD"] * 2
        fake.script = [None, None]
        assert await publish(publishing, entry(again=True)) == [Outcome(None, Problem.IN_DOUBT)]
        assert fake.sent == ["XADD"] * 4


@pytest.mark.parametrize("then", [b"-READONLY it is a replica\r\n", b"-OOM no memory\r\n"])
async def test_event_stays_in_doubt_if_the_first_try_may_have_added_it(
    fake: FakeRedis, then: bytes
) -> None:
    fake.script = [None, then, then, then]
    async with opened(fake.url) as publishing:
        (found,) = await publish(publishing, entry(again=True))
    assert found is not None
    assert found.problem is Problem.IN_DOUBT


async def test_no_answer_in_time_is_in_doubt(
    fake: FakeRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publishing, "_REPLY", 0.1)
    async with opened(fake.url) as found:
        assert await publish(found, entry()) == [Outcome("7-1")]
        fake.answers = False
        assert await publish(found, entry()) == [Outcome(None, Problem.IN_DOUBT)]
        # The next one is sent on a new connection, which gets no answer either: it is not sent.
        monkeypatch.setattr(publishing, "_CONNECT", 0.1)
        assert await publish(found, entry()) == [Outcome(None, Problem.UNAVAILABLE)]
    assert fake.sent == ["XADD"] * 2


async def test_what_was_not_sent_before_a_connection_is_lost_is_not_in_doubt(
    fake: FakeRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publications, "_PIECE", 300)  # two events
    fake.script = [b"$3\r\n1-1\r\n", b"$3\r\n1-2\r\n", b"$3\r\n1-3\r\n", None]
    async with opened(fake.url) as found:
        outcomes = await publish(found, *(entry() for _ in range(7)))
    doubt = Outcome(None, Problem.IN_DOUBT)
    ids = [Outcome(f"1-{n}") for n in (1, 2, 3)]
    assert outcomes == [*ids, doubt, *[Outcome("7-1")] * 3]
    assert fake.sent == ["XADD"] * 7


async def test_refused_event_is_not_in_doubt_and_others_are_published(fake: FakeRedis) -> None:
    fake.script = [b"$3\r\n1-1\r\n", b"-OOM command not allowed\r\n", b"$3\r\n1-2\r\n"]
    async with opened(fake.url) as publishing:
        found = await publish(publishing, entry(), entry(), entry())
    assert found == [Outcome("1-1"), Outcome(None, Problem.REFUSED, "OOM"), Outcome("1-2")]


async def test_event_that_a_former_primary_refuses_is_sent_again(fake: FakeRedis) -> None:
    fake.script = [b"-READONLY You can't write against a read only replica.\r\n"]
    async with opened(fake.url) as publishing:
        assert await publish(publishing, entry()) == [Outcome("7-1")]
    assert fake.greetings == 2  # on a new connection: the name may lead to another server


async def test_nothing_is_published_on_a_replica(
    fake: FakeRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publishing, "_FRESH", 0.0)
    async with opened(fake.url) as found:
        assert await publish(found, message()) == [Outcome()]
        fake.role = b"slave"  # also of the connection that is open
        assert await publish(found, message()) == [Outcome(None, Problem.UNAVAILABLE)]
    assert fake.sent == ["PUBLISH"]


async def test_nonsense_is_in_doubt(fake: FakeRedis) -> None:
    async with opened(fake.url) as publishing:
        for nonsense in (b":5\r\n", b"?\r\n"):
            fake.script = [nonsense]
            assert await publish(publishing, entry()) == [Outcome(None, Problem.IN_DOUBT)]


@pytest.mark.parametrize(
    ("confirm", "script", "is_confirmed"),
    [
        (1, [b":1\r\n"], True),
        (1, [b":0\r\n"], False),
        (2, [b":1\r\n"], False),
        (1, [b"-NOPERM no\r\n"], False),
        (1, [b"+OK\r\n"], False),
        (1, [None], False),
        ("all", [b"$18\r\nconnected_slaves:2\r\n", b":2\r\n"], True),
        ("all", [b"$18\r\nconnected_slaves:2\r\n", b":1\r\n"], False),
        ("all", [b"$18\r\nconnected_slaves:0\r\n"], False),
        ("all", [b"$1\r\nx\r\n"], False),
        ("all", [b"-NOPERM no\r\n"], False),
    ],
)
async def test_entry_that_is_not_confirmed_is_in_doubt_and_has_its_id(
    fake: FakeRedis, confirm: Any, script: list[Answer], is_confirmed: bool
) -> None:
    fake.script = [b"$3\r\n1-1\r\n", b":1\r\n", b"$3\r\n1-2\r\n", *script]
    async with opened(fake.url) as publishing:
        found = await publish(publishing, entry(), message(), entry(), confirm=confirm)
    problem = None if is_confirmed else Problem.IN_DOUBT
    assert found == [Outcome("1-1", problem), Outcome(), Outcome("1-2", problem)]


async def test_events_for_a_channel_are_not_confirmed(fake: FakeRedis) -> None:
    async with opened(fake.url) as publishing:
        assert await publish(publishing, message(), confirm=5) == [Outcome()]
    assert fake.sent == ["PUBLISH"]


async def test_a_server_that_is_down_is_not_tried_for_every_request() -> None:
    async with opened(f"redis://127.0.0.1:{free_port()}") as publishing:
        for _ in range(20):
            assert await publish(publishing, entry()) == [Outcome(None, Problem.UNAVAILABLE)]
        (server,) = publishing._servers.values()
        assert server.breaker.failures < 10


@pytest.fixture
def connections(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    monkeypatch.setattr(publishing, "_TIDY", 0.01)
    monkeypatch.setattr(publishing, "_IDLE", 0.05)
    return []


async def test_idle_connections_are_closed(fake: FakeRedis, connections: list[int]) -> None:
    async with opened(fake.url) as publishing:
        await publish(publishing, entry())
        assert publishing._servers
        with trio.fail_after(5):
            while publishing._servers:
                await trio.sleep(0.01)
        assert await publish(publishing, entry()) == [Outcome("7-1")]
    assert fake.greetings == 2


# --- real servers ---


@pytest.fixture(scope="module")
def primary() -> Iterator[RedisServer]:
    with valkey(**QUICK_REPLICA) as server:
        yield server


def payloads(node: "Node | RedisServer", stream: str = STREAM) -> list[bytes]:
    with redis.Redis(port=node.port) as client:
        found: Any = client.xrange(stream)
    return [fields[b"data"] for _, fields in found]


async def test_a_thousand_events_take_one_round_trip_and_keep_their_order(
    primary: RedisServer,
) -> None:
    sent = [b"%b%d" % (PAYLOAD, n) for n in range(1000)]
    async with opened(primary.connection_url) as publishing:
        found = await publish(publishing, *(entry(stream="many", payload=p) for p in sent))
        (server,) = publishing._servers.values()
        assert len(server.idle) == 1
    assert payloads(primary, "many") == sent
    with redis.Redis(port=primary.port) as client:
        ids: Any = client.xrange("many")
    assert [each.entry for each in found if each] == [key.decode() for key, _ in ids]


async def test_stream_is_trimmed_to_about_its_length(primary: RedisServer) -> None:
    async with opened(primary.connection_url) as publishing:
        await publish(
            publishing,
            *(Publication.to_stream("short", PAYLOAD, 100, again=False) for _ in range(1000)),
        )
    assert 100 <= len(payloads(primary, "short")) <= 300


async def publish_until(
    found: Publishing, make: Callable[[], Publication], *, seconds: float = 20
) -> tuple[Outcome, list[Outcome]]:
    """Publish events until one is published; return that and the others before it."""
    failures: list[Outcome] = []
    with trio.fail_after(seconds):
        while True:
            (outcome,) = await publish(found, make())
            assert outcome is not None
            if outcome.problem is None:
                return outcome, failures
            failures.append(outcome)
            await trio.sleep(0.05)


async def test_new_primary_of_a_sentinel_set_is_found(sentinels: SentinelSet) -> None:
    sentinels.wait_healthy()
    async with opened(sentinels.url) as publishing:
        first, _ = await publish_until(publishing, entry)
        old = sentinels.primary()
        old.kill()
        second, _ = await publish_until(publishing, entry)
        new = sentinels.wait_writable(other_than=old)
        with new.client() as client:
            ids: Any = client.xrange(STREAM)
        assert second.entry is not None
        assert second.entry in {key for key, _ in ids}
        assert first.entry != second.entry
        sentinels.rejoin(old)
    sentinels.wait_healthy()


@pytest.mark.parametrize("confirm", [1, "all"])
async def test_replicas_confirm(sentinels: SentinelSet, confirm: Confirm) -> None:
    sentinels.wait_healthy()
    async with opened(sentinels.url) as publishing:
        (found,) = await publish(publishing, entry(), confirm=confirm)
        assert found is not None
        assert found.problem is None
        replicas = [node for node in sentinels.nodes if node is not sentinels.primary()]
        for replica in replicas:
            replica.freeze()
        try:
            (late,) = await publish(publishing, entry(), confirm=confirm)
        finally:
            for replica in replicas:
                replica.thaw()
        assert late is not None
        assert late.problem is Problem.IN_DOUBT
        assert late.entry is not None
    sentinels.wait_healthy()


async def test_all_replicas_include_one_that_was_just_lost(sentinels: SentinelSet) -> None:
    """It may have become the primary, of which the one of before does not know yet."""
    sentinels.wait_healthy()
    primary = sentinels.primary()
    lost = next(node for node in sentinels.nodes if node is not primary)
    async with opened(sentinels.url) as publishing:
        lost.kill()
        with trio.fail_after(5):
            while primary.info("replication")["connected_slaves"] != 1:
                await trio.sleep(0.01)
        (one,) = await publish(publishing, entry(), confirm=1)
        (both,) = await publish(publishing, entry(), confirm="all")
    sentinels.rejoin(lost)
    assert (one and one.problem, both and both.problem) == (None, Problem.IN_DOUBT)
    sentinels.wait_healthy()


async def test_events_of_each_shard_go_to_the_node_that_has_it(cluster: Cluster) -> None:
    cluster.wait_healthy()
    streams = [f"{STREAM}:{{{n}}}" for n in range(12)]
    async with opened(cluster.url) as publishing:
        found = await publish(
            publishing, *(entry(stream=stream) for stream in streams), message(), confirm=1
        )
        assert len(publishing._servers) == 3
    assert all(each is not None and each.problem is None for each in found)
    for stream in streams:
        assert len(payloads(cluster.primary(stream), stream)) == 1


async def test_moved_stream_is_followed_before_during_and_after_its_move(cluster: Cluster) -> None:
    cluster.wait_healthy()
    stream = "moving"
    source = cluster.primary(stream)
    target = next(node for node in cluster.primaries() if node is not source)
    slot, here, there = cluster.slot(stream), *(n.ask("CLUSTER", "MYID") for n in (source, target))

    def begin() -> None:
        target.ask("CLUSTER", "SETSLOT", slot, "IMPORTING", here)
        source.ask("CLUSTER", "SETSLOT", slot, "MIGRATING", there)

    def move_key() -> None:
        source.ask("MIGRATE", "127.0.0.1", target.port, stream, 0, 5000, timeout=6)

    def end() -> None:
        for node in (target, source):
            node.ask("CLUSTER", "SETSLOT", slot, "NODE", there, timeout=6)

    async with opened(cluster.url) as publishing:
        for step in (None, begin, move_key, end):  # here, still here, ASK, MOVED
            if step is not None:
                step()
            found = await publish(publishing, *(entry(stream=stream) for _ in range(3)))
            assert all(each is not None and each.problem is None for each in found)
    assert len(payloads(target, stream)) == 12
