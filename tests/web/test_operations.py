"""Metrics and detailed health on a separate address."""

from typing import Final

import trio

from tests.support.gateways import (
    environment,
    free_port,
    http,
    make_settings,
    process,
    running,
    serving,
    wait,
)
from tests.support.sockets import dialled, make_head

OPERATORS: Final = ("/ws/metrics", "/ws/health/detailed")
PUBLIC: Final = ("/ws/ticket", "/ws/console", "/ws/client.js", "/ws/waiter/events", "/ws/catchup")


async def statuses(port: int, *paths: str, method: str = "GET") -> set[int]:
    return {(await http(port, path, method=method)).status for path in paths}


async def test_operations_address_serves_only_operations_and_no_other_address_does(
    redis_url: str,
) -> None:
    port = free_port()
    async with serving(redis_url, "direct", ws_operations_bind=f"127.0.0.1:{port}") as gateway:
        for method in ("GET", "HEAD", "POST", "OPTIONS"):
            assert await statuses(gateway.port, *OPERATORS, method=method) == {404}
        tricks = (
            "/ws/%6Detrics",
            "//ws/metrics",
            "/ws//metrics",
            "/ws/health/../metrics",
            "/ws/metrics/",
        )
        assert await statuses(gateway.port, *tricks) <= {308, 404}
        assert await statuses(gateway.port, "/ws/health", "/ws/health/ready") == {200}

        assert await statuses(port, *OPERATORS, "/ws/health", "/ws/health/ready") == {200}
        assert await statuses(port, *PUBLIC, "/ws/waiter") == {404}
        async with dialled(port) as client:  # the first request is an upgrade
            await client.send(make_head())
            assert (await client.response())[0] == 404
        async with dialled(port) as client:  # the second request is an upgrade
            await client.send(b"GET /ws/health HTTP/1.1\r\nHost: a\r\n\r\n")
            assert (await client.response())[0] == 200
            await client.send(make_head())
            assert (await client.response())[0] == 404


async def test_without_the_setting_the_public_address_serves_them(redis_url: str) -> None:
    async with serving(redis_url, "direct") as gateway:
        assert await statuses(gateway.port, *OPERATORS) == {200}


async def test_invalid_requests_to_the_operations_address_end_no_process(redis_url: str) -> None:
    port = free_port()
    settings = make_settings(redis_url, ws_operations_bind=f"127.0.0.1:{port}")
    async with running(settings) as gateway:
        for data in (b"\0" * 100, b"GET / HTTP/1.1\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"):
            async with dialled(port) as client:
                await client.send(data)
        async with dialled(port) as client:
            await client.send(b"GET /ws/metrics HT")
        assert await statuses(port, "/ws/metrics") == {200}
        assert await statuses(gateway.port, "/ws/health") == {200}


async def test_address_in_use_stops_the_start_and_is_named(redis_url: str) -> None:
    (taken,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with taken:
        bind = f"127.0.0.1:{taken.socket.getsockname()[1]}"
        env = environment(redis_url, WS_OPERATIONS_BIND=bind)
        async with process("trio_gateway", "serve", "--bind", "127.0.0.1:0", env=env) as started:
            status, _, errors = await wait(started)
    assert status == 1
    assert f"can't listen on WS_OPERATIONS_BIND {bind}".encode() in errors
    assert b"Traceback" not in errors
