"""Plain HTTP on the same port, served by Hypercorn and Quart with our fixes."""

import pytest
import trio

from tests.support.gateways import make_settings, running


@pytest.mark.parametrize(
    "request_head",
    [
        b"GET /ws/health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
        b"GET /ws/health HTTP/1.0\r\n\r\n",
        b"GET /ws/metrics HTTP/1.0\r\nHost: localhost\r\n\r\n",
        b"GET /nowhere HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
    ],
)
async def test_connection_is_closed_after_the_response_if_requested(
    redis_url: str, request_head: bytes
) -> None:
    """A client that reads until the end (HTTP/1.0) would otherwise wait for ever."""
    async with running(make_settings(redis_url)) as gateway:
        async with await trio.open_tcp_stream("127.0.0.1", gateway.port) as stream:
            await stream.send_all(request_head)
            answer = b""
            with trio.fail_after(2):
                async for data in stream:
                    answer += data
        assert answer.startswith(b"HTTP/1.1 ")
        assert answer.partition(b"\r\n\r\n")[2]


async def test_requests_on_one_connection_are_answered_in_order(redis_url: str) -> None:
    async with running(make_settings(redis_url)) as gateway:
        async with await trio.open_tcp_stream("127.0.0.1", gateway.port) as stream:
            await stream.send_all(
                b"GET /ws/health HTTP/1.1\r\nHost: localhost\r\n\r\n"
                b"GET /ws/metrics HTTP/1.1\r\nHost: localhost\r\n\r\n"
                b"GET /ws/waiter HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
            )
            answer = b""
            with trio.fail_after(2):
                async for data in stream:
                    answer += data
        assert answer.count(b"HTTP/1.1 ") == 3
        assert answer.index(b'"by_endpoint"') < answer.index(b"wsgateway_connections_total")
        assert b"HTTP/1.1 426" in answer
