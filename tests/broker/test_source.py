"""What every source of durable events must do, tried with the streams of a real Valkey."""

from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from functools import partial

import pytest
import redis
import trio

from tests.support.gateways import until
from tests.support.redis_server import RedisServer, valkey
from trio_gateway.broker import stream_reader, streams
from trio_gateway.broker.streams import Streams
from trio_gateway.core.event_ids import Position, Stream, entry_id, read_position, tag
from trio_gateway.core.resilience import Backoff, Breaker
from trio_gateway.redis_url import RedisAddress
from trio_gateway.runtime.source import Entry, Past, Room, Source
from trio_gateway.runtime.supervision import keep_running


class Recorder:
    """A sink that notes what it gets, and checks the order of the calls."""

    def __init__(self) -> None:
        self.pasts: dict[str, Past] = {}
        self.live: defaultdict[str, list[Position]] = defaultdict(list)
        self.gaps: list[tuple[Stream, Position, Position]] = []
        self.forgotten: list[Stream] = []
        self.taken = 0
        self.accepts = trio.Event()
        self.accepts.set()
        self.most_past = 100_000

    def room(self) -> Room:
        return Room(self.most_past, 10**9, 0)

    async def begin(self, stream: Stream, name: str, past: Past, ahead: float | None) -> None:
        assert name not in self.pasts
        await trio.lowlevel.checkpoint()
        self.pasts[name] = past
        self.live[name] = []

    async def take(
        self,
        stream: Stream,
        name: str,
        entries: Sequence[Entry],
        passed: Callable[[Sequence[Entry]], None],
    ) -> None:
        assert name in self.pasts
        for entry in entries:
            await self.accepts.wait()
            self.live[name].append(entry.position)
            self.taken += 1
            passed([entry])

    async def advance(self, stream: Stream, position: Position) -> None:
        await trio.lowlevel.checkpoint()

    async def gap(self, stream: Stream, *, since: Position, end: Position) -> None:
        assert stream in map(tag, self.pasts)
        self.gaps.append((stream, since, end))
        await trio.lowlevel.checkpoint()

    async def settle(self) -> None:
        await trio.lowlevel.checkpoint()

    def forget(self, stream: Stream) -> None:
        self.forgotten.append(stream)
        del self.pasts[next(name for name in self.pasts if tag(name) == stream)]

    def known(self, name: str) -> list[str]:
        """The ids of all entries of a shard that it has, in the order in which they came."""
        if name not in self.pasts:
            return []
        past = [entry.position for entry in self.pasts[name].entries]
        return [entry_id(position) for position in past + self.live[name]]


class Engine:
    """A server, a source that reads it, and a sink."""

    def __init__(self, server: RedisServer) -> None:
        self.server = server
        self.backend = redis.Redis(port=server.port)
        self.sink = Recorder()
        self.source: Source = Streams(
            RedisAddress.from_url(server.connection_url), Breaker(1000, 30)
        )
        self.added: defaultdict[str, list[str]] = defaultdict(list)

    def add(self, name: str, count: int = 1) -> None:
        pipeline = self.backend.pipeline(transaction=False)
        for _ in range(count):
            pipeline.xadd(name, {"data": "{}"})
        self.added[name] += [entry.decode() for entry in pipeline.execute()]

    async def add_while(self, condition: Callable[[], bool], *names: str) -> None:
        """Add entries to these shards, one after the other, for as long as this holds."""
        while condition():
            for name in names:
                await trio.to_thread.run_sync(self.add, name)

    def has_all(self, *names: str) -> bool:
        return all(self.sink.known(name) == self.added[name] for name in names)

    def kill_connections(self) -> None:
        """Kill those of the source."""
        for client in self.backend.client_list():
            if client["name"] == "trio-gateway":
                self.backend.client_kill_filter(_id=client["id"])

    @asynccontextmanager
    async def reading(self, *names: str) -> AsyncIterator[None]:
        self.source.follow(names)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(
                keep_running, "stream", partial(self.source.run, self.sink), Breaker(1000, 30),
                Backoff(0.01, 0.05),
            )  # fmt: skip
            await until(lambda: self.source.connected)
            yield
            nursery.cancel_scope.cancel()


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with valkey() as server:
        yield server


