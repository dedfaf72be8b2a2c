"""The Pub/Sub source: messages that are published while we are subscribed, at most once."""

import math
import random
import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, Final, NoReturn, Protocol

import structlog
import trio

from ..core.exception_groups import first_leaf
from ..core.resilience import Breaker
from ..core.slots import read_node
from ..redis_url import RedisAddress
from ..runtime.ingest import Ingest, Message
from ..runtime.queue import EventQueue
from ..runtime.supervision import ConnectionLost, Demoted
from .connection import ENOUGH, Redirected, RedisConnection, open_redis
from .probe import EVERY, PREFIX, Probe, is_refused
from .topology import Topology

log = structlog.get_logger()

# Seconds of waiting until a PING is sent, and again until its answer is overdue: a half-open
# connection is noticed after twice this time, whatever the state of TCP.
LIVENESS: Final = 2.0
_LOOKS_EVERY: Final = 0.02  # seconds between two looks at the oldest event while events are dropped


class Listener(Protocol):
    """Receives the messages of a channel that carries no events. Its methods never wait."""

    def receive(self, payload: bytes, /) -> None:
        """A message was published."""

    def on_subscribed(self) -> None:
        """The channel is subscribed, for the first time or again.

        Messages that were published before are lost: look up again what they would have said.
        """


