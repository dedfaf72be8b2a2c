"""Parts: every object of a gateway, built in one place and without I/O."""

import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Final

import trio

from . import __version__
from .access.addresses import Addresses
from .access.admission import Admission, PendingAdmission
from .access.api_keys import ApiKeys
from .access.auth import Auth
from .access.placement import Placement
from .access.revocations import Revocations
from .access.tickets import Tickets
from .broker.cluster_streams import ClusterStreams
from .broker.command_link import CommandLink
from .broker.commands import Commands
from .broker.dead_letters import DeadLetters
from .broker.probe import Probe
from .broker.publishing import Publishing
from .broker.pubsub import Listener, PubSub
from .broker.readiness import Readiness
from .broker.receipt_store import ReceiptStore
from .broker.sentinel_replicas import SentinelReplicas
from .broker.shard_claims import KEY as CLAIMS
from .broker.shard_claims import ShardClaims
from .broker.sharded_pubsub import ShardedPubSub, is_channel
from .broker.steps import Steps
from .broker.stream_pages import StreamPages
from .broker.streams import Streams
from .broker.topologies import make_topology
from .broker.topology import Topology
from .broker.topology_watch import watch
from .cluster.building import ClusterParts, build_cluster
from .cluster.delivery_query import answer_delivery_times
from .cluster.flushing import answer_flushes
from .cluster.room import ClusterRoom
from .core.audiences import Endpoint
from .core.capacity import CapacityLimits
from .core.control_messages import REVOKED, SECTORS_CHANGED, Node, placement_channel
from .core.delivery_times import DeliveryTimes
from .core.event_ids import tag
from .core.events import Event
from .core.limits import DropAlarm, TenantRate
from .core.resilience import Breaker
from .core.slots import slot_of
from .redis_url import RedisKind, RedisUrl
from .runtime.batches import Batches
from .runtime.client_counts import ClientCounts
from .runtime.concurrency_limiter import ConcurrencyLimiter
from .runtime.deadlines import Deadlines
from .runtime.dispatch import Dispatch
from .runtime.drain import Drain
from .runtime.extent import Extent
from .runtime.following import Following
from .runtime.history import History
from .runtime.hub import Hub
from .runtime.ingest import Ingest
from .runtime.keyed_limiter import KeyedLimiter
from .runtime.older_events import LEAST_BYTES, OlderEvents
from .runtime.past_routing import PastRouting
from .runtime.places import Places
from .runtime.queue import EventQueue
from .runtime.reach import Reach
from .runtime.receipt_writing import ReceiptWriting
from .runtime.receipts import ReceiptLog
from .runtime.resume import Replays
from .runtime.room import Room
from .runtime.silent_connections import SilentConnections
from .runtime.stream_inlet import StreamInlet
from .runtime.tracked_events import TrackedEvents
from .settings import Settings
from .telemetry.loop_lag import LoopLag
from .telemetry.worker_stats import WorkerStats
from .transports.accepting import Load
from .transports.tcp import Opening

_API_TURNS: Final = 16  # requests with big bodies, 8 MiB each

if TYPE_CHECKING:
    from .access.sectors import SectorAssignments


@dataclass(frozen=True, kw_only=True, eq=False)
class Api:
    """The parts of the API for backends."""

    keys: ApiKeys
    publishing: Publishing
    turns: KeyedLimiter  # requests with big bodies
    requests: Counter[str] = field(default_factory=Counter)  # by call and status
    events: Counter[str] = field(default_factory=Counter)  # to be published, by outcome


