"""The gateway: the Quart-Trio app, its lifespan, and the tasks that run while it serves."""

import asyncio
import multiprocessing
import resource
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import partial
from typing import Any, Final

import sniffio
import structlog
import trio
from hypercorn.utils import LifespanFailureError
from quart_trio import QuartTrio
from quart_trio.asgi import TrioASGILifespan

from . import stats
from .access.auth import Auth
from .core.audiences import Endpoint
from .core.exception_groups import first_leaf
from .parts import build_parts
from .reception import Reception
from .runtime.reaper import reap
from .runtime.supervision import keep_running
from .settings import Settings
from .stats_feed import StatsFeed
from .telemetry import output
from .transports.listener import Listener
from .transports.tcp import TcpService
from .web import operations, routes
from .web.http_connection import HttpConnection

__all__ = ["Gateway", "create_app"]

log = structlog.get_logger()

_OPEN_MAX: Final = 10_240  # open files of a process on macOS


class _Lifespan(TrioASGILifespan):
    """The app's lifespan, with the gateway's tasks inside. A bug in one of them ends the process.

    Hypercorn logs other exceptions of a lifespan and continues; LifespanFailureError stops it.
    """

    app: "Gateway"

    async def __call__(self, receive: Any, send: Any) -> None:
        messages = [await receive()]  # from now on Hypercorn waits for us, and sees our errors

        async def receive_again() -> Any:
            return messages.pop() if messages else await receive()

        try:
            async with self.app.serving():
                await super().__call__(receive_again, send)
        except* operations.CannotListen as errors:
            with suppress(Exception):
                log.critical(str(first_leaf(errors)))
            raise LifespanFailureError("serving", "can't listen") from None
        except* Exception as bugs:
            with suppress(Exception):  # an embedding program's log may raise
                log.critical("stopped by a bug", exc_info=bugs)
            raise LifespanFailureError("serving", "stopped by a bug") from None


