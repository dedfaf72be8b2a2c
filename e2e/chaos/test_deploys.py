"""Shutdown: which hints a drain sends, and that it ends in time."""

import signal

import pytest
import trio
from hypercorn.config import Config
from trio.testing import MockClock

from tests.support.gateways import make_settings, running
from trio_gateway.core.close_codes import Close
from trio_gateway.gateway import create_app
from trio_gateway.runtime.connection import Connection, ConnectionLimits
from trio_gateway.serve import shutdown_signals
from trio_gateway.testing import FakeSocket, make_principal

NO_REDIS = "redis://127.0.0.1:1"


@pytest.mark.parametrize(("clients", "window"), [(100, 2.0), (3000, 6.0)])
async def test_retry_hints_are_spread_evenly_over_a_window_that_grows_with_the_clients(
    autojump_clock: MockClock, clients: int, window: float
) -> None:
    app = create_app(make_settings(NO_REDIS))
    sockets_of = {
        Connection(make_principal(), ConnectionLimits()): FakeSocket() for _ in range(clients)
    }
    async with trio.open_nursery() as nursery:
        for connection, socket in sockets_of.items():
            nursery.start_soon(connection.run, socket, app.parts.hub)
        await trio.testing.wait_all_tasks_blocked()
        await app.drain()

    sockets = [sockets_of[each] for each in sorted(sockets_of, key=lambda each: each.number)]
    assert {socket.closed for socket in sockets} == {Close.GOING_AWAY}
    hints = [float(s.reason.removeprefix("retry in ").removesuffix("s")) for s in sockets]
    for place, hint in enumerate(sorted(hints)):  # one of them in each slice of the window
        assert abs(hint - window * (place + 0.5) / clients) <= window / clients / 2 + 0.0501
    # Clients that came first do not get the shortest hints.
    halves = sum(hints[: clients // 2]), sum(hints[clients // 2 :])
    assert abs(halves[0] - halves[1]) / sum(hints) < 4 / clients**0.5


async def test_cancelled_drain_aborts_all_connections_at_once(
    autojump_clock: MockClock,
) -> None:
    app = create_app(make_settings(NO_REDIS))
    stuck = FakeSocket(room=0)
    connection = Connection(make_principal(), ConnectionLimits())
    started = trio.current_time()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(connection.run, stuck, app.parts.hub)
        await trio.testing.wait_all_tasks_blocked()
        connection.send(b"{}")
        with trio.move_on_after(0.1):
            await app.drain()
        with trio.fail_after(1):
            await app.drain()  # a second drain does not wait for ever

    assert stuck.aborted
    assert trio.current_time() - started == pytest.approx(0.1)


@pytest.mark.parametrize("patience", [1.0, 5.0, 20.0])
async def test_drain_takes_no_longer_than_the_server_waits(
    autojump_clock: MockClock, patience: float
) -> None:
    class Endless(FakeSocket):
        async def close(self, code: int, reason: str) -> None:
            while not self.aborted:
                await trio.sleep(0.01)

    app = create_app(make_settings(NO_REDIS))
    app.parts.drain.patience = patience
    app.parts.pubsub_queue.undelivered = 1  # of an event that never gets through
    started = trio.current_time()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(
            Connection(make_principal(), ConnectionLimits()).run, Endless(), app.parts.hub
        )
        await trio.testing.wait_all_tasks_blocked()
        await app.drain()

    assert trio.current_time() - started == pytest.approx(patience, abs=0.02)


async def test_http_clients_that_do_not_read_delay_the_end_only_as_long_as_the_server_waits() -> (
    None
):
    config = Config()
    config.graceful_timeout = 0.3
    settings = make_settings(NO_REDIS)
    async with running(settings, wait_ready=False, config=config) as gateway:
        stream = await trio.open_tcp_stream("127.0.0.1", gateway.port)
        with trio.move_on_after(0.3):
            while True:
                await stream.send_all(b"GET /ws/metrics HTTP/1.1\r\nHost: a\r\n\r\n" * 100)
        started = trio.current_time()
    assert trio.current_time() - started < settings.ws_write_timeout / 3
    await stream.aclose()


def test_sighup_ends_one_process_but_not_under_nohup() -> None:
    before = signal.getsignal(signal.SIGHUP)
    try:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        assert signal.SIGHUP in shutdown_signals()
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        assert signal.SIGHUP not in shutdown_signals()
    finally:
        signal.signal(signal.SIGHUP, before)
