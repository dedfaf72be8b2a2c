"""Balancing connections: which of several workers accepts the next client."""

import os
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from itertools import pairwise
from socket import socket as stdlib_socket

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import MockClock

import trio_gateway.transports.accepting as accepting_module
from tests.support.gateways import until
from trio_gateway.transports.accepting import (
    AcceptBalancer,
    Load,
    WorkerLoads,
    _Listener,
    accept_delay,
)

LOADS = st.lists(st.builds(Load, st.integers(0, 50), st.integers(1, 50)), min_size=1, max_size=8)


@settings(max_examples=50)
@given(LOADS)
def test_free_worker_accepts_at_once_if_any_has_room(
    loads: list[Load],
) -> None:
    waits = [accept_delay(each, loads[:n] + loads[n + 1 :]) for n, each in enumerate(loads)]
    eager = [each for each, seconds in zip(loads, waits, strict=True) if not seconds]

    assert eager
    if not all(each.full for each in loads):
        assert not any(each.full for each in eager)


@settings(max_examples=50)
@given(st.integers(1, 8), st.integers(0, 500))
def test_worker_that_accepts_first_has_hardly_more_clients_than_the_others(
    workers: int, clients: int
) -> None:
    """The kernel may choose any worker without a delay: here it always chooses the first."""
    counts = [0] * workers
    for _ in range(clients):
        loads = [Load(count, 1000) for count in counts]
        (first, *_) = (
            n for n, each in enumerate(loads) if not accept_delay(each, loads[:n] + loads[n + 1 :])
        )
        counts[first] += 1
    assert max(counts) - min(counts) <= max(5, clients // 40)


@pytest.fixture
def loads() -> Iterator[WorkerLoads]:
    found = WorkerLoads.create(4)
    yield found
    os.close(found.descriptor)


def test_load_of_a_stuck_or_dead_worker_is_ignored(
    loads: WorkerLoads, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads.publish(0, Load(1, 10))
    loads.publish(2, Load(2, 10))
    assert WorkerLoads(loads.descriptor).others(1) == [Load(1, 10), Load(2, 10)]
    assert loads.others(0) == [Load(2, 10)]
    loads.clear(2)  # by the supervisor
    assert loads.others(1) == [Load(1, 10)]
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 2.1)
    assert loads.others(1) == []


async def test_load_is_published_often_only_while_it_changes(
    loads: WorkerLoads, monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    clients, published = 0.0, list[float]()

    def load() -> Load:
        published.append(trio.current_time())
        return Load(clients, 10)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(AcceptBalancer(loads, 0, load).keep_published)
        await trio.sleep(10)
        assert len(published) < 17
        at_most = max(after - before for before, after in pairwise(published))
        assert at_most < accepting_module._STALE_AFTER / 2
        published.clear()
        for _ in range(100):
            clients += 1
            await trio.sleep(0.1)
        assert len(published) > 80
        nursery.cancel_scope.cancel()


class Worker:
    """A worker whose clients are those that it has accepted on a socket."""

    def __init__(
        self, loads: WorkerLoads, slot: int, socket: trio.socket.SocketType, most: int
    ) -> None:
        self.clients: list[trio.SocketStream] = []
        self.most: int | None = most  # None: it is being replaced
        self.balancer = AcceptBalancer(loads, slot, self.load)
        self.listener = _Listener(self.balancer, trio.SocketListener, socket)

    def load(self) -> Load | None:
        return None if self.most is None else Load(len(self.clients), self.most)

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.balancer.keep_published)
            while True:
                self.clients.append(await self.listener.accept())


@asynccontextmanager
async def accepting(loads: WorkerLoads, *most: int) -> AsyncIterator[tuple[list[Worker], int]]:
    """Workers with these limits of clients, and their port."""
    listening = trio.socket.socket()
    await listening.bind(("127.0.0.1", 0))
    listening.listen(100)
    port = listening.getsockname()[1]
    workers: list[Worker] = []
    try:
        async with trio.open_nursery() as nursery:
            for slot, each in enumerate(most):
                socket = stdlib_socket(fileno=os.dup(listening.fileno()))
                worker = Worker(loads, slot, trio.socket.from_stdlib_socket(socket), each)
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


async def test_no_worker_is_full_before_all_are(loads: WorkerLoads) -> None:
    async with accepting(loads, 10, 20, 2) as (workers, port):
        clients = await connect(port, 32)
        await until(lambda: [len(each.clients) for each in workers] == [10, 20, 2])
        clients += await connect(port, 3)  # some worker must refuse these
        await until(lambda: sum(len(each.clients) for each in workers) == 35)
        for client in clients:
            await client.aclose()


async def test_worker_that_is_being_replaced_leaves_all_clients_to_the_others(
    loads: WorkerLoads,
) -> None:
    async with accepting(loads, 100, 100) as (workers, port):
        workers[0].most = None
        clients = await connect(port, 20)
        await until(lambda: len(workers[1].clients) == 20)
        workers[1].most = None  # all are being replaced, and every client must be answered
        clients += await connect(port, 5)
        await until(lambda: sum(len(each.clients) for each in workers) == 25)
        for client in clients:
            await client.aclose()


async def test_client_that_no_other_worker_accepts_is_accepted_after_the_delay(
    loads: WorkerLoads, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accepting_module, "_DELAY_IF_FULL", 0.1)
    async with accepting(loads, 1) as (workers, port):
        loads.publish(1, Load(0, 100))  # it has room, and does not accept
        clients = await connect(port, 2)
        await until(lambda: len(workers[0].clients) == 2)
        for client in clients:
            await client.aclose()