@dataclass(frozen=True, kw_only=True, eq=False)
class Parts:
    """The parts of one gateway.

    They are complete when built, but nothing runs yet: :meth:`Gateway.serving` starts their tasks.
    A part that a setting switches off is None and stays None.
    """

    settings: Settings
    clock: Callable[[], float]  # unix time
    breakers: Mapping[str, Breaker]
    # From Redis to the clients:
    topology: Topology
    watch_topology: Callable[[], Awaitable[None]]
    hub: Hub
    deadlines: Deadlines
    ingest: Ingest
    pubsub_queue: EventQueue
    stream_queue: EventQueue
    history: History
    extent: Extent
    older_events: OlderEvents
    replays: Replays
    receipts: ReceiptLog
    receipt_writing: ReceiptWriting
    receipt_store: ReceiptStore
    reach: Reach
    steps: Steps
    dispatch: Dispatch
    batches: Batches
    pubsub: PubSub
    sharded_pubsubs: Sequence[ShardedPubSub]  # in a Cluster only
    streams: Streams | ClusterStreams
    inlet: StreamInlet
    following: Following
    shard_claims: ShardClaims | None
    claim_link: CommandLink | None  # of these
    places: Places
    sources: trio.CancelScope  # around the tasks of the two sources
    dead_letters: DeadLetters | None
    # Admission:
    commands: Commands
    readiness: Readiness
    tickets: Tickets
    revocations: Revocations
    checks: CommandLink | None  # of revocations at connect; none in a Cluster
    placement: Placement
    sector_assignments: "SectorAssignments | None"
    addresses: Addresses
    admission: Admission
    silent: SilentConnections  # have sent no byte yet
    heads: ConcurrencyLimiter[Opening]  # request heads being read
    admissions: ConcurrencyLimiter[PendingAdmission]  # credentials being checked
    room: Room | ClusterRoom  # for clients at a limit
    catch_ups: KeyedLimiter  # simultaneous requests of each user or session
    # What the processes of one service tell each other:
    cluster: ClusterParts | None
    api: Api | None  # for backends
    # The whole process:
    drain: Drain
    counts: ClientCounts
    loop_lag: LoopLag
    worker_stats: WorkerStats

    @property
    def draining(self) -> bool:
        """Whether the gateway closes its clients and admits no new ones."""
        return self.drain.begun

    @property
    def ready(self) -> bool:
        """Whether a load balancer should send clients here."""
        return (
            not self.draining
            and self.pubsub.connected
            and self.streams.connected
            and len(self.streams.unreadable) < len(self.settings.sharding.names)
        )

    @property
    def handshakes(self) -> int:
        """The number of clients that are being admitted or have sent nothing yet."""
        return len(self.silent) + self._arriving

    @property
    def _arriving(self) -> int:
        """The number of clients that are being admitted and have sent something."""
        return self.heads.inside + self.counts.arriving + self.admissions.inside

    def load(self) -> Load | None:
        """How many clients the process has and may have; None while it is not ready."""
        if not self.ready:
            return None
        return Load(self.hub.taken + self._arriving, self.settings.ws_max_total_connections)


