"""Redis comes back without its newest entries, as a new primary may: no loss is silent."""

import json
from typing import Any
from urllib.parse import quote

import redis

from tests.support.event_source import listening
from tests.support.gateways import (
    Running,
    admitted,
    connect,
    http,
    make_settings,
    metrics,
    receive_event,
    received,
    running,
    settle,
    until,
)
from tests.support.redis_server import RedisServer, valkey
from trio_gateway.core.event_ids import tag
from trio_gateway.testing import make_payload

STREAMS = ("orders", "payments")
GAP = {"type": "gap"}


def add(server: RedisServer, first: int, last: int) -> dict[int, str]:
    """Add events with these numbers to both streams in turn; return their event ids."""
    found = {}
    with redis.Redis.from_url(server.connection_url) as backend:
        for n in range(first, last):
            stream = STREAMS[n % 2]
            entry = backend.xadd(stream, {"data": make_payload("ROUND_READY", entity=n)})
            found[n] = f"{entry.decode()}-{tag(stream)}"
    return found


def save(server: RedisServer) -> None:
    with redis.Redis.from_url(server.connection_url) as backend:
        backend.save()


async def lose_what_was_not_saved(server: RedisServer) -> None:
    server.kill()
    server.start_again()
    await until(server.is_running)


def staff_path(gateway: Running, path: str, more: str) -> str:
    token = gateway.staff_url("waiter").partition("token=")[2]
    return f"{path}?token={token}{more}"


async def answers(gateway: Running, last_event_id: str) -> dict[str, tuple[bool, list[Any]]]:
    """What each way to come back says: whether all is known, and the missed events."""
    found: dict[str, tuple[bool, list[Any]]] = {}
    url, name = gateway.staff_url("waiter"), "Last-Event-ID"
    headers = [(name.encode(), last_event_id.encode())]
    query = f"&last_event_id={quote(last_event_id)}"
    for way, options in {"query": {}, "header": {"extra_headers": headers}, "message": {}}.items():
        async with connect(url + query * (way == "query"), **options) as client:
            if way == "message":
                message = {"type": "resume", "last_event_id": last_event_id}
                await client.send_message(json.dumps(message))
            answer = await receive_event(client, 6)
            missed = [(await receive_event(client))["entity"] for _ in range(answer["count"])]
            found[way] = answer["recovered"], missed
    path = staff_path(gateway, "/ws/waiter/events", "")
    async with listening(gateway.port, path, {name: last_event_id}) as listener:
        answer = (await listener.next(6)).json
        missed = [(await listener.next()).json["entity"] for _ in range(answer["count"])]
        found["event stream"] = answer["recovered"], missed
    since = f"&branch_id=1&since={quote(last_event_id)}"
    reply = await http(gateway.port, staff_path(gateway, "/ws/catchup", since))
    is_complete = reply.headers.get("gateway-complete") != "false"
    found["catch-up"] = is_complete, [event["entity"] for event in reply.json["events"]]
    return found


async def test_entries_that_redis_has_lost_are_one_gap_and_their_ids_unknown_to_all() -> None:
    with valkey() as server:
        settings = make_settings(
            server.connection_url,
            redis_streams=STREAMS,
            circuit_recovery_timeout=0.1,
            ws_max_connections_per_user=100,
        )
        async with (
            running(settings) as first,
            admitted(first.staff_url("waiter")) as waiter,
            admitted(first.diner_url()) as diner,
        ):
            ids = add(server, 0, 4)
            save(server)
            ids |= add(server, 4, 8)
            await settle(first)
            assert sorted(event["entity"] for event in await received(waiter)) == list(range(8))
            await received(diner)
            await lose_what_was_not_saved(server)
            streams = first.app.parts.streams
            assert streams is not None
            await until(lambda: streams.gaps == 2 and first.app.ready, 15)
            ids |= add(server, 8, 10)
            await settle(first)
            found = await received(waiter)
            assert found[0] == GAP
            assert sorted(event["entity"] for event in found[1:]) == [8, 9]
            assert await received(diner) == [GAP]
            assert (await metrics(first.port))["stream_gaps_total"] == 2

            async with running(settings) as second:
                for n, gateway in ((4, first), (7, first), (4, second), (7, second)):
                    for way, (is_known, missed) in (await answers(gateway, ids[n])).items():
                        assert not is_known, way
                        assert not missed or way == "catch-up"
                for way, answer in (await answers(second, ids[1])).items():
                    assert answer == (True, [3, 9]), way
