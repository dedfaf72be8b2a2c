"""The Python client against real gateways and a real Valkey."""

import json
import time

import pytest
import redis
import trio

from tests.support.gateways import JWT_SECRET, Transport, make_settings, running, until
from trio_gateway.client import Client, Refused, Status, connect, credential
from trio_gateway.testing import make_jwt


def publish(backend: "redis.Redis", *numbers: int) -> None:
    for number in numbers:
        event = {"type": "ROUND_READY", "tenant_id": 1, "branch_id": 1, "n": number}
        backend.xadd("events:critical", {"data": json.dumps(event)})


async def numbers(client: Client, count: int) -> list[int]:
    with trio.fail_after(10):
        return [(await anext(client)).data["n"] for _ in range(count)]


@pytest.mark.parametrize("transport", ["direct", "asgi"])
async def test_client_receives_what_its_token_may_receive_over_either_transport(
    redis_url: str, backend: "redis.Redis", transport: Transport
) -> None:
    async with (
        running(make_settings(redis_url), transport=transport) as gateway,
        connect(f"{gateway.url}/ws/waiter", make_jwt(JWT_SECRET)) as client,
    ):
        await client.wait_open()
        publish(backend, 1, 2)
        assert await numbers(client, 2) == [1, 2]
        assert client.last_event_id


async def test_invalid_token_is_refused(redis_url: str) -> None:
    async with running(make_settings(redis_url)) as gateway:
        for endpoint, token, code in [
            ("waiter", "nonsense", 4001),
            ("kitchen", make_jwt(JWT_SECRET), 4003),
            ("nowhere", make_jwt(JWT_SECRET), 404),
        ]:
            async with connect(f"{gateway.url}/ws/{endpoint}", token) as client:
                with trio.fail_after(5), pytest.raises(Refused) as refused:
                    await client.wait_open()
                assert refused.value.code == code


async def test_client_renews_before_its_token_expires(
    redis_url: str, backend: "redis.Redis", monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(credential, "RENEW_AT", 0.001)  # almost at once: after a second
    statuses: list[Status] = []
    lives = iter([20, 600])

    async def provide(refused: bool) -> str:
        assert not refused
        return make_jwt(JWT_SECRET, life=next(lives))

    async with (
        running(make_settings(redis_url)) as gateway,
        connect(f"{gateway.url}/ws/waiter", provide, on_state=statuses.append) as client,
    ):
        await client.wait_open()
        (connection,) = gateway.app.parts.hub.connections
        await until(lambda: connection.principal.expires_at > time.time() + 60)
        publish(backend, 1)
        assert await numbers(client, 1) == [1]
    assert [status.state for status in statuses] == ["connecting", "open"]


async def test_client_pings_as_often_as_this_gateway_asks(redis_url: str) -> None:
    settings = make_settings(redis_url, ws_heartbeat_timeout=1.2, ws_cleanup_interval=0.1)
    async with (
        running(settings) as gateway,
        connect(f"{gateway.url}/ws/waiter", make_jwt(JWT_SECRET, sector_ids=[5])) as client,
    ):
        await client.wait_open()
        assert await client.refresh_sectors() == (5,)
        await trio.sleep(1.6)
        assert client.status.state == "open"
        assert gateway.app.parts.hub.last_number == 1


async def test_broken_connection_neither_loses_nor_doubles_an_event(
    redis_url: str, backend: "redis.Redis"
) -> None:
    async with (
        running(make_settings(redis_url)) as gateway,
        connect(f"{gateway.url}/ws/waiter", make_jwt(JWT_SECRET)) as client,
    ):
        await client.wait_open()
        publish(backend, 1, 2)
        assert await numbers(client, 2) == [1, 2]
        (connection,) = gateway.app.parts.hub.connections
        connection.abort()
        publish(backend, 3, 4)
        assert await numbers(client, 2) == [3, 4]
        assert gateway.app.parts.hub.last_number == 2
