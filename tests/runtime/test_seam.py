"""The seam: a client that reconnects gets each durable event once and in order, or a gap.

Scripts made by hypothesis run in virtual time against a small model: events (durable or not,
with Pub/Sub copies before and after them, published twice with one id), clients that come, go,
resume, read slowly or not at all, histories that forget, streams with gaps, gateways that are
started again.
"""

import json
import math
from dataclasses import dataclass, field
from typing import Any

import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock, wait_all_tasks_blocked

from trio_gateway.core.audiences import Endpoint, Principal, audiences_of
from trio_gateway.core.close_codes import Close
from trio_gateway.core.event_ids import START, Position, Stream, read_cursor
from trio_gateway.core.routing import ROUTES
from trio_gateway.runtime.batches import Batches
from trio_gateway.runtime.connection import Connection, ConnectionLimits
from trio_gateway.runtime.dispatch import Dispatch
from trio_gateway.runtime.history import History
from trio_gateway.runtime.hub import Hub
from trio_gateway.runtime.queue import EventQueue
from trio_gateway.runtime.resume import Replays
from trio_gateway.testing import FakeSocket, make_event, make_principal

A = Stream("aaaa")
EPOCH = 1_000_000  # unix seconds at virtual time 0
PRINCIPALS = (
    make_principal(Endpoint.WAITER, sectors=[5]),
    make_principal(Endpoint.KITCHEN),
    make_principal(Endpoint.ADMIN),
    make_principal(Endpoint.DINER, session=456),
)
KINDS: tuple[dict[str, Any], ...] = (
    {"type": "ROUND_READY", "session_id": 456},  # all four
    {"type": "ROUND_SUBMITTED", "sector_id": 5},  # waiter and admin
    {"type": "ENTITY_UPDATED"},  # admin
    {"type": "ROUND_READY", "tenant_id": 2, "session_id": 456},  # of another tenant: none
    {"type": "CART_SYNC", "session_id": 456},  # diner, not durable
)
Step = tuple[str, int, int]  # what, which client or kind, how much

_client, _kind = st.integers(0, 3), st.integers(0, 4)
_steps: st.SearchStrategy[Step] = st.one_of(
    st.tuples(st.just("publish"), _kind, st.integers(1, 60)),
    st.tuples(st.just("publish"), st.just(0), st.integers(1, 5)),
    st.tuples(
        st.sampled_from(["copy first", "its stream entry", "copy later", "twice with an id"]),
        st.integers(0, 3), st.just(0),
    ),
    st.tuples(
        st.sampled_from(["resume", "resume", "come and ask", "come"]),
        _client, st.sampled_from([10**9, 10**9, 0, 300, 5000]),
    ),
    st.tuples(st.sampled_from(["ask", "say"]), _client, st.just(0)),
    st.tuples(st.just("leave"), _client, st.sampled_from([0, 0, 1, 5])),
    st.tuples(st.just("read"), _client, st.sampled_from([1, 100, 3000, 10**9])),
    st.tuples(st.just("wait"), st.just(0), st.sampled_from([0, 200, 500, 600, 2500, 40_000])),
    st.tuples(st.just("run"), st.just(0), st.integers(1, 9)),
    st.tuples(st.sampled_from(["trim", "lose", "recreate", "start anew"]), st.just(0), st.just(0)),
)  # fmt: skip

_room = st.sampled_from([10**9, 10**9, 0, 140, 2000])
# Steps that seldom meet by chance: a client is away at that moment.
_scenes: st.SearchStrategy[list[Step]] = st.one_of(
    _steps.map(lambda step: [step]),
    _steps.map(lambda step: [step]),
    st.builds(
        lambda client, unseen, kind, much, room, after: [
            ("leave", client, unseen), ("publish", kind, much), ("wait", 0, 0),
            ("resume", client, room), ("wait", 0, 0), after,
        ],
        _client, st.sampled_from([0, 1, 5]), _kind, st.integers(1, 60), _room, _steps,
    ),
    st.builds(
        lambda client, kind, room: [
            ("leave", client, 0), ("copy first", kind, 0), ("run", 0, 3), ("resume", client, room),
            ("run", 0, 3), ("its stream entry", 0, 0),
        ],
        _client, st.integers(0, 2), _room,
    ),
    st.builds(
        lambda client, much, read: [
            ("leave", client, 0), ("publish", 0, 30), ("resume", client, 140), ("publish", 0, much),
            ("wait", 0, 0), ("read", client, read), ("leave", client, 0),
        ],
        _client, st.integers(1, 200), st.sampled_from([1, 100, 3000, 10**9]),
    ),
)  # fmt: skip
_scripts = st.lists(_scenes, max_size=14).map(lambda scenes: [s for scene in scenes for s in scene])
_BEGINNING: tuple[Step, ...] = (*(("resume", n, 10**9) for n in range(4)), ("wait", 0, 0))


