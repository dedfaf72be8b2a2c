"""A minimal session with another client library: ``websockets``."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import redis
import trio
from websockets.exceptions import ConnectionClosed
from websockets.trio.client import ClientConnection
from websockets.trio.client import connect as connect_with_websockets

from tests.support.gateways import JWT_SECRET, TABLE_SECRET, Transport, make_settings, running
from trio_gateway.testing import make_jwt, make_table_token

TRANSPORTS = pytest.mark.parametrize("transport", ["direct", "asgi"])


@asynccontextmanager
async def connected(url: str, **options: Any) -> AsyncIterator[ClientConnection]:
    async with connect_with_websockets(url, proxy=None, **options) as client:
        yield client


async def ping(client: ClientConnection) -> None:
    """Wait for the answer to a ping: the client has been admitted."""
    await client.send('{"type": "ping"}')
    assert await client.recv() == '{"type":"pong"}'


async def ending(client: ClientConnection) -> tuple[int, str]:
    with trio.fail_after(5):
        try:
            while True:
                await client.recv()
        except ConnectionClosed as error:
            found = error.rcvd
    assert found is not None
    return found.code, found.reason


@TRANSPORTS
async def test_minimal_session_with_another_library(
    backend: "redis.Redis", redis_url: str, transport: Transport
) -> None:
    text = json.dumps(
        {
            "type": "ROUND_READY",
            "tenant_id": 1,
            "branch_id": 1,
            "session_id": 456,
            "entity": {"note": "sin ajo, por favor 🙏"},
        },
        ensure_ascii=False,
    )
    async with running(make_settings(redis_url), transport=transport) as gateway:
        for url in (
            gateway.staff_url("waiter"),
            gateway.staff_url("kitchen"),
            gateway.staff_url("admin"),
            gateway.diner_url(),
        ):
            async with connected(url) as client:
                if transport == "direct":  # Hypercorn's protocol code accepts any offer
                    assert client.protocol.extensions == []
                await ping(client)
                backend.publish("branch:1:admin", text)
                assert await client.recv() == text
                await client.send("ping")
                assert await client.recv() == '{"type":"pong"}'
                with trio.fail_after(2):
                    await (await client.ping()).wait()
                await client.aclose(4321, "done")
                assert client.close_code == 4321  # the echo


@TRANSPORTS
@pytest.mark.parametrize("way", ["query", "header", "subprotocol"])
@pytest.mark.parametrize("who", ["waiter", "diner"])
async def test_credential_may_be_sent_in_three_places(
    redis_url: str, transport: Transport, way: str, who: str
) -> None:
    token = make_jwt(JWT_SECRET) if who == "waiter" else make_table_token(TABLE_SECRET)
    name = "token" if who == "waiter" else "table_token"
    ways: dict[str, dict[str, Any]] = {
        "query": {},
        "header": {"additional_headers": {"Authorization": f"Bearer {token}"}},
        "subprotocol": {"subprotocols": ["gateway.v1", f"bearer.{token}"]},
    }
    async with running(make_settings(redis_url), transport=transport) as gateway:
        query = f"?{name}={token}" if way == "query" else ""
        async with connected(f"{gateway.url}/ws/{who}{query}", **ways[way]) as client:
            await ping(client)
            assert client.subprotocol == ("gateway.v1" if way == "subprotocol" else None)


@TRANSPORTS
async def test_rejections_and_violations_arrive_with_their_codes(
    redis_url: str, transport: Transport
) -> None:
    async with running(make_settings(redis_url), transport=transport) as gateway:
        for url, expected in {
            f"{gateway.url}/ws/waiter": (4001, "token missing"),
            f"{gateway.url}/ws/waiter?token=nonsense": (4001, "token invalid"),
            gateway.staff_url("waiter", exp=1): (4001, "token expired"),
            gateway.staff_url("kitchen", roles=["WAITER"]): (4003, "role not admitted here"),
            gateway.staff_url("admin", branch_ids=[]): (4003, "no branch in the token"),
        }.items():
            async with connected(url) as client:
                assert await ending(client) == expected
        async with connected(gateway.staff_url("waiter"), origin="https://evil.example") as client:
            assert (await ending(client))[0] == 1008
        async with connected(gateway.staff_url("waiter"), origin="null") as client:
            assert (await ending(client))[0] == 4003
        async with connected(gateway.staff_url("waiter")) as client:
            await client.send(b"\x00")
            assert (await ending(client))[0] == 1003
        async with connected(gateway.staff_url("waiter")) as client:
            await client.send("ñ" * 33_000)
            assert (await ending(client))[0] == 1009
        async with connected(gateway.staff_url("waiter")) as client:
            await ping(client)
            for _ in range(25):
                await client.send("ping")
            assert (await ending(client))[0] == 4029


@TRANSPORTS
async def test_message_in_fragments_is_one_message(redis_url: str, transport: Transport) -> None:
    async with (
        running(make_settings(redis_url), transport=transport) as gateway,
        connected(gateway.staff_url("waiter")) as client,
    ):

        async def fragments() -> AsyncIterator[str]:
            for part in ('{"ty', 'pe":', '"ping"', ',"x":"Ñ"}'):
                yield part
                await trio.lowlevel.checkpoint()

        await client.send(fragments())
        assert await client.recv() == '{"type":"pong"}'