class PubSub:
    """Subscribes to patterns and puts each event into the queue.

    ``listeners``, by channel, receive the messages that are not events. While the queue is full,
    nothing is read until its oldest event has waited for ``max_wait`` seconds. ``on_wrong_server``
    is called when the ``probe`` that another part publishes does not come back. In a Cluster, each
    node is sent what is published on any: with ``anywhere``, one of them is chosen, and another one
    publishes the probe.
    """

    def __init__(
        self,
        topology: Topology,
        patterns: Sequence[str],
        ingest: Ingest,
        queue: EventQueue,
        breaker: Breaker,
        listeners: Mapping[str, Listener] | None = None,
        *,
        max_wait: float = 0.0,
        probe: Probe | None = None,
        anywhere: bool = False,
        on_wrong_server: Callable[[], None] = lambda: None,
    ) -> None:
        self.name = "pubsub"
        self._topology = topology
        self._probe = probe or Probe()
        self._anywhere = anywhere
        self._on_wrong_server = on_wrong_server
        self._lost: RedisAddress | None = None  # the last server whose connection was lost
        self._patterns = [pattern.encode() for pattern in dict.fromkeys(patterns)]
        self._ingest = ingest
        self._queue = queue
        self._breaker = breaker
        listeners = listeners or {}
        # Functions by channel. An entry may be replaced at any time.
        self.listeners = {name.encode(): each.receive for name, each in listeners.items()}
        self._on_subscribed = [each.on_subscribed for each in listeners.values()]
        self._unconfirmed = 0
        self._max_wait = max_wait
        self._drops_until = -math.inf  # without another look at how long events have waited
        self._pinged_at: float | None = None  # of a PING that is not answered yet
        self._waited = 0.0  # for replies, since then
        self._received_before = 0  # bytes, then
        self.connected = False
        self._connection_scope = trio.CancelScope()
        first_match = lru_cache(maxsize=10_000)(self._first_match)
        self._first_match_of: Callable[[bytes], tuple[bytes | None, str]] = first_match

    async def run(self) -> NoReturn:
        """Receive until the connection is :exc:`ConnectionLost`."""
        server = await self._choose()
        try:
            with self._connection_scope:
                async with trio.open_nursery() as nursery:
                    # While it connects, too: a frozen server accepts, and then says nothing.
                    nursery.start_soon(self._leave, server)
                    async with open_redis(server, any_role=self._anywhere) as redis:
                        if self._anywhere:
                            nursery.start_soon(self._publish_probes, server)
                        await self._subscribe(redis)
                        await self._listen(redis)
            raise Demoted("its Redis may be a replica by now")
        except* ConnectionLost as lost:
            self._lost = server
            if isinstance(redirection := first_leaf(lost), Redirected):
                node = read_node(redirection.place, server.host)
                self._topology.moved(redirection.slot, node)
            else:
                self._topology.suspect(server)
            raise
        finally:
            self.connected = False
            self._probe.listens(False)
            self._connection_scope = trio.CancelScope()

    async def _choose(self, other_than: RedisAddress | None = None) -> RedisAddress:
        """The server to connect to: the primary, or one that was not lost last."""
        if not self._anywhere:
            return await self._topology.primary()
        servers = await self._topology.primaries()
        good = [server for server in servers if server not in (self._lost, other_than)]
        if not (good or servers):
            raise ConnectionLost("the Cluster has no primary")
        return random.choice(good or servers)  # noqa: S311 - spreads load, keeps no secret

    async def _leave(self, server: RedisAddress) -> None:
        """Give up the connection when its server is not a primary any more."""
        await self._topology.wait_left(server, None)
        self._connection_scope.cancel()

    async def _publish_probes(self, server: RedisAddress) -> None:
        """Publish the probe on another node than this one."""
        while self._probe.is_wanted:
            try:
                other = await self._choose(other_than=server)
                async with open_redis(other, any_role=True) as redis:
                    while self._probe.is_wanted:
                        reply = await redis.ask(*self._probe.next_command(), timeout=LIVENESS)
                        self._probe.published(reply, trio.current_time())
                        await trio.sleep(EVERY)
            except ConnectionLost:
                await trio.sleep(EVERY)

    def reconnect(self) -> None:
        """Connect again: another connection has found that the server is not the primary."""
        if self.connected:
            self._connection_scope.cancel()

    async def _subscribe(self, redis: RedisConnection) -> None:
        self._unconfirmed = len(self._patterns) + len(self.listeners)
        if self._patterns:
            await redis.send("PSUBSCRIBE", *self._patterns)
        if self.listeners:
            await redis.send("SUBSCRIBE", *self.listeners)
        if self._probe.is_wanted:
            self._unconfirmed += 1
            await redis.send("SUBSCRIBE", self._probe.channel)  # the last one: it may be refused
        await redis.send("PING")  # a server that is still loading refuses this, but not a SUBSCRIBE

    async def _listen(self, redis: RedisConnection) -> NoReturn:
        """Receive replies, and detect dead and lagging connections by PING.

        Only the answer to a PING shows how far behind a connection is: one that brings a byte now
        and then, but no answer, is lost. Time in which this process did not read does not count.
        """
        self._note_ping(redis)  # the one of the subscription
        while True:
            started = trio.current_time()
            replies: list[Any] = []
            overdue = max(0.0, self._probe.due - started) if self._pinged_at is None else math.inf
            with trio.move_on_after(min(LIVENESS - self._waited, overdue)) as scope:
                replies = await self._receive(redis, scope)
            messages: list[Message] = []
            for reply in replies:
                if (message := self._event_in(reply)) is not None:
                    messages.append(message)
                    continue
                await self._put(redis, messages)  # they came before
                messages = []
                if self._pinged_at is not None and isinstance(reply, list) and _is_pong(reply):
                    pinged_at, self._pinged_at, self._waited = self._pinged_at, None, 0.0
                    self._answered()
                    # What was published before the PING came before its answer.
                    if self._probe.due <= pinged_at:
                        self._on_wrong_server()
                        raise Demoted("a probe did not come back: it is not the streams' Redis")
                else:
                    self._take(reply)
            await self._put(redis, messages)
            if self._waited >= LIVENESS or self._probe.due <= trio.current_time():
                if self._pinged_at is None:
                    await redis.send("PING")
                    self._note_ping(redis)
                elif self._waited >= LIVENESS:
                    if redis.received - self._received_before < ENOUGH:
                        raise ConnectionLost("no answer to PING")
                    self._waited, self._received_before = 0.0, redis.received

    async def _receive(self, redis: RedisConnection, scope: trio.CancelScope) -> list[Any]:
        """Receive replies, and put events into the queue; return replies that take more than that.

        So while only events come, one cancel scope is enough. It is half of what an event costs
        here.
        """
        while True:
            started = trio.current_time()
            try:
                replies = await redis.receive()
            finally:
                self._waited += trio.current_time() - started
            messages = [self._event_in(reply) for reply in replies]
            found = [message for message in messages if message is not None]
            # Nothing is awaited in the scope that could be cancelled with these replies in hand.
            if scope.cancel_called or len(found) < len(replies) or len(found) > self._queue.room:
                return replies
            self._queue.offer_all(self._ingest.parse_messages(found))

    async def _put(self, redis: RedisConnection, messages: Sequence[Message]) -> None:
        """Put the events in these messages into the queue."""
        while messages:
            if self._queue.is_full:
                await self._wait_for_room(redis)
            room = max(1, self._queue.room)
            self._queue.offer_all(self._ingest.parse_messages(messages[:room]))
            messages = messages[room:]

    def _note_ping(self, redis: RedisConnection) -> None:
        self._pinged_at = trio.current_time()
        self._waited, self._received_before = 0.0, redis.received

    async def _wait_for_room(self, redis: RedisConnection) -> None:
        """Stop reading while the queue is full, but not for longer than an event may wait.

        What has waited in Redis counts, too: all that is read before the answer to a PING was
        published before the PING. So a pause delays the messages for listeners by ``max_wait`` at
        most, and Redis does not end the connection because too much waits for it.
        """
        if trio.current_time() < self._drops_until:
            return
        if self._pinged_at is None:
            await redis.send("PING")
            self._note_ping(redis)
        assert self._pinged_at is not None
        with trio.move_on_at(min(self._queue.oldest, self._pinged_at) + self._max_wait):
            await self._queue.wait_for_room()
            return
        self._drops_until = trio.current_time() + _LOOKS_EVERY

    def _event_in(self, reply: Any) -> Message | None:
        """The message in this reply if it contains an event."""
        match reply:
            case [b"pmessage", bytes() as pattern, bytes() as channel, bytes() as payload]:
                # Redis sends a message once for each pattern that its channel matches.
                first, name = self._first_match_of(channel)
                if first == pattern:
                    return name, payload
        return None

    def _take(self, reply: Any) -> None:
        """Take a reply without an event."""
        match reply:
            case [b"pmessage", bytes(), bytes(), bytes()]:
                pass
            case [b"message", bytes() as channel, bytes() as payload] if channel in self.listeners:
                self.listeners[channel](payload)
            case [b"message", self._probe.channel, bytes() as payload]:
                self._probe.came_back(payload)
            case [b"psubscribe" | b"subscribe", *_]:
                self._unconfirmed -= 1
            case Exception() if self._unconfirmed == 1 and is_refused(reply):
                self._unconfirmed -= 1
                self._probe.give_up()
            case Exception():
                raise ConnectionLost(f"Redis says {str(reply).split(' ', 1)[0]}")
            case _:
                raise ConnectionLost("unexpected reply")

    def _answered(self) -> None:
        if not self.connected and not self._unconfirmed:
            self.connected = True
            self._probe.listens(True)
            self._breaker.succeeded()
            log.info("subscribed", source=self.name, patterns=len(self._patterns))
            for on_subscribed in self._on_subscribed:
                on_subscribed()

    def _first_match(self, channel: bytes) -> tuple[bytes | None, str]:
        """The first pattern that matches a channel, and the channel's name. A probe has none."""
        name = channel.decode(errors="replace")
        if name.startswith(PREFIX):
            return None, name
        for pattern in self._patterns:
            if glob(pattern).fullmatch(channel):
                return pattern, name
        return None, name


