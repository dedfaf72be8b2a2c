"""The Pub/Sub source: what is published while we listen, at most once."""

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

# Seconds of waiting until Redis is pinged, and again until its answer is overdue: a half-open
# link is noticed after twice this long, whatever TCP believes.
LIVENESS: Final = 2.0


class Listener(Protocol):
    """What listens to a channel that carries something else than events. Neither method blocks."""

    def receive(self, payload: bytes, /) -> None:
        """A message was published."""

    def on_subscribed(self) -> None:
        """The subscription holds, for the first time or again.

        What was published before is lost: what messages tell must be looked up again.
        """


class PubSub:
    """Subscribes to patterns and hands on each event as it comes.

    ``listeners`` are for channels that carry something else than events.
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
        self._on_link = [each.on_subscribed for each in listeners.values()]
        self._unconfirmed = 0
        self.connected = False
        self._link = trio.CancelScope()
        first_match = lru_cache(maxsize=10_000)(self._first_match)
        self._first_match_of: Callable[[bytes], tuple[bytes | None, str]] = first_match

    async def run(self) -> NoReturn:
        """Listen until the link is :exc:`ConnectionLost`."""
        try:
            async with open_redis(self._address) as redis:
                with self._link:
                    await self._subscribe(redis)
                    await self._listen(redis)
                raise Demoted("its Redis may be a replica by now")
        finally:
            self.connected = False
            self._link = trio.CancelScope()

    def reconnect(self) -> None:
        """Connect anew: another link to the same Redis has found that it is no primary."""
        if self.connected:
            self._link.cancel()

    async def _subscribe(self, redis: RedisConnection) -> None:
        self._unconfirmed = len(self._patterns) + len(self._listeners)
        if self._patterns:
            await redis.send("PSUBSCRIBE", *self._patterns)
        if self._listeners:
            await redis.send("SUBSCRIBE", *self._listeners)
        await redis.send("PING")  # one that is loading its data lets us subscribe all the same

    async def _listen(self, redis: RedisConnection) -> NoReturn:
        """Only the answer to a PING shows how far behind a link is: one that brings a byte now and
        then, or less than is published, is no link. What we are too busy to read is not its fault.
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
                    self._hear(reply)
            if waited >= LIVENESS:
                if not pinged:
                    await redis.send("PING")
                elif redis.received - before < ENOUGH:
                    raise ConnectionLost("no answer to PING")
                pinged, waited, before = True, 0.0, redis.received

    def _hear(self, reply: Any) -> None:
        match reply:
            case [b"pmessage", bytes() as pattern, bytes() as channel, bytes() as payload]:
                # A channel that matches several patterns is sent once for each of them.
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
            for on_subscribed in self._on_link:
                on_subscribed()

    def _first_match(self, channel: bytes) -> tuple[bytes | None, str]:
        """Of our patterns; and the channel's name."""
        name = channel.decode(errors="replace")
        for pattern in self._patterns:
            if glob(pattern).fullmatch(channel):
                return pattern, name
        return None, name


@lru_cache(maxsize=1000)
def glob(pattern: bytes) -> re.Pattern[bytes]:
    """A Redis pattern as a regular expression: ``*``, ``?``, ``[a-c]``, ``[^a]``, ``\\x``."""
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
    """Where the set that begins at ``start`` ends, 0 if it has no end or no member."""
    at = start + 1 + (pattern[start + 1 : start + 2] == b"^")
    first = at
    while at < len(pattern) and pattern[at : at + 1] != b"]":
        at += 2 if pattern[at : at + 1] == b"\\" else 1
    return at if first < at < len(pattern) else 0
