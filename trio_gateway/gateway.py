"""The gateway: the Quart-Trio app that runs every connection, and the sources, in nurseries."""

import asyncio
import math
import multiprocessing
import os
import resource
import signal
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import sniffio
import structlog
import trio
from hypercorn.utils import LifespanFailureError
from quart_trio import QuartTrio
from quart_trio.asgi import TrioASGILifespan

from .access.addresses import Addresses
from .access.admission import Admission, Candidate
from .access.auth import Auth
from .access.revocations import Revocations, Tickets
from .broker.commands import Commands, open_commands
from .broker.dead_letters import DeadLetter, DeadLetters
from .broker.pubsub import Listener, PubSub
from .broker.readiness import Readiness
from .broker.streams import Streams
from .core.audiences import Endpoint, Principal, SectorId
from .core.close_codes import Close, Rejected
from .core.control_messages import REVOKED
from .core.limits import DropAlarm, LogLimit, TenantRate
from .core.messages import (
    GAP,
    Command,
    Message,
    Reauthenticate,
    auth_ok,
    intervals,
    sectors_updated,
)
from .core.resilience import Breaker
from .redis_url import Address
from .runtime.concurrency_limiter import ConcurrencyLimiter, Overloaded
from .runtime.connection import Connection, ConnectionLimits, Socket
from .runtime.dispatch import Dispatch
from .runtime.drain import Drain
from .runtime.history import History
from .runtime.hub import CapacityLimits, Hub
from .runtime.ingest import Ingest
from .runtime.queue import EventQueue
from .runtime.reaper import reap
from .runtime.resume import Replays
from .runtime.room import Room
from .runtime.silent_connections import SilentConnections
from .runtime.supervision import keep_running, leaves
from .settings import Settings
from .telemetry import output
from .telemetry import stats as figures
from .telemetry.loop_lag import LoopLag
from .telemetry.prometheus import GROUP, SHARED_EVERY, Snapshot, WorkerSnapshots
from .transports import sse
from .transports import tcp as line
from .transports.accepting import Load
from .transports.handshake import Handshake
from .web import operations
from .web import routes as web
from .web.catchup import Turns
from .web.console import Feed

if TYPE_CHECKING:
    from .access.sectors import SectorAssignments

log = structlog.get_logger()

_OPEN_MAX: Final = 10_240  # open files of a process on macOS


class _Lifespan(TrioASGILifespan):
    """The app's life: what the gateway runs is nested in it, and a bug in that ends it.

    Hypercorn logs what its lifespan raises and goes on serving, except for this one error.
    """

    app: "Gateway"

    async def __call__(self, receive: Any, send: Any) -> None:
        try:
            async with self.app.serving():
                await super().__call__(receive, send)
        except* operations.CannotListen as errors:
            with suppress(Exception):
                log.critical(str(leaves(errors)[0]))
            raise LifespanFailureError("serving", "can't listen") from None
        except* Exception as bugs:
            with suppress(Exception):  # whatever the log of who embeds us does, this has to end
                log.critical("stopped by a bug", exc_info=bugs)
            raise LifespanFailureError("serving", "stopped by a bug") from None


