"""Faults of Redis: a selection; e2e/chaos tries all."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import partial

import pytest
import redis
import trio

from e2e.chaos.redis_faults import FAULTS, Stage
from e2e.chaos.relay import Relay, Way, open_relay
from tests.support.gateways import (
    JWT_SECRET,
    Running,
    admitted,
    closed,
    connect,
    http,
    make_settings,
    metrics,
    open_commands,
    receive_event,
    received,
    running,
    until,
    valkey,
)
from trio_gateway.broker.commands import Unavailable
from trio_gateway.core.close_codes import Rejected
from trio_gateway.core.resilience import Breaker
from trio_gateway.testing import make_jwt

STREAM = "events:critical"
NOW = {
    "circuit_failure_threshold": 2,
    "circuit_recovery_timeout": 0.05,
    "ws_message_rate_limit": 1000,
}


@asynccontextmanager
async def relayed(redis_url: str, **changes: object) -> AsyncIterator[tuple[Relay, Running]]:
    """A gateway and the relay between it and this Redis."""
    async with open_relay(int(redis_url.rpartition(":")[2])) as relay:
        settings = make_settings(f"redis://127.0.0.1:{relay.port}", **NOW | changes)
        async with running(settings, wait_ready=False) as gateway:
            await until(lambda: gateway.app.ready or gateway.app.parts.breakers["stream"].failures)
            yield relay, gateway


def event(entity: object = 0) -> str:
    keys = {"type": "ROUND_READY", "tenant_id": 1, "branch_id": 1, "session_id": 456}
    return json.dumps(keys | {"entity": entity})


async def issue(gateway: Running) -> tuple[int, str]:
    headers = {"Authorization": f"Bearer {make_jwt(JWT_SECRET, roles=['WAITER'])}"}
    reply = await http(gateway.port, "/ws/ticket", method="POST", headers=headers)
    return reply.status, reply.json.get("ticket", "")


async def readiness(gateway: Running) -> int:
    return (await http(gateway.port, "/ws/health/ready")).status


@pytest.mark.parametrize("name", ["unexpected replies", "out of memory"])
async def test_fault_of_redis_is_detected_and_recovered_from(name: str) -> None:
    (fault,) = [each for each in FAULTS if each.name == name]
    with valkey() as server:
        async with (
            relayed(server.connection_url) as (relay, gateway),
            admitted(gateway.diner_url()) as diner,
        ):
            stage = Stage(server, relay)
            await fault.begin(stage)

            async def noticed() -> bool:
                assert await received(diner) == []
                assert (await issue(gateway))[0] in {200, 503}
                found = (await metrics(gateway.port)).by_label("circuit_breaker_state")
                return await readiness(gateway) == 503 and all(found[name] for name in fault.opens)

            await until(noticed)
            await fault.end(stage)

            async def recovered() -> bool:
                return await readiness(gateway) == 200 and not any(
                    (await metrics(gateway.port)).by_label("circuit_breaker_state").values()
                )

            await until(recovered)
            with stage.admin() as backend:
                backend.xadd(STREAM, {"data": event()})
            assert (await receive_event(diner))["type"] == "ROUND_READY"


async def test_read_only_redis_refuses_tickets_and_no_client() -> None:
    with valkey() as server:
        async with relayed(server.connection_url, redis_dlq_stream="events:dlq") as (_, gateway):
            _, ticket = await issue(gateway)
            with redis.Redis.from_url(server.connection_url) as backend:
                backend.xadd(STREAM, {"data": "no json"})
                backend.replicaof("127.0.0.1", "1")
                for _ in range(3):
                    assert (await issue(gateway))[0] == 503
                async with connect(f"{gateway.url}/ws/waiter?ticket={ticket}") as refused:
                    assert (await closed(refused))[0] == 1013
                async with admitted(gateway.staff_url("waiter")):
                    pass
                assert await readiness(gateway) == 503
                health = await http(gateway.port, "/ws/health")
                assert (health.status, health.json["status"]) == (200, "degraded")
                backend.replicaof("NO", "ONE")

            async def recovered() -> bool:
                return await readiness(gateway) == 200

            await until(recovered)
            async with admitted(f"{gateway.url}/ws/waiter?ticket={ticket}"):
                pass


async def test_dead_letter_refused_by_redis_is_counted(
    redis_url: str, backend: "redis.Redis"
) -> None:
    changes = {"redis_dlq_stream": "events:dlq", "circuit_recovery_timeout": 60}
    async with relayed(redis_url, **changes) as (_, gateway):
        backend.xadd(STREAM, {"data": "no json"})

        async def copied() -> bool:
            return (await metrics(gateway.port))["dead_letters_total{copied}"] == 1

        async def lost() -> bool:
            return (await metrics(gateway.port))["dead_letters_total{lost}"] == 1

        await until(copied)
        for _ in range(2):
            gateway.app.parts.breakers["writes"].failed(trio.current_time())
        backend.xadd(STREAM, {"data": "no json"})
        await until(lost)
        assert await copied()


async def test_ticket_whose_reply_is_lost_is_not_called_invalid(
    redis_url: str, backend: "redis.Redis"
) -> None:
    """A second GETDEL would find nothing, because the first one removed the ticket."""
    async with relayed(redis_url) as (relay, gateway):
        _, ticket = await issue(gateway)
        tickets = gateway.app.parts.tickets
        await tickets.peek(ticket)  # as a client that is otherwise admitted
        relay.vanish(Way.TO_CLIENT)

        async def redeem() -> None:
            with pytest.raises(Rejected) as rejected:
                await tickets.redeem(ticket)
            assert rejected.value.close == 1013

        async with trio.open_nursery() as nursery:
            nursery.start_soon(redeem)
            await until(lambda: not backend.keys("gateway:ticket:*"))
            relay.reset()
            relay.forward()


@pytest.mark.parametrize("command", ["mget", "get", "getdel"])
async def test_command_refused_by_redis_is_a_failed_lookup_and_not_a_negative_answer(
    redis_url: str, backend: "redis.Redis", command: str
) -> None:
    async with running(make_settings(redis_url)) as gateway:
        _, ticket = await issue(gateway)
    backend.acl_setuser(
        "meek", enabled=True, reset=True, passwords="+pw", keys=["*"], channels=["*"],
        categories=["+@all"], commands=[f"-{command}"],
    )  # fmt: skip
    url = redis_url.replace("//", "//meek:pw@")
    async with running(make_settings(url)) as gateway:
        at = gateway.staff_url("waiter", jti="a")
        if command != "mget":
            at = f"{gateway.url}/ws/waiter?ticket={ticket}"
        async with connect(at) as client:
            assert (await closed(client))[0] == 1013
        if command == "mget":
            assert (await issue(gateway))[0] == 503


@asynccontextmanager
async def unreached(redis_url: str, **changes: object) -> AsyncIterator[tuple[Relay, Running]]:
    """A gateway whose Redis is up but refuses its connections."""
    async with open_relay(int(redis_url.rpartition(":")[2])) as relay:
        relay.refuse()
        settings = make_settings(f"redis://127.0.0.1:{relay.port}", **NOW | changes)
        async with running(settings, wait_ready=False) as gateway:
            yield relay, gateway


async def test_client_connected_before_redis_gets_the_events_it_missed(
    redis_url: str, backend: "redis.Redis"
) -> None:
    backend.xadd(STREAM, {"data": event("long ago")}, id="1000-0")
    async with (
        unreached(redis_url) as (relay, gateway),
        admitted(gateway.diner_url()) as live,
        connect(gateway.diner_url() + "&last_event_id=") as resuming,
    ):
        for n in range(3):
            backend.xadd(STREAM, {"data": event(n)})
        async with connect(gateway.diner_url()) as held:
            await until(lambda: len(gateway.app.parts.hub) == 3)
            relay.forward()
            await until(lambda: gateway.app.ready)
            backend.xadd(STREAM, {"data": event(3)})
            assert (await receive_event(resuming))["type"] == "resumed"
            for client in (live, resuming, held):
                found = [await receive_event(client) for _ in range(4)]
                assert [each["entity"] for each in found] == [0, 1, 2, 3]
                assert await received(client) == []


async def test_client_connected_before_redis_gets_a_gap_if_events_are_unknown(
    redis_url: str, backend: "redis.Redis"
) -> None:
    async with (
        unreached(redis_url, ws_history_events=2) as (relay, gateway),
        admitted(gateway.diner_url()) as client,
    ):
        for n in range(3):
            backend.xadd(STREAM, {"data": event(n)})
        relay.forward()
        await until(lambda: gateway.app.ready)
        assert await receive_event(client) == {"type": "gap"}
        backend.xadd(STREAM, {"data": event(3)})
        assert (await receive_event(client))["entity"] == 3


async def test_client_connected_before_redis_that_missed_nothing_gets_nothing(
    redis_url: str, backend: "redis.Redis"
) -> None:
    backend.xadd(STREAM, {"data": event("long ago")}, id="1000-0")
    async with (
        unreached(redis_url) as (relay, gateway),
        admitted(gateway.diner_url()) as client,
    ):
        relay.forward()
        await until(lambda: gateway.app.ready)
        assert await received(client) == []


REPLIES = [
    b"+OK\r\n", b":1\r\n", b"*0\r\n", b"*1\r\n$3\r\nfoo\r\n", b"$-1\r\n", b"%1\r\n+a\r\n+b\r\n",
    b"*1\r\n%1\r\n*0\r\n+x\r\n", b">1\r\n:5\r\n+OK\r\n", b">0\r\n+OK\r\n", b"*4294967295\r\n",
    b"-\xff\xfe\r\n", b"-OOM no\r\n", b"-READONLY no\r\n", b"-LOADING no\r\n", b"-NOAUTH no\r\n",
    b"-MASTERDOWN no\r\n", b"-MOVED 1 a:1\r\n", b"\x00\xff\r\n", b"HTTP/1.1 400\r\n\r\n",
    b"*2\r\n-ERR a\r\n-ERR b\r\n", b"+OK\r\n+OK\r\n",
]  # fmt: skip


@pytest.mark.parametrize("polite", [True, False], ids=["after the greetings", "at once"])
async def test_command_is_answered_or_unavailable_whatever_redis_replies(polite: bool) -> None:
    reply = b""

    async def serve(stream: trio.SocketStream) -> None:
        async with stream:
            with suppress(trio.BrokenResourceError):
                async for data in stream:
                    for word in data.split(b"*")[1:]:
                        hello = b"%1\r\n+proto\r\n:3\r\n" if b"HELLO" in word else b"+OK\r\n"
                        greeting = b"HELLO" in word or b"CLIENT" in word
                        await stream.send_all(hello if greeting and polite else reply)

    breakers = Breaker(1000, 1), Breaker(1000, 1)
    async with trio.open_nursery() as nursery:
        (listener,) = await nursery.start(partial(trio.serve_tcp, serve, 0, host="127.0.0.1"))
        url = f"redis://127.0.0.1:{listener.socket.getsockname()[1]}"
        async with open_commands(url, *breakers, max_connections=5) as commands:
            for reply in REPLIES:  # noqa: B007 - what is served
                with pytest.raises(Unavailable):
                    await commands.check(1)
                with pytest.raises(Unavailable):
                    await commands.mget(["a", "b"])
                with suppress(Unavailable):
                    assert isinstance(await commands.getdel("a"), bytes | None)
                with suppress(Unavailable):
                    added = await commands.add_once("a", 1, "b", {"data": b""}, 10)
                    assert isinstance(added, bool)
        nursery.cancel_scope.cancel()
