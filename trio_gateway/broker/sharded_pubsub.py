"""Sharded Pub/Sub in a Cluster: a channel without wildcards, on the node that has its slot.

What is published with SPUBLISH stays on that node, so many publishers do not load all of them.
Patterns cannot be subscribed to in this way, since their channels are in different slots.
"""

from typing import Any, Final, NoReturn

import structlog
import trio

from ..core.exception_groups import first_leaf
from ..core.resilience import Breaker
from ..core.slots import slot_of
from ..redis_url import RedisAddress
from ..runtime.ingest import Ingest, Message
from ..runtime.queue import EventQueue
from ..runtime.supervision import ConnectionLost, Demoted
from .connection import RedisConnection, no_error
from .probe import Probe, is_refused
from .pubsub import Listener, PubSub
from .topology import Topology

log = structlog.get_logger()

_WILDCARDS: Final = frozenset("*?[\\")


def is_channel(pattern: str) -> bool:
    """Whether this pattern is the name of one channel."""
    return _WILDCARDS.isdisjoint(pattern)


class _NotAllowed(ConnectionLost):
    """Redis does not know SSUBSCRIBE, or does not allow it to this user."""


class ShardedPubSub(PubSub):
    """Subscribes to one channel; its messages are events, or for the ``listener``.

    If Redis does not know SSUBSCRIBE, or does not allow it, one warning says so.
    """

    def __init__(
        self,
        topology: Topology,
        channel: str,
        ingest: Ingest,
        queue: EventQueue,
        breaker: Breaker,
        listener: Listener | None = None,
        *,
        max_wait: float = 0.0,
    ) -> None:
        probe = Probe()
        probe.is_wanted = False  # a node that does not have the slot says so
        super().__init__(
            topology, [], ingest, queue, breaker,
            {channel: listener} if listener is not None else None,
            max_wait=max_wait, probe=probe,
        )  # fmt: skip
        self.name = f"sharded pubsub {channel}"
        self.channel = channel
        self.breaker = breaker
        self._slot = slot_of(channel)

    async def run(self) -> NoReturn:
        """Receive until the connection is :exc:`ConnectionLost`."""
        try:
            await super().run()
        except* _NotAllowed as refused:
            log.warning(
                "no sharded Pub/Sub: what is published with SPUBLISH is not received;"
                " use PUBLISH, or grant the Redis user +ssubscribe (Redis 7)",
                channel=self.channel,
                error=str(first_leaf(refused)),
            )
            await trio.sleep_forever()
        raise AssertionError("it never ends")

    async def _choose(self, other_than: RedisAddress | None = None) -> RedisAddress:
        return await self._topology.primary(self._slot)

    async def _leave(self, server: RedisAddress) -> None:
        await self._topology.wait_left(server, self._slot)
        self._connection_scope.cancel()

    async def _subscribe(self, redis: RedisConnection) -> None:
        self._unconfirmed = 1
        await redis.send("SSUBSCRIBE", self.channel)
        await redis.send("PING")

    def _event_in(self, reply: Any) -> Message | None:
        match reply:
            case [b"smessage", bytes() as channel, bytes() as payload]:
                if channel not in self.listeners:
                    return self.channel, payload
        return None

    def _take(self, reply: Any) -> None:
        match reply:
            case [b"smessage", bytes() as channel, bytes() as payload]:
                self.listeners[channel](payload)
            case [b"ssubscribe", *_]:
                self._unconfirmed -= 1
            case [b"sunsubscribe", *_]:
                raise Demoted("the slot has moved")
            case Exception() if is_refused(reply) or "unknown command" in str(reply):
                raise _NotAllowed(str(reply).split(" ", 1)[0])
            case Exception():
                no_error(reply, "SSUBSCRIBE")
            case _:
                raise ConnectionLost("unexpected reply")
