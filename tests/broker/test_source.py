"""What every source of durable events must do, tried with the streams of a real Valkey."""

import time
from collections.abc import Iterator
from typing import Any

import pytest
import trio

from tests.support.gateways import until
from tests.support.redis_server import RedisServer, valkey
from tests.support.source_engine import Engine
from trio_gateway.broker import stream_reader, streams
from trio_gateway.broker.streams import Streams
from trio_gateway.broker.topology import single
from trio_gateway.core.event_ids import entry_id, read_position, tag
from trio_gateway.redis_url import RedisAddress
from trio_gateway.runtime.source import PastLimits


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with valkey() as server:
        yield server


FORMS = {"single": "server", "sentinel": "sentinels", "cluster": "cluster"}  # fixtures


# The other forms are tried with two of the tests in the default suite.
@pytest.fixture(
    params=[
        "single",
        pytest.param("sentinel", marks=pytest.mark.chaos),
        pytest.param("cluster", marks=pytest.mark.chaos),
    ]
)
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    yield from _engine(request)


@pytest.fixture(params=FORMS)
def any_engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    yield from _engine(request)


@pytest.fixture
def single_engine(server: RedisServer) -> Iterator[Engine]:
    engine = Engine(server)
    engine.empty()
    yield engine
    engine.close()


def _engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    engine = Engine(request.getfixturevalue(FORMS[request.param]))
    engine.empty()
    yield engine
    engine.close()


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


async def test_all_new_shards_are_looked_at_before_one_is_begun(single_engine: Engine) -> None:
    engine, sink = single_engine, single_engine.sink
    sink.ahead = PastLimits(2, 10**9, 0)
    engine.add("a", 3)
    engine.add("b", 1)
    async with engine.reading("a", "b", "c"):
        assert sink.looked_at == [("a", engine.added["a"][1:]), ("b", engine.added["b"]), ("c", [])]
        assert sink.begun_before == [0, 0, 0]
        assert sink.pasts.keys() == {"a", "b", "c"}


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
    any_engine: Engine,
) -> None:
    kills = 0
    async with any_engine.reading("a", "b"), trio.open_nursery() as nursery:
        nursery.start_soon(any_engine.add_while, lambda: kills < 8, "a", "b")
        while kills < 8:
            taken = any_engine.sink.taken
            await until(lambda taken=taken: any_engine.sink.taken > taken)  # type: ignore[misc]
            await trio.to_thread.run_sync(any_engine.kill_connections)
            kills += 1
        await until(lambda: any_engine.has_all("a", "b"))
    assert not any_engine.sink.gaps


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
                engine.failed_over()
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
        pipeline = engine.at("a").pipeline(transaction=True)
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


async def test_what_several_shards_lose_at_once_is_told_in_one_step(single_engine: Engine) -> None:
    engine = single_engine
    async with engine.reading("a", "b", "c"):
        for name in ("a", "b", "c"):
            engine.add(name, 10)
        await until(lambda: engine.has_all("a", "b", "c"))
        together = engine.at("a").pipeline(transaction=True)
        together.execute_command("CLIENT KILL TYPE normal SKIPME yes")  # type: ignore[no-untyped-call]
        together.delete("a", "c")  # as a new primary that lacks them
        together.execute()
        await until(lambda: engine.sink.gaps)
        engine.add("a", 10)
        engine.add("c", 10)
        engine.add("b", 10)
        await until(lambda: engine.has_all("a", "b", "c"))
    assert [each.stream for each in engine.sink.gaps] == [tag("a"), tag("c")]
    assert engine.sink.gaps_told == 1


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
        engine.at("b").delete("b")  # which would be a gap
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
    engine.at(name).delete(name)
    engine.added[name].clear()
    engine.at(name).set(name, "not a stream")


@pytest.mark.usefixtures("quick")
async def test_clock_of_the_server_is_known_for_each_shard(any_engine: Engine) -> None:
    async with any_engine.reading("a", "b"):
        await until(lambda: any_engine.sink.clocks.keys() == {tag("a"), tag("b")})
        ahead = time.time() - trio.current_time()  # all is on one machine
    assert list(any_engine.sink.clocks.values()) == pytest.approx([ahead, ahead], abs=0.2)