def _is_pong(reply: list[Any]) -> bool:
    return reply[:1] == [b"pong"]


@lru_cache(maxsize=1000)
def glob(pattern: bytes) -> re.Pattern[bytes]:
    """Translate a Redis pattern (``*``, ``?``, ``[a-c]``, ``[^a]``, ``\\x``) to a regex."""
    found, at = b"", 0
    while at < len(pattern):
        here = pattern[at : at + 1]
        if here == b"*":
            found += b".*"
        elif here == b"?":
            found += b"."
        elif here == b"\\" and at + 1 < len(pattern):
            at += 1
            found += re.escape(pattern[at : at + 1])
        elif here == b"[" and (end := _end_of_set(pattern, at)):
            inside = pattern[at + 1 : end]
            negated, inside = inside[:1] == b"^", inside.removeprefix(b"^")
            members = re.sub(rb"([\\\]\[&~|^])", rb"\\\1", inside.replace(b"\\", b""))
            found += (b"[^" if negated else b"[") + members + b"]"
            at = end
        else:
            found += re.escape(here)
        at += 1
    return re.compile(found, re.DOTALL)


def _end_of_set(pattern: bytes, start: int) -> int:
    """The index of the ``]`` that ends the set at ``start``; 0 if it has no end or no member."""
    at = start + 1 + (pattern[start + 1 : start + 2] == b"^")
    first = at
    while at < len(pattern) and pattern[at : at + 1] != b"]":
        at += 2 if pattern[at : at + 1] == b"\\" else 1
    return at if first < at < len(pattern) else 0
