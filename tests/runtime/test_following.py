"""Following: a stream is read while its tenants have clients, and for a minute after."""

from collections.abc import Collection, Mapping
from typing import NoReturn

import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from trio_gateway.core.audiences import TenantId
from trio_gateway.core.event_ids import tag
from trio_gateway.core.shards import Sharding
from trio_gateway.runtime.following import LINGER, Following
from trio_gateway.runtime.history import History
from trio_gateway.runtime.source import Sink

ONE, OTHER, SAME_SHARD = TenantId(1), TenantId(2), TenantId(37)
SHARDED = Sharding(("s",), shards=64, previous=64)


class FakeSource:
    """Records which shards it is to follow."""

    connected = True
    gaps = 0
    cursors: Mapping[str, str] = {}
    unreadable: Collection[str] = ()

    def __init__(self) -> None:
        self.followed: list[list[str]] = []

    def follow(self, shards: Collection[str]) -> None:
        self.followed.append(list(shards))

    async def run(self, sink: Sink) -> NoReturn:
        await trio.sleep_forever()


def test_tenants_of_this_test_are_in_the_shards_it_expects() -> None:
    assert SHARDED.names_of(ONE) == SHARDED.names_of(SAME_SHARD) == ("s:{50}",)
    assert SHARDED.names_of(OTHER) == ("s:{17}",)


async def test_without_shards_every_stream_is_read_from_the_start() -> None:
    source, history = FakeSource(), History()
    following = Following(source, history.extent, Sharding(("a", "b")))
    with following.client_of(ONE):
        pass
    assert source.followed == [["a", "b"]]
    assert history.extent.expected == {tag("a"), tag("b")}


async def test_shard_is_read_from_its_first_client_on() -> None:
    source, history = FakeSource(), History()
    following = Following(source, history.extent, SHARDED)
    assert source.followed == []
    with following.client_of(ONE), following.client_of(ONE), following.client_of(SAME_SHARD):
        assert source.followed == [["s:{50}"]]
        with following.client_of(OTHER):
            assert source.followed == [["s:{50}"], ["s:{17}", "s:{50}"]]
        assert history.extent.expected == {tag("s:{17}"), tag("s:{50}")}


async def test_shard_is_not_read_any_more_a_minute_after_its_last_client_has_left(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    source = FakeSource()
    following = Following(source, History().extent, SHARDED)
    nursery.start_soon(following.run)
    with following.client_of(OTHER):
        with following.client_of(ONE):
            with following.client_of(SAME_SHARD):
                pass
            await trio.sleep(2 * LINGER)
            assert source.followed[-1] == ["s:{17}", "s:{50}"]
        await trio.sleep(LINGER - 0.1)
        assert source.followed[-1] == ["s:{17}", "s:{50}"]
        await trio.sleep(0.2)
        assert source.followed[-1] == ["s:{17}"]
        assert following.names == {"s:{17}"}


async def test_client_that_comes_back_within_the_minute_keeps_the_shard(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    source = FakeSource()
    following = Following(source, History().extent, SHARDED)
    nursery.start_soon(following.run)
    for _ in range(3):
        with following.client_of(ONE):
            await wait_all_tasks_blocked()
        await trio.sleep(LINGER - 1)
    assert source.followed == [["s:{50}"]]
    await trio.sleep(2)
    assert source.followed == [["s:{50}"], []]


async def test_stream_without_shards_is_read_too_while_the_number_changes() -> None:
    source = FakeSource()
    following = Following(source, History().extent, Sharding(("s",), shards=64))
    with following.client_of(ONE):
        assert source.followed == [["s", "s:{50}"]]


async def test_shard_that_was_given_up_before_it_could_be_read_takes_no_room(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    history = History()
    following = Following(FakeSource(), history.extent, SHARDED)
    nursery.start_soon(following.run)
    with following.client_of(OTHER):
        with following.client_of(ONE):
            pass
        await trio.sleep(LINGER + 1)
        assert history.extent.expected == {tag("s:{17}")}


async def test_stream_that_is_held_is_read_without_clients(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    source = FakeSource()
    following = Following(source, History().extent, SHARDED)
    nursery.start_soon(following.run)
    following.hold({"s:{17}", "s:{50}"})
    assert source.followed[-1] == ["s:{17}", "s:{50}"]
    with following.client_of(ONE):
        assert following.has_clients("s:{50}")
    await trio.sleep(2 * LINGER)
    assert following.names == {"s:{17}", "s:{50}"}
    with following.client_of(ONE):
        following.hold(set())
        await trio.sleep(LINGER - 0.1)
        assert following.names == {"s:{17}", "s:{50}"}
        await trio.sleep(0.2)
        assert following.names == {"s:{50}"}
    await trio.sleep(LINGER + 0.1)
    assert following.names == set()
