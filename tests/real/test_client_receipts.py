"""The Python client confirms events to real gateways, without code of the application."""

from pathlib import Path

import redis
import trio

from tests.support.gateways import JWT_SECRET, admitted, received
from tests.support.receipts import EVENT, next_events, numbers, one, publish, receipts
from trio_gateway.client import Event, connect
from trio_gateway.testing import make_jwt

TRACKED = "[routes.SERVICE_CALL_CREATED]\nreceipt = true\n"
TO_FLOOR = """
[routes.SERVICE_CALL_CREATED]
must_reach = "waiters"
within = 0.4
then = [{to = "floor", within = 0.8}]
"""


async def test_gateway_knows_what_the_client_has_received_and_its_user_has_seen(
    redis_url: str, backend: "redis.Redis", tmp_path: Path
) -> None:
    token = make_jwt(JWT_SECRET, sector_ids=[5])
    async with (
        one(redis_url, tmp_path, TRACKED) as gateway,
        connect(f"{gateway.url}/ws/waiter", token) as client,
    ):

        async def until_receipts(event: Event, *expected: int) -> None:
            with trio.fail_after(5):
                while numbers(await receipts(gateway, event.event_id)) != expected:
                    await trio.sleep(0.05)

        await client.wait_open()
        publish(backend, n=1)
        publish(backend, n=2)
        first = await anext(client)
        await until_receipts(first, 1, 1, 0)
        second = await anext(client)
        await until_receipts(second, 1, 1, 0)
        client.seen(first)
        await until_receipts(first, 1, 1, 1)
        (connection,) = gateway.app.parts.hub.connections
        connection.abort()
        client.seen(second)
        await until_receipts(second, 1, 1, 1)
        assert gateway.app.parts.receipts.ignored == 0


async def test_escalated_event_is_confirmed_although_it_is_older_than_the_clients_position(
    redis_url: str, backend: "redis.Redis", tmp_path: Path
) -> None:
    frequent = {"ws_heartbeat_timeout": 2.8, "ws_cleanup_interval": 0.5}
    async with (
        one(redis_url, tmp_path, TO_FLOOR, **frequent) as gateway,
        admitted(gateway.staff_url("admin", sub="9", roles=["ADMIN"])) as admin,
    ):
        publish(backend)
        publish(backend, type="ROUND_READY")
        assert len(await next_events(admin, 2)) == 2
        token = make_jwt(JWT_SECRET, sector_ids=[6])
        async with connect(f"{gateway.url}/ws/waiter", token) as colleague:
            await colleague.wait_open()
            with trio.fail_after(5):
                event = await anext(colleague)
            assert event.type == EVENT["type"]
            assert event.event_id is not None
            assert event.event_id < colleague.last_event_id
            [unheard] = await next_events(admin, 1)
            assert unheard["entity"]["to"] == "waiters"
            await trio.sleep(1.5)  # longer than the next step, and for a ping
        assert await received(admin) == []
        assert gateway.app.parts.receipts.ignored == 0
