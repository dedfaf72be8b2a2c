"""The wall clock is set: tokens go by it, and no interval in the gateway notices."""

import json
import os
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import pytest
import redis
import trio
from trio_websocket import WebSocketConnection

from tests.support.gateways import (
    Reachable,
    admitted,
    closed,
    connect,
    environment,
    free_port,
    http,
    make_settings,
    metrics,
    process,
    receive_event,
    received,
    running,
    settle,
    until,
    valkey,
    wait,
)
from tests.support.sockets import Client, dialled
from trio_gateway.core.close_codes import Close

from . import faults

HOUR: Final = 3600
STREAM: Final = "events:critical"


def publish(backend: "redis.Redis", n: int) -> None:
    event = {"type": "ROUND_READY", "tenant_id": 1, "branch_id": 1, "id": f"event-{n}", "n": n}
    backend.xadd(STREAM, {"data": json.dumps(event)})


async def next_event(client: WebSocketConnection) -> dict[str, Any]:
    """The next one, past the words about the resume."""
    while (event := await receive_event(client)).get("type") != "ROUND_READY":
        pass
    found: dict[str, Any] = event
    return found


async def test_clock_step_of_an_hour_expires_tokens_and_changes_no_heartbeat_and_no_history(
    redis_url: str,
) -> None:
    wrong = 0.0
    settings = make_settings(redis_url, ws_cleanup_interval=0.05)
    with redis.Redis.from_url(redis_url) as backend:
        async with running(settings, clock=lambda: time.time() + wrong) as gateway:
            issued = time.time() - 2 * HOUR  # in the past by either clock
            url = gateway.staff_url("waiter", iat=issued, exp=time.time() + 2.5 * HOUR)
            short = gateway.staff_url("waiter", iat=issued, life=HOUR / 2)
            async with admitted(url) as stays, admitted(short) as first, admitted(short) as second:
                publish(backend, 1)
                seen = (await next_event(stays))["event_id"]
                publish(backend, 2)
                await settle(gateway)

                wrong = HOUR
                for each in (first, second):
                    assert await closed(each) == (Close.AUTH_FAILED, "token expired")
                await trio.sleep(0.1)  # everything has been cleaned up again
                async with connect(f"{url}&last_event_id={seen}") as returned:
                    said = await receive_event(returned)
                    assert (said["recovered"], said["count"]) == (True, 1)
                    assert (await next_event(returned))["n"] == 2
                async with connect(short) as late:
                    assert (await closed(late))[0] == Close.AUTH_FAILED

                wrong = -HOUR
                publish(backend, 3)
                await settle(gateway)
                await trio.sleep(0.1)
                async with connect(f"{url}&last_event_id={seen}") as returned:
                    said = await receive_event(returned)
                    assert (said["recovered"], said["count"]) == (True, 2)
                assert [event["n"] for event in await received(stays)] == [2, 3]
                async with admitted(short):
                    pass
            assert gateway.app.parts.hub.closed[Close.AUTH_FAILED] == 3
            assert not gateway.app.parts.hub.closed[Close.HEARTBEAT_TIMEOUT]


# A process, with every interval that a client or Redis can feel


@asynccontextmanager
async def gateway_with(
    redis_url: str, clock: Path, **settings: str
) -> AsyncIterator[tuple[Reachable, Any]]:
    port = free_port()
    env = environment(
        redis_url,
        CHAOS_CLOCK=str(clock),
        PYTHONPATH=faults.PYTHONPATH,
        WS_MAX_CONNECTIONS_PER_USER="1000",
        **settings,
    )
    arguments = ["hypercorn", "-k", "trio", "-b", f"127.0.0.1:{port}", "trio_gateway.app:app"]
    async with process(*arguments, env=env, port=port, cwd=clock.parent) as started:
        yield Reachable(port), started


async def ending(client: Client, since: float) -> tuple[int, float]:
    """The code with which a client is closed, and after how many seconds."""
    with trio.fail_after(15):
        code, _ = await client.closed()
    return code, time.monotonic() - since