@dataclass
class Client:
    """What a client has received over all its connections, and what it has been promised."""

    principal: Principal
    last_event_id: str = ""
    connection: Connection | None = None
    socket: FakeSocket = field(default_factory=FakeSocket)
    messages: int = 0  # of this connection that it has looked at
    in_this_life: set[int] = field(default_factory=set)
    copies: set[int] = field(default_factory=set)
    # Since the last message about missing events, or since it refetched its state:
    promised: Position | None = None  # everything after this position
    seen: list[Position] = field(default_factory=list)
    losses: int = 0
    events: int = 0

    def refetch(self) -> None:
        self.promised, self.seen = None, []


class World:
    """The part of a gateway between Redis and the sockets, with backends and clients."""

    def __init__(
        self, nursery: trio.Nursery, events: int, age: float, outbox_messages: int
    ) -> None:
        self.nursery = nursery
        self.limits = ConnectionLimits(
            stale_after=math.inf, receive_timeout=math.inf, write_timeout=math.inf,
            rate_limit=10**6, outbox_messages=outbox_messages,
        )  # fmt: skip
        self.events, self.age = events, age
        self.clients = [Client(principal) for principal in PRINCIPALS]
        self.number = 0
        self.last_entry = START
        self.stream: list[tuple[Position, int, dict[str, Any]]] = []  # what Redis holds
        self.positions: dict[int, Position] = {}  # of every durable event that ever was
        self.kinds: dict[int, dict[str, Any]] = {}
        self.undone: list[int] = []  # whose Pub/Sub copy went first
        self.recreated_at = START
        self.begin(whole=True)

    def begin(self, *, whole: bool) -> None:
        """A gateway that starts, with what the stream holds in its history."""
        self.hub = Hub()
        self.history = History(events=self.events, age=self.age)
        self.replays = Replays(self.history, self.hub)
        self.dispatch = Dispatch(
            self.hub,
            history=self.history,
            writes_per_checkpoint=1,
        )
        self.pubsub_queue, self.stream_queue = EventQueue(10_000), EventQueue(10_000)
        since = self.stream[0][0] if self.stream else self.last_entry
        self.history.extent.begin(A, since, whole=whole)
        for position, n, keys in self.stream:
            ago = EPOCH + trio.current_time() - position[0] / 1000
            received_at = trio.current_time() - ago
            event = make_event(
                data=n, channel="s", received_at=received_at, stream=A, position=position, **keys
            )
            self.dispatch.remember(event)
        self.history.extent.advance(A, self.last_entry)
        self.life = trio.CancelScope()

        async def live(life: trio.CancelScope) -> None:
            with life:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self.replays.decide)
                    batches = Batches(self.dispatch)
                    nursery.start_soon(batches.run, self.pubsub_queue, 3)
                    nursery.start_soon(batches.run, self.stream_queue, 3)

        self.nursery.start_soon(live, self.life)

    # Backends and Redis

    async def add(self, n: int, keys: dict[str, Any], *, read: bool = True) -> None:
        """Add an entry to the stream."""
        now = int((EPOCH + trio.current_time()) * 1000)
        last = self.last_entry
        position = Position((now, 0) if now > last[0] else (last[0], last[1] + 1))
        self.last_entry = position
        self.stream.append((position, n, keys))
        event = make_event(
            data=n,
            channel="s",
            received_at=trio.current_time(),
            stream=A,
            position=position,
            **keys,
        )
        if event.event_id is not None:
            self.positions.setdefault(n, position)
        if read:
            await self.stream_queue.wait_for_room()
            self.stream_queue.extend([event])

    def new(self, keys: dict[str, Any]) -> int:
        self.number += 1
        self.kinds[self.number] = keys
        return self.number

    def copy(self, n: int) -> None:
        now = trio.current_time()
        event = make_event(data=n, channel="branch:1:admin", received_at=now, **self.kinds[n])
        self.pubsub_queue.offer(event)

    async def gap(self, since: Position, end: Position) -> None:
        """As the streams source and the gateway do it."""
        await self.stream_queue.wait_idle()
        self.history.restart(A, since=since, end=end)
        self.replays.tell_of_gap(A)

    # Clients

    async def come(self, client: Client, how: str, room: int) -> None:
        if client.connection is not None:
            return
        client.socket = FakeSocket(room=room)
        client.connection = Connection(
            client.principal,
            self.limits,
            replays=self.replays,
            resume_from=client.last_event_id if how == "resume" else None,
        )
        client.messages, client.in_this_life = 0, set()
        if how == "come and ask":
            await self.ask(client)
        elif how == "come":
            client.refetch()
        self.nursery.start_soon(client.connection.run, client.socket, self.hub)

    async def ask(self, client: Client) -> None:
        text = json.dumps({"type": "resume", "last_event_id": client.last_event_id})
        await client.socket.client.send(text)

    async def leave(self, client: Client, unseen: int = 0) -> None:
        """The connection ends, and the last messages in it were not read."""
        if client.connection is None:
            return
        await client.socket.client.leave()
        await wait_all_tasks_blocked()
        self.look(client, unseen)
        client.connection = None

    def look(self, client: Client, unseen: int = 0) -> None:
        """The client takes note of what it was sent."""
        texts = client.socket.texts
        for text in texts[client.messages : len(texts) - unseen]:
            client.messages += 1
            self.take(client, json.loads(text))

    def take(self, client: Client, message: dict[str, Any]) -> None:
        match message:
            case {"type": "gap"}:
                client.losses += 1
                client.refetch()
            case {"type": "resumed", "recovered": recovered, "last_event_id": last}:
                client.last_event_id = last
                position = read_cursor(last)[A]
                if not recovered:
                    client.losses += 1
                    client.refetch()
                    position = max(position, self.recreated_at)
                if client.promised is None:
                    client.promised = position
            case {"type": _, "data": n}:
                self.receive(client, n, message.get("event_id"))

    def receive(self, client: Client, n: int, event_id: str | None) -> None:
        assert n not in client.in_this_life, "twice on one connection"
        client.in_this_life.add(n)
        assert self.may_receive(client, n)
        client.events += 1
        if event_id is None:
            client.copies.add(n)
            return
        client.last_event_id = event_id
        position = read_cursor(event_id)[A]
        assert not client.seen or client.seen[-1] < position, "not in order, or twice"
        before = client.seen[-1] if client.seen else client.promised
        if before is not None:
            assert not self.missing(client, before, position), "missed"
        client.seen.append(position)
        client.promised = client.promised or position

    def may_receive(self, client: Client, n: int) -> bool:
        event = make_event(data=n, **self.kinds[n])
        return not audiences_of(client.principal).isdisjoint(ROUTES.audiences(event))

    def missing(self, client: Client, after: Position, before: Position) -> list[int]:
        return [
            n for n, position in self.positions.items()
            if after < position < before
            and n not in client.copies
            and self.may_receive(client, n)
        ]  # fmt: skip

    # What happens

    async def leave_if_closed(self) -> None:
        """The history has moved past a client that reads slowly; nothing else closes one."""
        for client in self.clients:
            if client.connection is not None and client.connection.ending:
                assert client.connection.code == Close.SLOW_CONSUMER
                client.socket.read(math.inf)
                await wait_all_tasks_blocked()
                assert client.socket.reason == "too slow: the history has moved past it"
                self.look(client)
                client.connection = None

    async def step(self, what: str, which: int, much: int) -> None:
        client = self.clients[which % 4]
        match what:
            case "publish":
                for _ in range(much):
                    await self.add(self.new(KINDS[which]), KINDS[which])
            case "copy first":
                self.undone.append(self.new(KINDS[which]))
                self.copy(self.number)
            case "its stream entry" if self.undone:
                n = self.undone.pop(0)
                await self.add(n, self.kinds[n])
            case "copy later":
                await self.add(self.new(KINDS[which]), KINDS[which])
                self.copy(self.number)
            case "twice with an id":
                keys = KINDS[which] | {"id": f"id {self.number + 1}"}
                self.new(keys)
                await self.add(self.number, keys)
                await self.add(self.number, keys)
            case "resume" | "come and ask" | "come":
                await self.come(client, what, much)
            case "ask" if client.connection is not None:
                await self.ask(client)
            case "say" if client.connection is not None:
                await client.socket.client.send("x")
            case "leave":
                await self.leave(client, much)
            case "read":
                client.socket.read(much)
            case "wait":
                await trio.sleep(much / 1000)
            case "run":
                for _ in range(much):
                    await trio.lowlevel.checkpoint()
            case "trim":
                self.history.trim(trio.current_time())
            case "lose":  # trimmed while the gateway had no connection to Redis
                await self.stream_queue.wait_idle()
                for _ in range(3):
                    await self.add(self.new(KINDS[0]), KINDS[0], read=False)
                self.stream.clear()
                await self.gap(self.last_entry, self.last_entry)
            case "recreate":  # Redis came back with half of what it had
                await self.stream_queue.wait_idle()
                last, sequence = self.history.extent.end[A]
                self.recreated_at = max(self.recreated_at, self.history.extent.end[A])
                del self.stream[len(self.stream) // 2 :]
                end = self.stream[-1][0] if self.stream else START
                await self.gap(Position((last, sequence + 1)), end)
                await trio.sleep(0.001)  # so that the next entry has a later time
            # A gateway that was not running can't know that Redis lost anything.
            case "start anew" if self.recreated_at == START:
                await self.leave_if_closed()
                for connection in list(self.hub.connections):
                    connection.close(Close.GOING_AWAY)
                await wait_all_tasks_blocked()
                for each in self.clients:
                    await self.leave(each)
                self.life.cancel()
                self.begin(whole=False)

    async def settle(self) -> None:
        """In the end every client resumes and reads all that there is."""
        await trio.sleep(3)
        await self.leave_if_closed()
        for client in self.clients:
            await self.leave(client)
            await self.come(client, "resume", 10**9)
        await trio.sleep(3)
        await self.add(self.new(KINDS[0]), KINDS[0])
        await trio.sleep(1)
        for client in self.clients:
            self.look(client)
            assert client.seen[-1] == self.positions[self.number]
        for client in self.clients:
            await self.leave(client)
        assert not self.hub.held
        assert not self.hub.connections
        self.history.trim(10**12)
        assert not len(self.history)
        self.life.cancel()


def play(script: list[Step], events: int, age: float, outbox_messages: int = 10**9) -> World:
    async def main() -> World:
        async with trio.open_nursery() as nursery:
            world = World(nursery, events, age, outbox_messages)
            for step in (*_BEGINNING, *script):
                await world.step(*step)
                await world.leave_if_closed()
            await world.settle()
        return world

    return trio.run(main, clock=MockClock(autojump_threshold=0))


@given(
    _scripts,
    st.sampled_from([100_000, 100_000, 60, 3]),
    st.sampled_from([10**6, 30]),
    st.sampled_from([10**9, 50, 3]),
)
def test_client_gets_each_durable_event_once_and_in_order_or_a_gap(
    script: list[Step], events: int, age: float, outbox_messages: int
) -> None:
    play(script, events, age, outbox_messages)


def test_gap_follows_all_replayed_events_that_came_before_it() -> None:
    for ticks in (0, 0, 0, 0, 1, 1, 1, 1, 1, 1):  # Trio runs the tasks that are ready in any order
        script: list[Step] = [
            ("wait", 0, 2000), *(("leave", n, 0) for n in range(4)),
            *(("resume", n, 10**9) for n in range(4)), ("run", 0, ticks),
            ("publish", 0, 1), ("lose", 0, 0), ("publish", 0, 1),
        ]  # fmt: skip
        play(script, events=100_000, age=10**6)


def test_client_that_only_reconnects_gets_no_gap() -> None:
    script: list[Step] = []
    for n in range(30):
        script += [("publish", 0, 7), ("resume", n % 4, 10**9), ("run", 0, 5), ("leave", n % 3, 1)]
    world = play(script, 100_000, 10**6)
    assert [client.losses for client in world.clients] == [0] * 4
    assert all(client.events == 7 * 30 + 1 for client in world.clients)