def build_parts(
    settings: Settings,
    *,
    auth: Mapping[Endpoint, Auth] | None = None,
    clock: Callable[[], float] = time.time,
) -> Parts:
    """Build the parts of a gateway with these settings.

    ``auth`` replaces authentication per endpoint. Raises :exc:`InvalidSettings` if
    ``DATABASE_URL`` cannot be used.
    """
    breakers = {
        name: Breaker(settings.circuit_failure_threshold, settings.circuit_recovery_timeout)
        for name in ("pubsub", "stream", "commands", "writes", "database")
    }
    capacity = CapacityLimits(
        total=settings.ws_max_total_connections,
        per_user=settings.ws_max_connections_per_user,
        per_session=settings.ws_max_connections_per_session,
        per_tenant=settings.ws_max_connections_per_tenant,
    )
    hub = Hub(capacity)
    redis_url = RedisUrl.from_url(settings.redis_url)
    topology = make_topology(redis_url)
    uncovered_to_branch = settings.ws_uncovered_sector == "branch"
    past_routing = PastRouting(settings.routes, uncovered_to_branch=uncovered_to_branch)
    history = History(
        events=settings.ws_history_events,
        size=settings.ws_history_bytes,
        age=settings.ws_history_age,
        routing=past_routing,
    )
    sharding = settings.sharding
    history.ranks = sharding.ranks
    places = Places(history.extent, sharding)
    dispatch = Dispatch(
        hub,
        settings.routes,
        history=history,
        uncovered_to_branch=uncovered_to_branch,
        writes_per_checkpoint=settings.ws_broadcast_batch_size,
    )
    commands = Commands(
        topology,
        breakers["commands"],
        breakers["writes"],
        max_connections=settings.redis_pool_max_connections,
    )
    names = {tag(name): name for name in sharding.names}
    older_events = OlderEvents(
        history,
        StreamPages(commands, names),
        routing=past_routing,
        most_entries=settings.ws_resume_from_stream,
        most_bytes=max(settings.ws_history_bytes, LEAST_BYTES),
    )
    is_cluster = redis_url.kind is RedisKind.CLUSTER
    receipt_writing = ReceiptWriting(by_stream=is_cluster)
    times = dispatch.times = DeliveryTimes(settings.ws_slo_seconds)
    tracked_events = TrackedEvents(settings.routes, clock, settings.ws_receipt_ttl)
    receipts = ReceiptLog(tracked_events, history, clock, receipt_writing, times)
    receipt_store = ReceiptStore(commands, names)
    reach = Reach(
        settings.routes,
        clock,
        settings.ws_receipt_ttl,
        by_stream=is_cluster,
        is_alone=sharding.by_tenant,
    )

    def on_copy(event: Event) -> None:
        tracked_events.drop(event)
        reach.drop(event)

    def on_reading(name: str) -> None:
        """A stream is read on a new connection: maybe from another server than before."""
        receipt_writing.write_again()
        reach.ask_again()
        reach.back(tag(name))

    def on_lost(name: str) -> None:
        reach.lost(tag(name))

    if tracked_events.tracks:
        dispatch.receipts = receipts
        dispatch.on_copy = on_copy
    replays = Replays(history, hub, places, older_events, receipts, times)
    pubsub_queue = EventQueue(
        settings.redis_event_queue_size,
        DropAlarm(
            settings.ws_drop_alarm_window,
            settings.ws_drop_alarm_threshold,
            settings.ws_drop_alarm_cooldown,
        ),
        TenantRate(settings.ws_tenant_event_rate) if settings.ws_tenant_event_rate else None,
    )
    stream_queue = EventQueue(
        settings.redis_event_queue_size, is_one_lane=settings.sharding.by_tenant
    )

    # Every client that connects waits for this one. In a Cluster a check needs several nodes.
    checks = None if topology.is_cluster else CommandLink(topology)
    revocations = Revocations(commands, hub, patience=settings.ws_accept_timeout, link=checks)
    placement = Placement(hub, commands)
    listeners: dict[str, Listener] = {
        REVOKED: revocations,
        placement_channel(redis_url.data.db): placement,
    }
    sector_assignments = None
    if settings.database_url is not None:
        from .access.sectors import make_sector_assignments  # SQLAlchemy is a third of the start

        sector_assignments = make_sector_assignments(settings, hub, breakers["database"], clock)
        listeners[SECTORS_CHANGED] = sector_assignments
    tickets = Tickets(commands)
    admission = Admission(
        settings,
        tickets=tickets,
        revocations=revocations if auth is None else None,  # a replacement checks them itself
        auth=auth,
        sector_assignments=sector_assignments,
        clock=clock,
    )

    dead_letters = None
    ingest = Ingest()
    if settings.redis_dlq_stream is not None:
        dead_letters = DeadLetters(commands, settings.redis_dlq_stream)
        ingest = Ingest(dead_letters.offer)
    probe = Probe()

    def on_wrong_server() -> None:
        if isinstance(streams, Streams):  # a node of a Cluster says if it has not its streams
            streams.reconnect()

    pubsub = PubSub(
        topology,
        settings.redis_channel_patterns,
        ingest,
        pubsub_queue,
        breakers["pubsub"],
        listeners,
        max_wait=settings.redis_event_max_wait,
        probe=probe,
        anywhere=is_cluster,
        on_wrong_server=on_wrong_server,
    )

    sharded_pubsubs: list[ShardedPubSub] = []
    if is_cluster:
        channels = [name for name in settings.redis_channel_patterns if is_channel(name)]
        channels += [name for name in (REVOKED, SECTORS_CHANGED) if name in listeners]
        for channel in dict.fromkeys(channels):
            sharded_pubsubs.append(
                ShardedPubSub(
                    topology,
                    channel,
                    ingest,
                    pubsub_queue,
                    Breaker(settings.circuit_failure_threshold, settings.circuit_recovery_timeout),
                    listeners.get(channel),
                    max_wait=settings.redis_event_max_wait,
                )
            )

    def on_demoted() -> None:
        pubsub.reconnect()
        commands.reconnect()
        for link in (checks, claim_link):
            if link is not None:
                link.reconnect()
        if cluster is not None:
            cluster.reconnect()

    inlet = StreamInlet(
        ingest=ingest,
        queue=stream_queue,
        history=history,
        dispatch=dispatch,
        replays=replays,
        routes=settings.routes,
        places=places,
        tracked_events=tracked_events if tracked_events.tracks else None,
        reach=reach if reach.watches else None,
        wall_clock=clock,
    )

    def on_stream() -> None:
        breakers["stream"].succeeded()
        on_reading("")

    streams: Streams | ClusterStreams
    if is_cluster:
        streams = ClusterStreams(topology, breakers["stream"], on_reading, on_lost)
    else:
        streams = Streams(
            topology,
            on_reading=on_stream,
            on_lost=lambda: on_lost(""),
            probe=probe,
            ranks=sharding.ranks,
            old_streams=sharding.old_streams,
            on_demoted=on_demoted,
        )
    following = Following(streams, history.extent, sharding)
    shard_claims, claim_link = None, None
    if reach.watches and sharding.by_tenant:
        claim_link = CommandLink(topology, slot_of(CLAIMS) if topology.is_cluster else None)
        shard_claims = ShardClaims(claim_link.evaluate, following, sharding)
    sources = trio.CancelScope()
    silent = SilentConnections(settings.ws_max_handshakes)
    heads: ConcurrencyLimiter[Opening] = ConcurrencyLimiter(settings.ws_max_handshakes)

    def stop_sources() -> None:
        if cluster is not None:
            cluster.registry.beat_soon()
        sources.cancel()
        if shard_claims is not None:
            shard_claims.stop()
        silent.give_up()
        heads.give_up()

    room = Room(hub, lambda: drain.begun)
    cluster = None
    if settings.has_cluster:

        def describe(name: str) -> Node:
            return Node(
                name,
                __version__,
                started_at,
                drain.begun,
                len(hub),
                stream_queue.depth,
                sharding.numbers_of(following.names),
            )

        started_at = round(clock(), 3)
        cluster = build_cluster(
            settings,
            topology=topology,
            database=redis_url.data.db,
            commands=commands,
            hub=hub,
            capacity=capacity,
            room=room,
            ingest=ingest,
            queue=pubsub_queue,
            describe=describe,
            clock=clock,
            sectors_changed=sector_assignments.changed if sector_assignments else None,
        )
        breakers |= cluster.breakers
        if cluster.limits is not None:
            revocations.reserve_all = cluster.limits.reserve_all
        answer_flushes(cluster.control, receipt_writing, receipt_store)
        answer_delivery_times(cluster.control, times)

    async def tell_others() -> None:
        async with trio.open_nursery() as nursery:
            if cluster is not None:
                nursery.start_soon(cluster.leave)
            # What clients have confirmed last: another process may ask about it any moment.
            nursery.start_soon(receipt_writing.flush, receipt_store.write)

    drain = Drain(hub, (pubsub_queue, stream_queue), stop_sources, tell_others)
    return Parts(
        settings=settings,
        clock=clock,
        breakers=breakers,
        topology=topology,
        watch_topology=partial(
            watch, topology, redis_url.seeds if redis_url.kind is RedisKind.SENTINEL else ()
        ),
        hub=hub,
        deadlines=Deadlines(),
        ingest=ingest,
        pubsub_queue=pubsub_queue,
        stream_queue=stream_queue,
        history=history,
        extent=history.extent,
        older_events=older_events,
        replays=replays,
        receipts=receipts,
        receipt_writing=receipt_writing,
        receipt_store=receipt_store,
        reach=reach,
        steps=Steps(receipt_store, names),
        dispatch=dispatch,
        batches=Batches(dispatch, settings.ws_callback_timeout),
        pubsub=pubsub,
        sharded_pubsubs=sharded_pubsubs,
        streams=streams,
        inlet=inlet,
        following=following,
        shard_claims=shard_claims,
        claim_link=claim_link,
        places=places,
        sources=sources,
        dead_letters=dead_letters,
        commands=commands,
        readiness=Readiness(commands.check),
        tickets=tickets,
        revocations=revocations,
        checks=checks,
        placement=placement,
        sector_assignments=sector_assignments,
        addresses=Addresses(
            connections=settings.ws_max_connections_per_address,
            failures=settings.ws_max_failed_logins,
            hops=settings.ws_proxy_hops,
        ),
        admission=admission,
        silent=silent,
        heads=heads,
        room=room if cluster is None or cluster.room is None else cluster.room,
        cluster=cluster,
        api=_build_api(settings, topology, redis_url),
        catch_ups=KeyedLimiter(),
        admissions=ConcurrencyLimiter(settings.ws_max_handshakes),
        drain=drain,
        counts=ClientCounts(),
        loop_lag=LoopLag(),
        worker_stats=WorkerStats.of_this_process(),
    )


def _build_api(settings: Settings, topology: Topology, redis_url: RedisUrl) -> Api | None:
    if settings.ws_api_keys_file is None:
        return None
    return Api(
        keys=ApiKeys(settings.ws_api_keys_file, settings.api_keys),
        publishing=Publishing(
            topology,
            SentinelReplicas(redis_url) if redis_url.kind is RedisKind.SENTINEL else None,
        ),
        turns=KeyedLimiter(_API_TURNS, patience=1.0),
    )
