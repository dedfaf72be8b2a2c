"""Resume from the stream, with a real Redis: a small memory answers as a big one would."""

import json
from urllib.parse import quote

import redis
import trio

from tests.support.gateways import (
    JWT_SECRET,
    Running,
    admitted,
    connect,
    http,
    make_settings,
    receive_event,
    running,
    settle,
    until,
)
from trio_gateway.core.audiences import Endpoint
from trio_gateway.core.event_ids import tag
from trio_gateway.testing import NullAuth, make_jwt, make_payload

STREAM = "events:critical"
SMALL = {"ws_history_events": 100, "ws_max_connections_per_user": 1000}


def publish(backend: "redis.Redis", first: int, last: int) -> list[str]:
    """Publish events with these numbers; return their event ids."""
    kinds = ("ROUND_READY", "ENTITY_UPDATED", "ROUND_SUBMITTED", "CART_SYNC", "NO_SUCH_TYPE")
    with backend.pipeline(transaction=False) as pipe:
        for n in range(first, last):
            pipe.xadd(STREAM, {"data": make_payload(kinds[n % 5], n=n, branch_id=1 + n % 2)})
        return [f"{entry.decode()}-{tag(STREAM)}" for entry in pipe.execute()]


async def replay(gateway: Running, last_event_id: str) -> tuple[bool, list[str]]:
    """Whether it was recovered, and the events, byte for byte."""
    url = f"{gateway.staff_url('waiter')}&last_event_id={quote(last_event_id)}"
    async with connect(url) as client:
        answer = await receive_event(client, 6)
        with trio.fail_after(5):
            texts = [str(await client.get_message()) for _ in range(answer["count"])]
            await client.send_message("ping")
            assert json.loads(await client.get_message()) == {"type": "pong"}
        return answer["recovered"], texts


async def test_small_memory_answers_as_a_big_one_would(
    backend: "redis.Redis", redis_url: str
) -> None:
    async with (
        running(make_settings(redis_url, **SMALL)) as small,
        running(make_settings(redis_url, **SMALL | {"ws_history_events": 50_000})) as big,
    ):
        ids = publish(backend, 0, 3000)
        for gateway in (small, big):
            await settle(gateway)
        for n in (0, 1, 1234, 2000, 2700, 2998, 2999):
            expected = await replay(big, ids[n])
            assert await replay(small, ids[n]) == expected
            assert expected[0]
        assert big.app.parts.older_events.scans == 0
        assert small.app.parts.older_events.scans <= 2
    async with running(make_settings(redis_url, **SMALL)) as restarted:
        recovered, texts = await replay(restarted, ids[1234])
        assert recovered
        assert len(texts) == len([n for n in range(1235, 3000) if n % 2 == 0 and n % 5 in {0, 2}])


async def test_few_bytes_of_memory_answer_as_many_would(
    backend: "redis.Redis", redis_url: str
) -> None:
    few = SMALL | {"ws_history_bytes": 1000}
    async with running(make_settings(redis_url, **few)) as gateway:
        ids = publish(backend, 0, 300)
        await settle(gateway)
        recovered, texts = await replay(gateway, ids[0])
        assert recovered
        assert len(texts) == 59


async def test_clients_that_reconnect_at_once_share_one_scan(
    backend: "redis.Redis", redis_url: str
) -> None:
    async with running(make_settings(redis_url, **SMALL)) as gateway:
        ids = publish(backend, 0, 1500)
        await settle(gateway)
        before = backend.info("commandstats").get("cmdstat_xrevrange", {"calls": 0})["calls"]
        found = dict[int, tuple[bool, list[str]]]()

        async def resume(n: int) -> None:
            found[n] = await replay(gateway, ids[n])

        with trio.fail_after(20):
            async with trio.open_nursery() as nursery:
                for n in range(500, 530):
                    nursery.start_soon(resume, n)
        after = backend.info("commandstats")["cmdstat_xrevrange"]["calls"]
        assert all(recovered for recovered, _ in found.values())
        assert len(found) == 30
        assert after - before <= 12  # of 30 scans it would be 120
        everything = found[500][1]
        for _, texts in found.values():
            assert texts == everything[len(everything) - len(texts) :]


async def test_stream_that_was_trimmed_deleted_or_does_not_answer_is_not_recovered(
    backend: "redis.Redis", redis_url: str
) -> None:
    auth = dict.fromkeys(Endpoint, NullAuth())  # which does not ask Redis
    async with running(make_settings(redis_url, **SMALL), auth=auth) as gateway:
        ids = publish(backend, 0, 2000)
        await settle(gateway)
        backend.xtrim(STREAM, maxlen=1000, approximate=False)
        assert await replay(gateway, ids[999]) == (False, [])
        assert (await replay(gateway, ids[1000]))[0]

        backend.client_pause(3000)
        gateway.app.parts.older_events._ranges.clear()
        assert await replay(gateway, ids[1000]) == (False, [])
        await until(lambda: gateway.app.parts.ready, 10)

        async with admitted(gateway.staff_url("waiter")) as waiter:
            backend.delete(STREAM)
            publish(backend, 2000, 2400)
            await until(lambda: gateway.app.parts.streams.gaps, 5)
            await waiter.get_message()
        await settle(gateway)
        assert await replay(gateway, ids[1500]) == (False, [])


async def test_catch_up_by_event_id_reads_the_stream_too(
    backend: "redis.Redis", redis_url: str
) -> None:
    async with running(make_settings(redis_url, **SMALL)) as gateway:
        ids = publish(backend, 0, 3000)
        await settle(gateway)
        token = make_jwt(JWT_SECRET, roles=["ADMIN"])
        path = f"/ws/catchup?branch_id=1&token={token}&since="
        reply = await http(gateway.port, path + ids[1000])
        assert "gateway-complete" not in reply.headers
        numbers = [event["n"] for event in reply.json["events"]]
        assert numbers == [n for n in range(1001, 3000) if n % 2 == 0 and n % 5 in {0, 1, 2}]
        assert "next" not in reply.json
        (scanned,) = {gateway.app.parts.older_events.scans}
        assert scanned == 1
        backend.xtrim(STREAM, maxlen=1000, approximate=False)
        gateway.app.parts.older_events._ranges.clear()
        reply = await http(gateway.port, path + ids[1000])
        assert reply.headers["gateway-complete"] == "false"


async def test_catch_up_by_time_reads_the_stream_too(
    backend: "redis.Redis", redis_url: str
) -> None:
    async with running(make_settings(redis_url, **SMALL)) as gateway:
        ids = publish(backend, 0, 1000)
        await settle(gateway)
        token = make_jwt(JWT_SECRET, roles=["ADMIN"])
        path = f"/ws/catchup?branch_id=1&token={token}&since="
        everything = [n for n in range(1000) if n % 2 == 0 and n % 5 in {0, 1, 2}]
        reply = await http(gateway.port, f"{path}{int(ids[0].split('-')[0]) / 1000}")
        assert "gateway-complete" not in reply.headers
        assert [event["n"] for event in reply.json["events"]] == everything
        backend.xtrim(STREAM, maxlen=500, approximate=False)
        gateway.app.parts.older_events._ranges.clear()
        reply = await http(gateway.port, f"{path}0")
        assert reply.headers["gateway-complete"] == "false"