@pytest.fixture
def engine(server: RedisServer) -> Iterator[Engine]:
    engine = Engine(server)
    engine.backend.flushall()
    yield engine
    engine.backend.close()


async def test_shard_is_begun_with_its_past_and_read_on(engine: Engine) -> None:
    engine.add("a", 2500)
    async with engine.reading("a", "b"):
        engine.add("a", 10)
        engine.add("b", 10)
        await until(lambda: engine.has_all("a", "b"))
    assert len(engine.sink.pasts["a"].entries) == 2500
    assert engine.sink.pasts["a"].is_whole
    assert not engine.sink.gaps


async def test_past_is_as_much_as_there_is_room_for(engine: Engine) -> None:
    engine.sink.most_past = 100
    engine.add("a", 300)
    async with engine.reading("a"):
        assert engine.sink.known("a") == engine.added["a"][200:]
    past = engine.sink.pasts["a"]
    assert not past.is_whole
    assert entry_id(past.since) == engine.added["a"][199]


async def test_nothing_is_followed_until_it_is_asked_for(engine: Engine) -> None:
    engine.add("a")
    async with engine.reading():
        assert engine.source.connected
        assert engine.source.cursors == {}
        engine.source.follow(["a"])
        await until(lambda: engine.has_all("a"))


async def test_shard_that_is_followed_while_others_are_quiet_is_read_at_once(
    engine: Engine,
) -> None:
    async with engine.reading("a"):
        await trio.sleep(0.1)  # the source waits for news of the first one
        for name in ("b", "c"):
            engine.source.follow([*engine.source.cursors, name])
            with trio.fail_after(1):
                await until(lambda name=name: name in engine.sink.pasts)  # type: ignore[misc]
                engine.add(name)
                await until(lambda name=name: engine.sink.live[name])  # type: ignore[misc]
        for name in ("a", "b", "c"):
            engine.add(name)
        await until(lambda: engine.has_all("a", "b", "c"), 1)


async def test_order_holds_and_nothing_is_lost_or_doubled_when_connections_are_killed(
    engine: Engine,
) -> None:
    kills = 0
    async with engine.reading("a", "b"), trio.open_nursery() as nursery:
        nursery.start_soon(engine.add_while, lambda: kills < 8, "a", "b")
        while kills < 8:
            taken = engine.sink.taken
            await until(lambda taken=taken: engine.sink.taken > taken)  # type: ignore[misc]
            await trio.to_thread.run_sync(engine.kill_connections)
            kills += 1
        await until(lambda: engine.has_all("a", "b"))
    assert not engine.sink.gaps


async def test_nothing_is_lost_or_doubled_when_the_server_is_killed() -> None:
    with valkey(appendonly="yes", appendfsync="always") as server:
        engine = Engine(server)
        engine.add("a", 20)
        async with engine.reading("a", "b"):
            for _ in range(2):
                engine.add("b", 50)
                server.kill()
                server.start_again()
                await trio.to_thread.run_sync(server.wait_until_ready)
                engine.backend.connection_pool.disconnect()
                engine.add("a", 50)
                await until(lambda: engine.has_all("a", "b"), 10)
        assert not engine.sink.gaps


