"""Which of several workers takes the next client."""

import os
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from socket import socket as stdlib_socket

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

import trio_gateway.transports.accepting as accepting_module
from tests.support.gateways import until
from trio_gateway.transports.accepting import Board, Load, Turns, _Listener, patience

LOADS = st.lists(st.builds(Load, st.integers(0, 50), st.integers(1, 50)), min_size=1, max_size=8)


@settings(max_examples=50)
@given(LOADS)
def test_some_worker_takes_the_next_client_at_once_and_has_room_if_any_has(
    loads: list[Load],
) -> None:
    waits = [patience(each, loads[:n] + loads[n + 1 :]) for n, each in enumerate(loads)]
    eager = [each for each, seconds in zip(loads, waits, strict=True) if not seconds]

    assert eager
    if not all(each.full for each in loads):
        assert not any(each.full for each in eager)


@settings(max_examples=50)
@given(st.integers(1, 8), st.integers(0, 500))
def test_who_always_lets_others_go_first_has_hardly_more_than_they(
    workers: int, clients: int
) -> None:
    """However the kernel chooses among those that do not wait: here always the first."""
    counts = [0] * workers
    for _ in range(clients):
        loads = [Load(count, 1000) for count in counts]
        (first, *_) = (
            n for n, each in enumerate(loads) if not patience(each, loads[:n] + loads[n + 1 :])
        )
        counts[first] += 1
    assert max(counts) - min(counts) <= max(5, clients // 40)


@pytest.fixture
def board() -> Iterator[Board]:
    found = Board.create(4)
    yield found
    os.close(found.descriptor)


def test_what_a_stuck_or_dead_worker_posted_is_not_believed(
    board: Board, monkeypatch: pytest.MonkeyPatch
) -> None:
    board.post(0, Load(1, 10))
    board.post(2, Load(2, 10))
    assert Board(board.descriptor).others(1) == [Load(1, 10), Load(2, 10)]
    assert board.others(0) == [Load(2, 10)]
    board.clear(2)  # by the supervisor
    assert board.others(1) == [Load(1, 10)]
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 1.1)
    assert board.others(1) == []


class Worker:
    """One that accepts on a socket, and has as many clients as it has accepted."""

    def __init__(self, board: Board, place: int, socket: trio.socket.SocketType, most: int) -> None:
        self.clients: list[trio.SocketStream] = []
        self.most: int | None = most  # None: it is being replaced
        self.turns = Turns(board, place, self.load)
        self.listener = _Listener(self.turns, socket)

    def load(self) -> Load | None:
        return None if self.most is None else Load(len(self.clients), self.most)

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.turns.keep_posted)
            while True:
                self.clients.append(await self.listener.accept())


@asynccontextmanager
async def accepting(board: Board, *most: int) -> AsyncIterator[tuple[list[Worker], int]]:
    """Workers that may have so many clients, and their one port."""
    listening = trio.socket.socket()
    await listening.bind(("127.0.0.1", 0))
    listening.listen(100)
    port = listening.getsockname()[1]
    workers: list[Worker] = []
    try:
        async with trio.open_nursery() as nursery:
            for place, each in enumerate(most):
                socket = stdlib_socket(fileno=os.dup(listening.fileno()))
                worker = Worker(board, place, trio.socket.from_stdlib_socket(socket), each)
                workers.append(worker)
                nursery.start_soon(worker.run)
            yield workers, port
            nursery.cancel_scope.cancel()
    finally:
        listening.close()
        for worker in workers:
            await worker.listener.aclose()
            for client in worker.clients:
                await trio.aclose_forcefully(client)


async def connect(port: int, count: int) -> list[trio.SocketStream]:
    return [await trio.open_tcp_stream("127.0.0.1", port) for _ in range(count)]


async def test_no_worker_is_full_before_all_are(board: Board) -> None:
    async with accepting(board, 10, 20, 2) as (workers, port):
        clients = await connect(port, 32)
        await until(lambda: [len(each.clients) for each in workers] == [10, 20, 2])
        clients += await connect(port, 3)  # somebody must refuse these
        await until(lambda: sum(len(each.clients) for each in workers) == 35)
        for client in clients:
            await client.aclose()


async def test_one_that_is_being_replaced_leaves_all_to_its_siblings(board: Board) -> None:
    async with accepting(board, 100, 100) as (workers, port):
        workers[0].most = None
        clients = await connect(port, 20)
        await until(lambda: len(workers[1].clients) == 20)
        workers[1].most = None  # all of them are, and all must be answered
        clients += await connect(port, 5)
        await until(lambda: sum(len(each.clients) for each in workers) == 25)
        for client in clients:
            await client.aclose()


async def test_a_client_that_no_sibling_takes_does_not_wait_for_ever(
    board: Board, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accepting_module, "_PATIENCE", 0.1)
    async with accepting(board, 1) as (workers, port):
        board.post(1, Load(0, 100))  # it has room, and accepts nobody
        clients = await connect(port, 2)
        await until(lambda: len(workers[0].clients) == 2)
        for client in clients:
            await client.aclose()
