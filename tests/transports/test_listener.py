"""The listener: it accepts a crowd in few steps, and its connections inherit options."""

import socket
from collections.abc import AsyncIterator

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from trio_gateway.transports.listener import Listener

WRITE_TIMEOUT = 40.0
OPTIONS = [
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 30),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
    (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 60_000),
    (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
]


@pytest.fixture
async def listener() -> AsyncIterator[Listener]:
    sock = trio.socket.socket()
    await sock.bind(("127.0.0.1", 0))
    sock.listen(100)
    made = Listener(sock, WRITE_TIMEOUT)
    yield made
    await made.aclose()


async def dial(listener: Listener) -> trio.SocketStream:
    host, port = listener.socket.getsockname()
    return await trio.open_tcp_stream(host, port)


async def test_connections_have_the_options_of_the_listening_socket(listener: Listener) -> None:
    async with await dial(listener), await listener.accept() as accepted:
        for level, name, value in OPTIONS:
            assert accepted.getsockopt(level, name) == value


async def test_crowd_is_accepted_whole_and_in_order_and_others_run_meanwhile(
    listener: Listener, nursery: trio.Nursery
) -> None:
    turns = 0

    async def take_turns() -> None:
        nonlocal turns
        while True:
            await trio.lowlevel.checkpoint()
            turns += 1

    clients = [await dial(listener) for _ in range(50)]
    nursery.start_soon(take_turns)
    await trio.lowlevel.checkpoint()
    before = turns
    accepted = [await listener.accept() for _ in clients]
    assert [each.socket.getpeername() for each in accepted] == [
        each.socket.getsockname() for each in clients
    ]
    assert turns > before + 3
    for stream in [*clients, *accepted]:
        await stream.aclose()


async def test_it_waits_for_a_client_that_comes_later(
    listener: Listener, nursery: trio.Nursery
) -> None:
    async def come() -> None:
        await wait_all_tasks_blocked(0.01)
        async with await dial(listener) as client:
            await client.send_all(b"late")

    nursery.start_soon(come)
    async with await listener.accept() as accepted:
        assert await accepted.receive_some(10) == b"late"


async def test_it_listens_no_more_once_it_is_closed(
    listener: Listener, nursery: trio.Nursery
) -> None:
    async def wait() -> None:
        with pytest.raises(trio.ClosedResourceError):
            await listener.accept()

    nursery.start_soon(wait)
    await wait_all_tasks_blocked(0.01)
    name = listener.socket.getsockname()
    await listener.aclose()

    with pytest.raises(trio.ClosedResourceError):
        await listener.accept()
    with pytest.raises(OSError, match="connect to"):
        await trio.open_tcp_stream(*name)