async def test_entries_that_are_trimmed_unread_are_a_gap_of_their_shard_alone(
    engine: Engine,
) -> None:
    async with engine.reading("a", "b"):
        engine.add("a", 10)
        engine.add("b", 10)
        await until(lambda: engine.has_all("a", "b"))
        pipeline = engine.backend.pipeline(transaction=True)
        for _ in range(30):
            pipeline.xadd("a", {"data": "{}"})
        pipeline.xtrim("a", 20, approximate=False)
        ids = [each.decode() for each in pipeline.execute()[:30]]
        await until(lambda: engine.sink.known("a")[10:] == ids[10:])
        await until(lambda: engine.sink.gaps, 10)
        assert {stream for stream, _, _ in engine.sink.gaps} == {tag("a")}
        ((_, since, _),) = engine.sink.gaps
        assert since >= read_position(ids[9])  # a client before them has missed the lost entries
        engine.add("b", 10)
        await until(lambda: engine.has_all("b"))


async def test_source_waits_for_a_sink_that_takes_nothing(engine: Engine) -> None:
    async with engine.reading("a", "b"):
        engine.sink.accepts = trio.Event()
        engine.add("a", 3000)
        engine.add("b", 10)
        await trio.sleep(0.2)
        assert engine.sink.taken == 0
        engine.source.follow(["a", "b", "c"])  # which changes nothing of that
        await trio.sleep(0.1)
        assert engine.sink.taken == 0
        engine.sink.accepts.set()
        engine.add("c", 10)
        await until(lambda: engine.has_all("a", "b", "c"))
    assert not engine.sink.gaps


async def test_shards_come_and_go_under_load_and_each_is_whole_when_it_is_back(
    engine: Engine,
) -> None:
    names = ["a", "b", "c", "d"]
    is_over = False
    async with engine.reading("a"), trio.open_nursery() as nursery:
        nursery.start_soon(engine.add_while, lambda: not is_over, *names)
        for turn in range(30):
            followed = [name for n, name in enumerate(names) if turn % (n + 2) or name == "a"]
            engine.source.follow(followed)
            await trio.sleep(0.01 * (turn % 3))
            if turn % 10 == 9:
                await until(lambda: engine.sink.pasts.keys() == set(followed))  # noqa: B023
        engine.source.follow(names)
        await until(lambda: engine.sink.pasts.keys() == set(names))
        is_over = True
        await until(lambda: engine.has_all(*names))
        assert engine.sink.forgotten
        assert tag("a") not in engine.sink.forgotten
        engine.source.follow(["b"])
        await until(lambda: engine.sink.pasts.keys() == {"b"})
    assert not engine.sink.gaps


async def test_shard_that_is_given_up_while_another_is_begun_is_not_looked_at_again(
    engine: Engine,
) -> None:
    engine.add("c", 20_000)
    async with engine.reading("a", "b"):
        engine.add("b", 5)
        await until(lambda: engine.has_all("a", "b"))
        engine.backend.delete("b")  # which would be a gap
        engine.source.follow(["a", "c"])
        while "c" not in engine.sink.pasts:
            await trio.to_thread.run_sync(engine.add, "a")
        await until(lambda: "b" not in engine.sink.pasts)
        engine.add("c")
        await until(lambda: engine.has_all("a", "c"))
    assert engine.sink.forgotten == [tag("b")]
    assert not engine.sink.gaps


async def test_place_survives_an_interruption_while_another_shard_is_begun(engine: Engine) -> None:
    engine.add("b", 5000)
    async with engine.reading("a"), trio.open_nursery() as nursery:
        for _ in range(3):
            engine.add("a", 20)
            nursery.start_soon(trio.to_thread.run_sync, engine.kill_connections)
            engine.source.follow(["a", "b"])
            await until(lambda: engine.has_all("a", "b"))
            engine.source.follow(["a"])
            engine.add("a")  # it looks at what it follows between two replies
            await until(lambda: "b" not in engine.sink.pasts)
    assert not engine.sink.gaps