@pytest.mark.chaos
@pytest.mark.parametrize("step", [HOUR, -HOUR])
async def test_clock_change_moves_no_interval_of_a_process(tmp_path: Path, step: int) -> None:
    clock = tmp_path / "clock"
    clock.write_text("0")
    intervals = {
        "WS_HEARTBEAT_TIMEOUT": "4",
        "WS_PING_INTERVAL": "1",
        "WS_WRITE_TIMEOUT": "2",
        "WS_CLEANUP_INTERVAL": "0.5",
        "WS_ACCEPT_TIMEOUT": "3",
        "JWT_REVALIDATION_INTERVAL": "1",
        "CIRCUIT_RECOVERY_TIMEOUT": "0.5",
    }
    with valkey() as server:
        backend = redis.Redis(port=server.port)
        async with gateway_with(server.connection_url, clock, **intervals) as (gateway, started):
            await until(lambda: is_ready(gateway))
            long = {"exp": time.time() + 3 * HOUR}
            found: dict[str, tuple[int, float]] = {}
            counted: Counter[str] = Counter()

            async def opened(client: Client, **claims: Any) -> Client:
                url = gateway.staff_url("waiter", **long | claims)
                return await client.upgrade(url.removeprefix(gateway.url))

            async def silent(client: Client) -> None:
                """Only its library answers."""
                found["silent"] = await ending(client, began)

            async def dripping(client: Client) -> None:
                """Its request head never ends."""
                await client.send(b"GET /ws/waiter HTTP/1.1\r\n")
                with trio.fail_after(15):
                    status, _ = await client.response()
                found["dripping"] = status, time.monotonic() - began

            async def revoked(client: Client) -> None:
                """Its token is revoked right after the step."""
                await trio.sleep(1)
                backend.set("auth:token:blacklist:j1", "1")
                revoked_at = time.monotonic()
                await client.say("ping")
                found["revoked"] = await ending(client, revoked_at)

            async def lively(client: Client) -> None:
                """Says something every second, and counts the pings and the events."""
                async with trio.open_nursery() as nursery:

                    async def speak() -> None:
                        for _ in range(6):
                            await trio.sleep(1)
                            await client.send(b"\x8a\x80\x00\x00\x00\x00")  # a pong: no answer
                            await client.say("still here")
                        nursery.cancel_scope.cancel()

                    nursery.start_soon(speak)
                    while True:
                        opcode, payload = await client.frame()
                        counted["pings"] += opcode == 0x9
                        counted["events"] += b"ROUND_READY" in payload
                        assert opcode != 0x8, payload

            async with (
                dialled(gateway.port) as a,
                dialled(gateway.port) as b,
                dialled(gateway.port) as c,
                dialled(gateway.port) as d,
                trio.open_nursery() as nursery,
            ):
                began = time.monotonic()
                nursery.start_soon(silent, await opened(a))
                nursery.start_soon(dripping, b)
                nursery.start_soon(revoked, await opened(c, jti="j1"))
                await opened(d)
                nursery.start_soon(lively, d)
                await trio.sleep(0.7)
                clock.write_text(str(step))
                await trio.sleep(1.3)
                publish(backend, 1)
                for kind in ("normal", "pubsub"):  # the links of both sources
                    backend.client_kill_filter(_type=kind)
                await trio.sleep(2)
                publish(backend, 2)

            print(step, found, dict(counted))
            code, seconds = found["silent"]
            assert code == Close.HEARTBEAT_TIMEOUT
            assert 3.5 < seconds < 5.5
            code, seconds = found["dripping"]
            assert code == 408
            assert 2.5 < seconds < 4.5
            code, seconds = found["revoked"]
            assert code == Close.AUTH_FAILED
            assert seconds < 3
            assert 3 <= counted["pings"] <= 8
            assert counted["events"] == 2
            assert (await metrics(gateway.port))["circuit_breaker_state{stream}"] == 0
            stopped = time.monotonic()
            os.kill(started.pid, signal.SIGTERM)
            await wait(started, 8)
            assert time.monotonic() - stopped < 5


async def is_ready(gateway: Reachable) -> bool:
    return (await http(gateway.port, "/ws/health/ready")).status == 200
