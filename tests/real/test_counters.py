"""Streams that lose entries or are restored from older data: a gap, and no id twice."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import redis
from trio_websocket import WebSocketConnection

from tests.support.gateways import (
    Running,
    received,
    settle,
    until,
    with_waiter,
)
from trio_gateway.broker import stream_reader
from trio_gateway.broker.stream_replies import Info, read_info

STREAM = "events:critical"
GAP = {"type": "gap"}


def data(marker: object) -> Any:
    event = {"type": "ROUND_READY", "tenant_id": 1, "branch_id": 1, "entity": marker}
    return {"data": json.dumps(event)}


def add(backend: Any, marker: object, at: str = "*", **options: Any) -> None:
    backend.xadd(STREAM, data(marker), id=at, **options)


def markers(found: list[Any]) -> list[Any]:
    return ["gap" if event == GAP else event["entity"] for event in found]


@pytest.fixture
def uncounted(monkeypatch: pytest.MonkeyPatch) -> None:
    """XINFO as before Redis 7."""
    new = {b"entries-added", b"max-deleted-entry-id", b"recorded-first-entry-id"}

    def read_old_info(reply: Any, name: str) -> Info:
        if isinstance(reply, list):
            pairs = zip(reply[::2], reply[1::2], strict=True)
            reply = [word for pair in pairs if pair[0] not in new for word in pair]
        return read_info(reply, name)

    monkeypatch.setattr(stream_reader, "read_info", read_old_info)


def trimmed(backend: "redis.Redis") -> None:
    """A hundred entries, of which only the last ones can still be read."""
    with backend.pipeline(transaction=True) as together:
        for n in range(100):
            add(together, n)
        together.xtrim(STREAM, maxlen=13, approximate=False)
        together.execute()


@pytest.mark.usefixtures("uncounted")
@pytest.mark.parametrize("before", [0, 3], ids=["new stream", "old stream"])
async def test_without_counts_there_is_no_gap_if_nothing_is_lost(
    backend: "redis.Redis", redis_url: str, before: int
) -> None:
    for n in range(before):
        add(backend, n)
    async with with_waiter(redis_url) as (gateway, waiter):
        for n in range(100):
            add(backend, n)
        await settle(gateway)
        await reconnect(gateway, backend)
        add(backend, 100)
        await settle(gateway)
        assert markers(await received(waiter)) == list(range(101))


@pytest.mark.parametrize("counted", [True, False])
@pytest.mark.parametrize("linked", [True, False])
async def test_trimming_beyond_the_cursor_is_a_gap_with_and_without_counts(
    backend: "redis.Redis",
    redis_url: str,
    request: pytest.FixtureRequest,
    counted: bool,
    linked: bool,
) -> None:
    if not counted:
        request.getfixturevalue("uncounted")
    async with with_waiter(redis_url) as (gateway, waiter):
        add(backend, "before")
        await settle(gateway)
        assert markers(await received(waiter)) == ["before"]
        if linked:
            trimmed(backend)
        else:
            await reconnect(gateway, backend, trimmed)
        await settle(gateway)
        await until(
            lambda: gateway.app.parts.streams is not None and gateway.app.parts.streams.gaps == 1
        )
        found = markers(await received(waiter))
        assert found.count("gap") == 1
        assert [m for m in found if m != "gap"] == list(range(87, 100))


async def reconnect(
    gateway: Running,
    backend: "redis.Redis",
    meanwhile: Callable[["redis.Redis"], None] = lambda backend: None,
) -> None:
    """The gateway's link to the stream ends; this has happened when it is there again."""
    killed = links(backend)
    with backend.pipeline(transaction=True) as together:
        for link in killed:
            together.client_kill_filter(_id=link)
        together.execute()
    meanwhile(backend)
    # Not by readiness alone: the link can be back before anybody has seen it away.
    await until(lambda: links(backend) - killed and gateway.app.ready)


def links(backend: "redis.Redis") -> set[str]:
    """The ids of the gateway's links to the stream."""
    clients = backend.client_list(_type="normal")
    return {client["id"] for client in clients if client["name"] == "trio-gateway"}


async def ids(client: WebSocketConnection, found: list[Any]) -> None:
    found += [event.get("event_id", "gap") for event in await received(client)]


def behind(backend: "redis.Redis") -> None:
    """Restore an older state, as a replica without the last entries has it: 1 to 4 of 9."""
    with backend.pipeline(transaction=True) as together:
        together.delete(STREAM)
        for n in range(1, 5):
            add(together, n, f"{n}-0")
        together.execute()


@pytest.mark.parametrize("same", [True, False], ids=["same entries", "other entries"])
async def test_no_id_is_delivered_twice_however_far_the_cursor_is_set_back(
    backend: "redis.Redis", redis_url: str, same: bool
) -> None:
    async with with_waiter(redis_url) as (gateway, waiter):
        for n in range(1, 10):
            add(backend, n, f"{n}-0")
        await settle(gateway)
        found: list[Any] = []
        await ids(waiter, found)
        await reconnect(gateway, backend, behind)
        for n in range(5, 10):  # it catches up
            add(backend, n if same else f"other {n}", f"{n}-0")
        add(backend, "new", "10-0")
        await settle(gateway)
        await ids(waiter, found)

        delivered = [each for each in found if each != "gap"]
        assert len(delivered) == len(set(delivered)) == 10
        assert "gap" in found[9:]


async def test_new_entries_of_a_redis_whose_clock_is_behind_arrive(
    backend: "redis.Redis", redis_url: str
) -> None:
    async with with_waiter(redis_url) as (gateway, waiter):
        for n in range(1, 10):
            add(backend, n, f"{n}-0")
        await settle(gateway)
        await received(waiter)
        await reconnect(gateway, backend, behind)
        for n in range(3):
            add(backend, f"new {n}", f"4-{n + 1}")
        await settle(gateway)

        assert markers(await received(waiter)) == ["gap", "new 0", "new 1", "new 2"]


def slipped_in(backend: "redis.Redis") -> None:
    """Lose two entries, add two before the cursor and one after it: the counts are equal."""
    with backend.pipeline(transaction=True) as together:
        together.delete(STREAM)
        for at in ("1-0", "1-1", "1-2", "9-0"):
            add(together, at, at)
        together.execute()


async def test_equal_counts_hide_no_loss(backend: "redis.Redis", redis_url: str) -> None:
    async with with_waiter(redis_url) as (gateway, waiter):
        for n in range(1, 4):
            add(backend, n, f"{n}-0")
        await settle(gateway)
        await received(waiter)
        await reconnect(gateway, backend, slipped_in)
        await settle(gateway)

        assert markers(await received(waiter)) == ["gap", "9-0"]
        add(backend, "next", "10-0")
        await settle(gateway)
        await until(
            lambda: gateway.app.parts.streams is not None and gateway.app.parts.streams.gaps == 1
        )
        assert markers(await received(waiter)) == ["next"]


def delete_third(backend: "redis.Redis") -> None:
    backend.xdel(STREAM, "3-0")


async def test_entries_deleted_by_a_backend_are_not_a_gap(
    backend: "redis.Redis", redis_url: str
) -> None:
    async with with_waiter(redis_url) as (gateway, waiter):
        for n in range(1, 4):
            add(backend, n, f"{n}-0")
        await settle(gateway)
        await reconnect(gateway, backend, delete_third)
        add(backend, "next")
        await settle(gateway)

        assert markers(await received(waiter)) == [1, 2, 3, "next"]
