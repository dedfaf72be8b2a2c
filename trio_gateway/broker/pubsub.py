"""The Pub/Sub source: messages that are published while we are subscribed, at most once."""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, Final, NoReturn, Protocol

import structlog
import trio

from ..core.resilience import Breaker
from ..redis_url import RedisAddress
from ..runtime.ingest import Ingest
from ..runtime.queue import EventQueue
from ..runtime.supervision import ConnectionLost, Demoted
from .connection import ENOUGH, RedisConnection, open_redis

log = structlog.get_logger()

# Seconds of waiting until a PING is sent, and again until its answer is overdue: a half-open
# connection is noticed after twice this time, whatever the state of TCP.
LIVENESS: Final = 2.0


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

    ``listeners``, by channel, receive the messages that are not events.
    """

    def __init__(
        self,
        address: RedisAddress,
        patterns: Sequence[str],
        ingest: Ingest,
        queue: EventQueue,
        breaker: Breaker,
        listeners: Mapping[str, Listener] | None = None,
    ) -> None:
        self._address = address
        self._patterns = [pattern.encode() for pattern in dict.fromkeys(patterns)]
        self._ingest = ingest
        self._queue = queue
        self._breaker = breaker
        listeners = listeners or {}
        self._listeners = {name.encode(): each.receive for name, each in listeners.items()}
        self._on_subscribed = [each.on_subscribed for each in listeners.values()]
        self._unconfirmed = 0
        self.connected = False
        self._connection_scope = trio.CancelScope()
        first_match = lru_cache(maxsize=10_000)(self._first_match)
        self._first_match_of: Callable[[bytes], tuple[bytes | None, str]] = first_match

    async def run(self) -> NoReturn:
        """Receive until the connection is :exc:`ConnectionLost`."""
        try:
            async with open_redis(self._address) as redis:
                with self._connection_scope:
                    await self._subscribe(redis)
                    await self._listen(redis)
                raise Demoted("its Redis may be a replica by now")
        finally:
            self.connected = False
            self._connection_scope = trio.CancelScope()

    def reconnect(self) -> None:
        """Connect again: another connection has found that the server is not the primary."""
        if self.connected:
            self._connection_scope.cancel()

    async def _subscribe(self, redis: RedisConnection) -> None:
        self._unconfirmed = len(self._patterns) + len(self._listeners)
        if self._patterns:
            await redis.send("PSUBSCRIBE", *self._patterns)
        if self._listeners:
            await redis.send("SUBSCRIBE", *self._listeners)
        await redis.send("PING")  # a server that is still loading refuses this, but not a SUBSCRIBE

    async def _listen(self, redis: RedisConnection) -> NoReturn:
        """Receive replies, and detect dead and lagging connections by PING.

        Only the answer to a PING shows how far behind a connection is: one that brings a byte now
        and then, but no answer, is lost. Time in which this process was busy does not count.
        """
        pinged, waited, before = True, 0.0, redis.received
        while True:
            started = trio.current_time()
            replies: list[Any] = []
            with trio.move_on_after(LIVENESS - waited):
                replies = await redis.receive()
            waited += trio.current_time() - started
            for reply in replies:
                if pinged and isinstance(reply, list) and reply[:1] == [b"pong"]:
                    pinged, waited = False, 0.0
                    self._answered()
                else:
                    self._take(reply)
            if waited >= LIVENESS:
                if not pinged:
                    await redis.send("PING")
                elif redis.received - before < ENOUGH:
                    raise ConnectionLost("no answer to PING")
                pinged, waited, before = True, 0.0, redis.received

    def _take(self, reply: Any) -> None:
        match reply:
            case [b"pmessage", bytes() as pattern, bytes() as channel, bytes() as payload]:
                # Redis sends a message once for each pattern that its channel matches.
                first, name = self._first_match_of(channel)
                if first == pattern:
                    event = self._ingest.parse(payload, source="pubsub", channel=name)
                    if event is not None:
                        self._queue.offer(event)
            case [b"message", bytes() as channel, bytes() as payload] if channel in self._listeners:
                self._listeners[channel](payload)
            case [b"psubscribe" | b"subscribe", *_]:
                self._unconfirmed -= 1
            case Exception():
                raise ConnectionLost(f"Redis says {str(reply).split(' ', 1)[0]}")
            case _:
                raise ConnectionLost("unexpected reply")

    def _answered(self) -> None:
        if not self.connected and not self._unconfirmed:
            self.connected = True
            self._breaker.succeeded()
            log.info("subscribed", source="pubsub", patterns=len(self._patterns))
            for on_subscribed in self._on_subscribed:
                on_subscribed()

    def _first_match(self, channel: bytes) -> tuple[bytes | None, str]:
        """The first pattern that matches a channel, and the channel's name."""
        name = channel.decode(errors="replace")
        for pattern in self._patterns:
            if glob(pattern).fullmatch(channel):
                return pattern, name
        return None, name


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