class Gateway(QuartTrio):
    """An ASGI app that delivers each event from Redis to exactly the clients that may receive it.

    ``auth`` replaces authentication per endpoint; ``clock`` returns unix time. Raises
    :exc:`InvalidSettings` if ``DATABASE_URL`` cannot be used.
    """

    asgi_lifespan_class = _Lifespan

    def __init__(
        self,
        settings: Settings,
        *,
        auth: Mapping[Endpoint, Auth] | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        super().__init__(__name__, static_folder=None, template_folder=None)
        self.settings = settings
        self.parts = parts = build_parts(settings, auth=auth, clock=clock)
        self._stats_feed = StatsFeed(parts)
        reception = Reception(parts, self._stats_feed)
        self._server_stops = _ServerStops(parts.drain.run)
        self.tcp_service = TcpService(
            accept_timeout=settings.ws_accept_timeout,
            write_timeout=settings.ws_write_timeout,
            max_message_size=settings.ws_max_message_size,
            compresses=settings.ws_compression,
            counts=parts.counts,
            addresses=parts.addresses,
            silent=parts.silent,
            heads=parts.heads,
            is_draining=lambda: parts.draining,
            serve_connection=reception.serve_connection,
            watch=self._watch,
        )
        self.asgi_http_class = partial(HttpConnection, parts, reception)  # type: ignore[assignment]  # called only
        routes.add_routes(self, parts, reception)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if sniffio.current_async_library() != "trio":
            print(  # noqa: T201 - for a person at a terminal
                'trio-gateway runs on Trio only: use hypercorn -k trio (worker_class = "trio")',
                file=sys.stderr,
            )
            # Exit from the loop, not from this task: asyncio would print its traceback.
            asyncio.get_running_loop().call_soon(sys.exit, 2)
            await asyncio.get_running_loop().create_future()
        await super().__call__(scope, receive, send)

    @property
    def ready(self) -> bool:
        """Whether a load balancer should send clients here."""
        return self.parts.ready

    async def drain(self) -> None:
        """Stop the sources, deliver what is queued and close every client with a retry hint.

        Readiness is off from the first moment. Cancelled, it drops everything that is left.
        """
        await self.parts.drain.run()

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        """Run the gateway's tasks. Leaving the block drains, and closes every connection.

        Raises the exception of a task that failed: that is a bug, and ends the process.
        """
        settings, parts = self.settings, self.parts
        _raise_fd_limit()
        async with AsyncExitStack() as stack:
            if parts.sector_assignments is not None:
                stack.callback(parts.sector_assignments.close)
            if settings.ws_tracing:
                from .telemetry.tracing import open_tracing  # an extra; imported only if it is on

                parts.batches.observe = await stack.enter_async_context(
                    open_tracing(settings.routes)
                )
            stack.enter_context(parts.loop_lag.watched())
            operators: list[Listener] = []
            if settings.ws_operations_bind is not None:
                operators = operations.open_listeners(
                    settings.ws_operations_bind, settings.ws_write_timeout
                )
            async with trio.open_nursery() as nursery:
                if operators:
                    nursery.start_soon(operations.serve, self, operators)
                self._start_tasks(nursery)
                try:
                    yield
                finally:
                    failed = nursery.cancel_scope.cancel_called
                    with trio.CancelScope(shield=True):  # bounded inside
                        await self.parts.drain.run(after_bug=failed)
                    nursery.cancel_scope.cancel()

    def _start_tasks(self, nursery: trio.Nursery) -> None:
        settings, parts = self.settings, self.parts
        nursery.start_soon(parts.commands.run)
        for queue in (parts.pubsub_queue, parts.stream_queue):
            nursery.start_soon(parts.batches.run, queue, settings.redis_event_batch_size)
        if parts.dead_letters is not None:
            nursery.start_soon(parts.dead_letters.run)
        nursery.start_soon(parts.readiness.run)
        nursery.start_soon(parts.replays.decide)
        nursery.start_soon(parts.replays.feeding.keep_ahead)
        if parts.receipts.events.tracks:
            nursery.start_soon(parts.receipt_writing.run, parts.receipt_store.write)
        if parts.reach.watches:
            nursery.start_soon(parts.reach.run, parts.steps.take, parts.steps.answers)
        if parts.shard_claims is not None:
            nursery.start_soon(parts.shard_claims.run)
        if parts.claim_link is not None:
            nursery.start_soon(parts.claim_link.run)
        nursery.start_soon(self._stats_feed.run)
        if parts.sector_assignments is not None:
            nursery.start_soon(parts.sector_assignments.retry_pending)
            nursery.start_soon(parts.sector_assignments.follow_clock)
        nursery.start_soon(parts.placement.run)
        if parts.checks is not None:
            nursery.start_soon(parts.checks.run)
        nursery.start_soon(parts.revocations.answer_checks)
        nursery.start_soon(parts.revocations.sweep, settings.jwt_revalidation_interval)
        nursery.start_soon(parts.deadlines.run)
        nursery.start_soon(self._reap)
        nursery.start_soon(self._trim_history)
        nursery.start_soon(self._server_stops.run)
        if multiprocessing.parent_process() is not None:
            nursery.start_soon(self._delay_sigterm)
        nursery.start_soon(parts.watch_topology)
        if parts.cluster is not None:
            parts.cluster.start(nursery)
        if parts.api is not None:
            nursery.start_soon(parts.api.keys.run)
            nursery.start_soon(parts.api.publishing.run)
        nursery.start_soon(self._run_sources)
        nursery.start_soon(parts.following.run)
        nursery.start_soon(parts.worker_stats.share, partial(stats.snapshot, parts))

    async def _run_sources(self) -> None:
        parts = self.parts
        with parts.sources:
            async with trio.open_nursery() as nursery:
                read = partial(parts.streams.run, parts.inlet)
                changed = None if parts.topology.is_fixed else parts.topology.wait_changed
                for sharded in parts.sharded_pubsubs:
                    nursery.start_soon(
                        keep_running, sharded.name, sharded.run, sharded.breaker, None, changed
                    )
                for name, run in (("pubsub", parts.pubsub.run), ("stream", read)):
                    nursery.start_soon(keep_running, name, run, parts.breakers[name], None, changed)

    async def _reap(self) -> None:
        await reap(
            self.parts.hub,
            ping_interval=self.settings.ws_ping_interval,
            cleanup_interval=self.settings.ws_cleanup_interval,
            wall_clock=self.parts.clock,
        )

    async def _trim_history(self) -> None:
        while True:  # events also become too old when no new event comes
            await trio.sleep(self.settings.ws_cleanup_interval)
            self.parts.history.trim(trio.current_time())
            self.parts.older_events.trim(trio.current_time())

    def _watch(self, terminated: Callable[[], Awaitable[None]], patience: float) -> None:
        if self._server_stops.watch(terminated):
            self.parts.drain.patience = patience

    async def _delay_sigterm(self) -> None:
        """Delay a SIGTERM until every client has received its close frame.

        Hypercorn's master terminates the other workers as soon as the first one has ended, even if
        they are still closing their connections.
        """
        with trio.open_signal_receiver(signal.SIGTERM) as signals:
            await anext(signals)
            await self.drain()
            while self._server_stops.stopping:  # the process then ends by itself
                await anext(signals)
        output.flush()
        signal.raise_signal(signal.SIGTERM)


class _ServerStops:
    """Drains when Hypercorn begins to stop, because Hypercorn does not close the clients itself.

    The first TCP connection passes the event to wait for.
    """

    def __init__(self, drain: Callable[[], Awaitable[None]]) -> None:
        self._drain = drain
        self._send, self._receive = trio.open_memory_channel[Callable[[], Awaitable[None]]](1)
        self._watched = False
        self.stopping = False

    def watch(self, terminated: Callable[[], Awaitable[None]]) -> bool:
        """Wait for ``terminated`` from now on; return False if another one was passed before."""
        if self._watched:
            return False
        self._watched = True
        self._send.send_nowait(terminated)
        return True

    async def run(self) -> None:
        terminated = await self._receive.receive()
        await terminated()
        self.stopping = True
        await self._drain()


def create_app(
    settings: Settings,
    *,
    auth: Mapping[Endpoint, Auth] | None = None,
    clock: Callable[[], float] = time.time,
) -> Gateway:
    """Make a gateway, an ASGI app for Hypercorn's Trio worker. Reads no environment.

    Arguments:
        settings: the settings of this gateway.
        auth: replaces authentication by tokens, per endpoint; for tests, see
            :class:`trio_gateway.testing.NullAuth`.
        clock: returns unix time in seconds; for tests.

    Raises :exc:`trio_gateway.settings.InvalidSettings` if ``DATABASE_URL`` can't be used.
    """
    return Gateway(settings, auth=auth, clock=clock)


def _raise_fd_limit() -> None:
    """Raise the soft limit of open files, usually 1024, as far as the system allows.

    Each client needs a file descriptor.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == hard:
        return
    refused: Exception | None = None
    # macOS reports no hard limit, but refuses more than OPEN_MAX.
    for wanted in (hard, max(soft, _OPEN_MAX)):
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        except (OSError, ValueError) as error:
            refused = error
        else:
            return
    log.warning("limit of open files not raised", limit=soft, error=str(refused))