# A shard that can't be read


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look around five times as often."""
    for module in (streams, stream_reader):
        monkeypatch.setattr(module, "BLOCK", 0.4)


def spoil(engine: Engine, name: str) -> None:
    engine.backend.delete(name)
    engine.added[name].clear()
    engine.backend.set(name, "not a stream")


@pytest.mark.usefixtures("quick")
async def test_shard_that_cannot_be_read_does_not_stop_the_others(engine: Engine) -> None:
    spoil(engine, "b")
    async with engine.reading("a", "b"):
        assert list(engine.source.unreadable) == ["b"]
        engine.source.follow(["a", "b", "c"])
        engine.add("a", 5)
        engine.add("c", 5)
        await until(lambda: engine.has_all("a", "c"))
        engine.backend.delete("b")
        engine.add("b", 5)
        await until(lambda: engine.has_all("b") and not engine.source.unreadable)
        engine.add("b", 5)
        await until(lambda: engine.has_all("a", "b", "c"))
    assert not engine.sink.gaps


@pytest.mark.usefixtures("quick")
async def test_shard_that_becomes_unreadable_is_a_gap_when_it_is_back(engine: Engine) -> None:
    async with engine.reading("a", "b"):
        engine.add("b", 5)
        await until(lambda: engine.has_all("b"))
        spoil(engine, "b")
        engine.add("a", 5)
        await until(lambda: engine.has_all("a") and list(engine.source.unreadable) == ["b"])
        engine.kill_connections()
        engine.add("a", 5)
        await until(lambda: engine.has_all("a") and list(engine.source.unreadable) == ["b"])
        assert not engine.sink.gaps
        engine.backend.delete("b")
        engine.add("b", 5)
        await until(lambda: engine.sink.known("b")[5:] == engine.added["b"])
    assert [stream for stream, _, _ in engine.sink.gaps] == [tag("b")]


@pytest.mark.usefixtures("quick")
async def test_shard_is_begun_while_all_others_are_unreadable(engine: Engine) -> None:
    spoil(engine, "a")
    async with engine.reading("a"):
        engine.source.follow(["a", "b"])
        engine.add("b")
        await until(lambda: engine.has_all("b"))
        engine.source.follow(["b"])
        engine.add("b")
        await until(lambda: engine.has_all("b") and not engine.source.unreadable)


@pytest.mark.usefixtures("quick")
async def test_shard_without_the_right_to_it_does_not_stop_the_others(engine: Engine) -> None:
    def grant(*keys: str) -> None:
        engine.backend.acl_setuser(
            "few", enabled=True, reset=True, nopass=True, keys=keys, categories=["+@all"]
        )

    grant("a")
    url = f"redis://few:x@127.0.0.1:{engine.server.port}"
    engine.source = Streams(RedisAddress.from_url(url), Breaker(1000, 30))
    async with engine.reading("a", "b"):
        engine.add("a", 5)
        await until(lambda: engine.has_all("a") and list(engine.source.unreadable) == ["b"])
        grant("a", "b")
        engine.add("b", 5)
        await until(lambda: engine.has_all("a", "b"))
    assert not engine.sink.gaps


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("kills", [False, True], ids=["same connection", "new connection"])
async def test_unreadable_stream_of_a_change_of_shards_is_a_gap_when_it_is_back(
    engine: Engine, kills: bool
) -> None:
    engine.source = Streams(
        RedisAddress.from_url(engine.server.connection_url), Breaker(1000, 30),
        ranks={tag("a"): 0, tag("b"): 1}, old_streams={tag("a")},
    )  # fmt: skip
    async with engine.reading("a", "b"):
        engine.add("b")
        await until(lambda: engine.has_all("b"))
        engine.backend.rename("b", "c")
        engine.backend.set("b", "not a stream")
        await until(lambda: list(engine.source.unreadable) == ["b"])
        engine.add("a")
        await until(lambda: engine.has_all("a"))
        engine.backend.rename("c", "b")
        engine.add("b")
        if kills:
            engine.kill_connections()
        await until(lambda: engine.has_all("b"))
    ((stream, since, end),) = engine.sink.gaps
    assert stream == tag("b")
    assert end == read_position(engine.added["b"][0])
    assert since > read_position(engine.added["a"][0])