@pytest.mark.usefixtures("quick")
async def test_shard_that_cannot_be_read_does_not_stop_the_others(engine: Engine) -> None:
    spoil(engine, "b")
    async with engine.reading("a", "b"):
        assert list(engine.source.unreadable) == ["b"]
        engine.source.follow(["a", "b", "c"])
        engine.add("a", 5)
        engine.add("c", 5)
        await until(lambda: engine.has_all("a", "c"))
        engine.at("b").delete("b")
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
        engine.at("b").delete("b")
        engine.add("b", 5)
        await until(lambda: engine.sink.known("b")[5:] == engine.added["b"])
    assert [stream for stream, _, _ in engine.sink.gaps] == [tag("b")]


@pytest.mark.usefixtures("quick")
async def test_shards_that_are_readable_again_at_once_are_told_of_in_one_step(
    single_engine: Engine,
) -> None:
    engine = single_engine
    async with engine.reading("a", "b", "c"):
        for name in ("a", "b"):
            engine.add(name, 5)
        await until(lambda: engine.has_all("a", "b"))
        spoil(engine, "a")
        spoil(engine, "b")
        await until(lambda: sorted(engine.source.unreadable) == ["a", "b"])
        engine.at("a").delete("a", "b")
        await until(lambda: not engine.source.unreadable and engine.sink.gaps)
    assert {each.stream for each in engine.sink.gaps} == {tag("a"), tag("b")}
    assert engine.sink.gaps_told == 1


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
async def test_shard_without_the_right_to_it_does_not_stop_the_others(
    single_engine: Engine,
) -> None:
    def grant(*keys: str) -> None:
        single_engine.at("a").acl_setuser(
            "few", enabled=True, reset=True, nopass=True, keys=keys, categories=["+@all"]
        )

    grant("a")
    url = f"redis://few:x@127.0.0.1:{single_engine.ports[0]}"
    single_engine.source = Streams(single(RedisAddress.from_url(url)), on_reading=lambda: None)
    async with single_engine.reading("a", "b"):
        single_engine.add("a", 5)
        await until(
            lambda: single_engine.has_all("a") and list(single_engine.source.unreadable) == ["b"]
        )
        grant("a", "b")
        single_engine.add("b", 5)
        await until(lambda: single_engine.has_all("a", "b"))
    assert not single_engine.sink.gaps


@pytest.mark.usefixtures("quick")
async def test_user_without_the_right_to_the_time_is_not_asked_again_and_again(
    single_engine: Engine,
) -> None:
    server = single_engine.at("a")
    server.acl_setuser(
        "few", enabled=True, reset=True, nopass=True, keys=["*"], categories=["+@all"],
        commands=["-time"],
    )  # fmt: skip
    url = f"redis://few:x@127.0.0.1:{single_engine.ports[0]}"
    single_engine.source = Streams(single(RedisAddress.from_url(url)), on_reading=lambda: None)
    async with single_engine.reading("a"):
        await until(lambda: _refused(server) == 2)  # at the begin, and when it looked around
        looked = _looked_around(server)
        await until(lambda: _looked_around(server) > looked + 1)
        single_engine.add("a")
        await until(lambda: single_engine.has_all("a"))
    assert _refused(server) == 2
    assert not single_engine.sink.clocks


def _looked_around(server: Any) -> int:
    found: int = server.info("commandstats")["cmdstat_hello"]["calls"]
    return found


def _refused(server: Any) -> int:
    """How often TIME was refused."""
    return sum(int(each["count"]) for each in server.acl_log() if each["object"] == "time")


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("kills", [False, True], ids=["same connection", "new connection"])
async def test_unreadable_stream_of_a_change_of_shards_is_a_gap_when_it_is_back(
    single_engine: Engine, kills: bool
) -> None:
    single_engine.source = Streams(
        single(RedisAddress.from_url(single_engine.url)), on_reading=lambda: None,
        ranks={tag("a"): 0, tag("b"): 1}, old_streams={tag("a")},
    )  # fmt: skip
    async with single_engine.reading("a", "b"):
        single_engine.add("b")
        await until(lambda: single_engine.has_all("b"))
        single_engine.at("b").rename("b", "c")
        single_engine.at("b").set("b", "not a stream")
        await until(lambda: list(single_engine.source.unreadable) == ["b"])
        single_engine.add("a")
        await until(lambda: single_engine.has_all("a"))
        single_engine.at("b").rename("c", "b")
        single_engine.add("b")
        if kills:
            single_engine.kill_connections()
        await until(lambda: single_engine.has_all("b"))
    ((stream, since, end),) = single_engine.sink.gaps
    assert stream == tag("b")
    assert end == read_position(single_engine.added["b"][0])
    assert since > read_position(single_engine.added["a"][0])