class Gateway(QuartTrio):
    """Hands each event that Redis brings to exactly the clients that may hear it.

    ``auth`` replaces the way to authenticate per endpoint; ``clock`` is unix time.
    """

    asgi_http_class = sse.HttpConnection
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
        self.hub = Hub(
            CapacityLimits(
                total=settings.ws_max_total_connections,
                per_user=settings.ws_max_connections_per_user,
                per_session=settings.ws_max_connections_per_session,
            )
        )
        self.ingest = Ingest()
        self.heard = EventQueue(  # from Pub/Sub
            settings.redis_event_queue_size,
            DropAlarm(
                settings.ws_drop_alarm_window,
                settings.ws_drop_alarm_threshold,
                settings.ws_drop_alarm_cooldown,
            ),
            TenantRate(settings.ws_tenant_event_rate) if settings.ws_tenant_event_rate else None,
        )
        self.read = EventQueue(settings.redis_event_queue_size)  # from streams
        self.history = History(
            events=settings.ws_history_events,
            size=settings.ws_history_bytes,
            age=settings.ws_history_age,
        )
        self.replays = Replays(self.history, self.hub)
        self.dispatch = Dispatch(
            self.hub,
            settings.routes,
            history=self.history,
            uncovered_to_branch=settings.ws_uncovered_sector == "branch",
            writes_per_checkpoint=settings.ws_broadcast_batch_size,
            timeout=settings.ws_callback_timeout,
        )
        self.breakers = {
            name: Breaker(settings.circuit_failure_threshold, settings.circuit_recovery_timeout)
            for name in ("pubsub", "stream", "commands", "writes", "database")
        }
        self.sector_assignments: SectorAssignments | None = None
        if settings.database_url is not None:
            from .access.sectors import (
                make_sector_assignments,  # SQLAlchemy is a third of the start
            )

            self.sector_assignments = make_sector_assignments(
                settings, self.hub, self.breakers["database"], clock
            )
        self.addresses = Addresses(
            connections=settings.ws_max_connections_per_address,
            failures=settings.ws_max_failed_logins,
            hops=settings.ws_proxy_hops,
        )
        self.admission = Admission(
            settings, auth=auth, sector_assignments=self.sector_assignments, clock=clock
        )
        self.pubsub: PubSub | None = None
        self.streams: Streams | None = None
        self.commands: Commands | None = None
        self.readiness: Readiness | None = None
        self.dead_letters: DeadLetters | None = None
        self.siblings: WorkerSnapshots | None = None
        self.partial = os.environ.get(GROUP) == ""  # the siblings' figures are missing from ours
        self.rejected: Counter[str] = Counter()  # by reason
        self.refused: Counter[int] = Counter()  # upgrades, by HTTP status
        self.log_limit = LogLimit()
        self.heads: ConcurrencyLimiter[line.Shaken] = ConcurrencyLimiter(settings.ws_max_handshakes)
        self.silent = SilentConnections(settings.ws_max_handshakes)
        self.admissions: ConcurrencyLimiter[Candidate] = ConcurrencyLimiter(
            settings.ws_max_handshakes
        )
        self.arriving = 0  # clients between the two
        self.accept_timeout = settings.ws_accept_timeout
        self.write_timeout = settings.ws_write_timeout
        self.room = Room(self.hub, lambda: self.draining)
        self.catch_ups = Turns()
        self.end = Drain(self.hub, (self.heard, self.read), self._stop_hearing)
        self.max_message_size = settings.ws_max_message_size
        self.compresses = settings.ws_compression
        self.loop_lag = LoopLag()
        self.feed = Feed(self)  # to the console
        self._clock = clock
        self._limits = ConnectionLimits(
            stale_after=settings.ws_heartbeat_timeout,
            receive_timeout=settings.ws_receive_timeout,
            write_timeout=settings.ws_write_timeout,
            rate_limit=settings.ws_message_rate_limit,
            rate_window=settings.ws_message_rate_window,
            outbox_bytes=settings.ws_outbox_bytes,
            outbox_messages=settings.ws_outbox_messages,
        )
        self._intervals = intervals(
            heartbeat_timeout=settings.ws_heartbeat_timeout,
            receive_timeout=settings.ws_receive_timeout,
            ping_interval=settings.ws_ping_interval,
        )
        # Who can't speak is not held to it: the dead are found by what is written to them.
        self._one_way_terms = replace(self._limits, stale_after=math.inf, receive_timeout=math.inf)
        self._nursery: trio.Nursery | None = None
        self._sources = trio.CancelScope()
        self._watched = False
        self._told_to_stop = False
        self.config["RESPONSE_TIMEOUT"] = None  # a response has as long as it is being taken
        web.add_routes(self)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if sniffio.current_async_library() != "trio":
            print(  # noqa: T201 - to a person at a terminal
                'trio-gateway runs on Trio only: use hypercorn -k trio (worker_class = "trio")',
                file=sys.stderr,
            )
            # Raised by the loop itself and not in this task, of which asyncio would print a trace.
            asyncio.get_running_loop().call_soon(sys.exit, 2)
            await asyncio.get_running_loop().create_future()
        await super().__call__(scope, receive, send)

    # Running

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        """Run the sources and all that delivers; leaving drains and closes every connection.

        Raises whatever a background task raised: that is a bug, and ends the process.
        """
        settings = self.settings
        _raise_fd_limit()
        async with AsyncExitStack() as stack:
            self.commands = await stack.enter_async_context(
                open_commands(
                    settings.redis_url,
                    self.breakers["commands"],
                    self.breakers["writes"],
                    max_connections=settings.redis_pool_max_connections,
                )
            )
            self.readiness = Readiness(self.commands.check)
            revocations = Revocations(self.commands, self.hub)
            self.admission.tickets = Tickets(self.commands)
            self.admission.revocations = revocations
            listeners: dict[str, Listener] = {REVOKED: revocations}
            if self.sector_assignments is not None:
                listeners[self.sector_assignments.channel] = self.sector_assignments
                stack.callback(self.sector_assignments.close)
            if settings.ws_tracing:
                from .telemetry.tracing import open_tracing  # an extra, and nothing while it is off

                self.dispatch.observe = await stack.enter_async_context(
                    open_tracing(settings.routes)
                )
            address = Address.from_url(settings.redis_url)
            self.pubsub = PubSub(
                address, settings.redis_channel_patterns, self.ingest, self.heard,
                self.breakers["pubsub"], listeners,
            )  # fmt: skip
            self.streams = Streams(
                address,
                settings.redis_streams,
                self.ingest,
                self.read,
                self.breakers["stream"],
                routes=settings.routes,
                dispatch=self.dispatch,
                history=self.history,
                on_begin=self.replays.begin,
                on_gap=self._tell_of_gap,
                on_demoted=self._look_again,
                wall_clock=self._clock,
            )
            stack.enter_context(self.loop_lag.watched())
            for_operators = self._listen_for_operators()
            async with trio.open_nursery() as nursery:
                if for_operators:
                    nursery.start_soon(operations.serve, self, for_operators)
                self._nursery = nursery
                self._start(nursery, revocations, self.pubsub, self.streams)
                try:
                    yield
                finally:
                    with trio.CancelScope(shield=True):  # bounded inside
                        await self.drain()
                    self._nursery = None
                    nursery.cancel_scope.cancel()

    def _listen_for_operators(self) -> list[trio.SocketListener]:
        if (bind := self.settings.ws_operations_bind) is None:
            return []
        return operations.open_listeners(bind)

    def _start(
        self, nursery: trio.Nursery, revocations: Revocations, pubsub: PubSub, streams: Streams
    ) -> None:
        settings = self.settings
        nursery.start_soon(self.dispatch.run, self.heard, settings.redis_event_batch_size)
        nursery.start_soon(self.dispatch.run, self.read, settings.redis_event_batch_size)
        if (dlq := settings.redis_dlq_stream) is not None and self.commands is not None:
            self.dead_letters = dead_letters = DeadLetters(self.commands, dlq)
            self.ingest.put_aside = lambda *entry: dead_letters.offer(DeadLetter(*entry))
            nursery.start_soon(dead_letters.run)
        if self.readiness is not None:
            nursery.start_soon(self.readiness.run)
        nursery.start_soon(self.replays.decide)
        nursery.start_soon(self.feed.run)
        if self.sector_assignments is not None:
            nursery.start_soon(self.sector_assignments.retry_pending)
            nursery.start_soon(self.sector_assignments.follow_clock)
        nursery.start_soon(revocations.answer_checks)
        nursery.start_soon(revocations.sweep, settings.jwt_revalidation_interval)

        async def reaping() -> None:
            await reap(
                self.hub,
                ping_interval=settings.ws_ping_interval,
                cleanup_interval=settings.ws_cleanup_interval,
                wall_clock=self._clock,
            )

        async def sources() -> None:
            with self._sources:
                async with trio.open_nursery() as sources:
                    sources.start_soon(keep_running, "pubsub", pubsub.run, self.breakers["pubsub"])
                    sources.start_soon(keep_running, "stream", streams.run, self.breakers["stream"])

        async def forgetting() -> None:
            while True:  # what has become too old while no event came
                await trio.sleep(settings.ws_cleanup_interval)
                self.trim_history()

        nursery.start_soon(reaping)
        nursery.start_soon(forgetting)
        if multiprocessing.parent_process() is not None:
            nursery.start_soon(self._outlive_siblings)
        nursery.start_soon(sources)
        try:
            self.siblings = WorkerSnapshots.of_this_process()
        except OSError as error:
            self.partial = True
            log.warning("figures not shared", error=error.strerror)
        if self.siblings is not None:
            nursery.start_soon(self._share, self.siblings)

    async def _share(self, siblings: WorkerSnapshots) -> None:
        siblings.clean_up()
        try:
            while True:
                self._tell_siblings(siblings, self.sample())
                await trio.sleep(SHARED_EVERY)
        finally:
            siblings.leave(self.sample())

    def _tell_siblings(self, siblings: WorkerSnapshots, sample: Snapshot) -> None:
        """A full disk, say, is no reason to end: then each worker has its own figures only."""
        try:
            siblings.write(sample)
        except OSError as error:
            if not self.partial:
                log.error("figures not shared", error=error.strerror)
            self.partial = True
        else:
            self.partial = False

    @property
    def handshakes(self) -> int:
        """How many are in progress."""
        return len(self.silent) + self._arriving

    @property
    def _arriving(self) -> int:
        """Those that have said something."""
        return self.heads.inside + self.arriving + self.admissions.inside

    def load(self) -> Load | None:
        """How many clients it has, and may have; None if it takes no more because it ends."""
        if self.draining:
            return None
        return Load(self.hub.taken + self._arriving, self.settings.ws_max_total_connections)

    def _look_again(self) -> None:
        """The Redis that our links lead to is no primary any more."""
        if self.pubsub is not None and self.commands is not None:
            self.pubsub.look_again()
            self.commands.look_again()

    def _tell_of_gap(self) -> None:
        """Events were lost between Redis and us: everybody has to refetch."""
        for connection in self.hub.held:
            connection.cursor = connection.accepted_at = self.history.end
        for connection in list(self.hub.connections):
            connection.send(GAP)

    def watch(self, terminated: Callable[[], Awaitable[None]], patience: float) -> None:
        """Drain when Hypercorn says that it stops: it would give the clients no word of it. It
        waits for so many seconds then.
        """
        if self._watched or self._nursery is None:
            return
        self._watched = True
        self.end.patience = patience

        async def wait_and_drain() -> None:
            await terminated()
            self._told_to_stop = True
            await self.drain()

        self._nursery.start_soon(wait_and_drain)

    async def _outlive_siblings(self) -> None:
        """Hypercorn's master terminates the other workers as soon as the first one has ended, in
        the middle of their closes. A SIGTERM is heeded only when every client has been told.
        """
        with trio.open_signal_receiver(signal.SIGTERM) as signals:
            await anext(signals)
            await self.drain()
            while self._told_to_stop:  # it ends by itself
                await anext(signals)
        output.flush()
        signal.raise_signal(signal.SIGTERM)

    async def drain(self) -> None:
        """Stop hearing, deliver what was heard, send every client away with a hint when to come
        back. Readiness is off from the first moment. Cancelled, it drops everything that is left.
        """
        await self.end.run()

    def _stop_hearing(self) -> None:
        self._sources.cancel()
        self.silent.give_up()
        self.heads.give_up()

    # One client

    async def serve_connection(self, handshake: Handshake, socket: Socket) -> None:
        """Serve one client that may be answered, whichever door it came through.

        Returns when its close has gone through. A bug in it ends it alone, with 1011.
        """
        endpoint = handshake.endpoint
        accepted_at = self.history.end
        address, entered = "", False
        try:
            try:
                address = self.addresses.of(
                    handshake.peer, handshake.headers.get("x-forwarded-for")
                )
                self.addresses.enter(address, trio.current_time())
                entered = True
                with await self._admit(handshake) as candidate:
                    principal = await self._let_in(candidate)
                # It has joined the hub before anything is awaited again.
                connection = Connection(
                    principal,
                    self._one_way_terms if handshake.one_way else self._limits,
                    self._answer,
                    self._on_trios_clock(principal.expires_at),
                    replays=self.replays,
                    resume_from=handshake.last_event_id,
                    accepted_at=accepted_at,
                    supports_deflate=handshake.supports_deflate,
                )
            except Rejected as rejected:
                if rejected.close is Close.AUTH_FAILED:
                    self.addresses.failed(address, trio.current_time())
                await self._reject(endpoint, socket, rejected)
                return
            except Exception:
                if (held_back := self._allowed("admission bug")) is not None:
                    log.exception(
                        "admission failed by a bug",
                        endpoint=endpoint.label,
                        held_back=held_back,
                    )
                bug = Rejected(Close.INTERNAL_ERROR, "internal error", "internal_error")
                await self._reject(endpoint, socket, bug)
                return
            del handshake, candidate  # a long head and its token, of no use while the client stays
            await self._run(connection, socket)
        finally:
            if entered:
                self.addresses.leave(address)

    async def _admit(self, handshake: Handshake) -> Candidate:
        try:
            admitted = await self.admissions.run(
                partial(self.admission.admit, handshake),
                self.accept_timeout,
                patience=self.accept_timeout / 2,
            )
        except Overloaded:
            raise Rejected(
                Close.SERVER_OVERLOADED, "too many handshakes", "handshake_limit"
            ) from None
        if admitted is None:
            raise _too_long()
        return admitted

    async def _let_in(self, candidate: Candidate) -> Principal:
        """Who joins the hub, or :exc:`Rejected`. Everything holds until the next await."""
        self._refuse_while_draining()
        try:
            place, waited = await self.room.find(candidate.principal)
            candidate.watch.doubtful |= waited
        except Rejected:
            self._refuse_while_draining()
            raise
        with place, trio.move_on_after(self.accept_timeout):
            while True:
                self._refuse_while_draining()  # the others may have been sent away meanwhile
                if (principal := self.admission.confirm(candidate)) is None:
                    await self.admission.look_again(candidate)
                elif candidate.ticket is None:
                    return principal
                else:
                    await self.admission.redeem(candidate.ticket)
                    candidate.ticket = None
        raise _too_long()

    def _refuse_while_draining(self) -> None:
        if self.draining:
            raise Rejected(Close.GOING_AWAY, self.end.hint(), "draining")

    async def _run(self, connection: Connection, socket: Socket) -> None:
        principal = connection.principal
        try:
            await connection.run(socket, self.hub)
        except Exception:
            if (held_back := self._allowed("connection bug")) is not None:
                log.exception(
                    "connection ended by a bug",
                    endpoint=principal.endpoint.label,
                    held_back=held_back,
                )
        finally:
            log.info(
                "closed",
                endpoint=principal.endpoint.label,
                tenant=principal.tenant,
                user=principal.user,
                session=principal.session,
                code=connection.code,
                reason=connection.close_reason,
                seconds=round(trio.current_time() - connection.joined_at, 1),
            )

    async def _reject(self, endpoint: Endpoint, socket: Socket, rejected: Rejected) -> None:
        self.rejected[rejected.label] += 1
        self.hub.count_close(rejected.close)
        if (held_back := self._allowed(f"rejected {rejected.label}")) is not None:
            log.info(
                "rejected",
                endpoint=endpoint.label,
                code=int(rejected.close),
                reason=rejected.text,
                held_back=held_back,
            )
        with trio.CancelScope(shield=True):  # bounded by the socket
            if isinstance(socket, sse.EventStream):
                await socket.refuse(rejected)
            else:
                await socket.close(rejected.close, rejected.text)

    def _allowed(self, kind: str) -> int | None:
        return self.log_limit.allows(kind, trio.current_time())

    async def _answer(self, connection: Connection, message: Message) -> None:
        """What a client asked for that its connection can't answer by itself."""
        match message:
            case Reauthenticate(token):
                await self._renew(connection, token)
            case Command.REFRESH_SECTORS | Command.REFRESH_SECTORS_JSON as form:
                await self._refresh_sectors(connection, form)
            case Command.INTERVALS:
                connection.send(self._intervals)
            case Command.WATCH | Command.UNWATCH as said:
                self.feed.hear(connection, said)

    async def _renew(self, connection: Connection, token: str | None) -> None:
        try:
            with trio.move_on_after(self.accept_timeout):
                principal = await self.admission.renew(connection.principal, token)
                self.hub.move(connection, principal)
                connection.renew(self._on_trios_clock(principal.expires_at))
                connection.send(auth_ok(principal.expires_at))
        except Rejected as rejected:
            # Live connections stay while Redis is down: the old credential holds to its end.
            if rejected.close is not Close.SERVER_OVERLOADED:
                connection.close(rejected.close, rejected.text)

    async def _refresh_sectors(self, connection: Connection, form: Command) -> None:
        if connection.principal.endpoint is not Endpoint.WAITER:
            return
        if self.sector_assignments is not None:
            await self.sector_assignments.refresh(connection)
        sectors = frozenset[SectorId]().union(*connection.principal.sectors.values())
        connection.send(sectors_updated(sectors, form))

    def trim_history(self) -> None:
        """Forget what has become too old since the last event came."""
        self.history.trim(trio.current_time())

    def now(self) -> float:
        """Unix time."""
        return self._clock()

    def _on_trios_clock(self, unix_time: float) -> float:
        return trio.current_time() + unix_time - self._clock()

    # What others ask

    @property
    def draining(self) -> bool:
        """Whether clients are being sent away."""
        return self.end.begun

    @property
    def ready(self) -> bool:
        """Whether a load balancer should send clients here."""
        return (
            not self.draining
            and self.pubsub is not None
            and self.pubsub.connected
            and self.streams is not None
            and self.streams.connected
        )

    def sample(self) -> Snapshot:
        """This process's figures, for the metrics."""
        return figures.sample(self)

    def samples(self) -> list[Snapshot]:
        """The figures of this process and of its siblings.

        The siblings are told ours first: what was said once must be part of every later sum,
        whoever is asked then, and if we are killed.
        """
        sample = self.sample()
        if self.siblings is None:
            return [sample]
        self._tell_siblings(self.siblings, sample)
        return [sample, *self.siblings.read()]


def _too_long() -> Rejected:
    return Rejected(Close.SERVER_OVERLOADED, "can't check the credential now", "accept_timeout")


def create_app(
    settings: Settings,
    *,
    auth: Mapping[Endpoint, Auth] | None = None,
    clock: Callable[[], float] = time.time,
) -> Gateway:
    """A gateway with these settings; ``auth`` and ``clock`` are for tests and embedders."""
    return Gateway(settings, auth=auth, clock=clock)


def _raise_fd_limit() -> None:
    """Raise the soft limit of open files, usually 1024, as far as the system allows.

    Each client needs one.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == hard:
        return
    refused: Exception | None = None
    # macOS reports no hard limit, and refuses to go beyond OPEN_MAX.
    for wanted in (hard, max(soft, _OPEN_MAX)):
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        except (OSError, ValueError) as error:
            refused = error
        else:
            return
    log.warning("limit of open files not raised", limit=soft, error=str(refused))
