"""The streams source: every entry, read by every process from its own cursor (plain XREAD)."""

from collections.abc import Sequence
from typing import Any, Final, NoReturn

import structlog
import trio

from ..core.resilience import Breaker
from ..runtime.dispatch import EventQueue
from ..runtime.intake import Intake
from ..runtime.supervision import Lost
from .resp import Address, RedisConnection, open_redis

log = structlog.get_logger()

BLOCK: Final = 2.0  # seconds that Redis waits for news before it says that there are none
PATIENCE: Final = 2.0  # seconds beyond that before the link counts as lost
COUNT: Final = 500  # entries in one reply
_FIELD: Final = b"data"


class Streams:
    """Reads streams from their end, and after a lost connection from where it was."""

    def __init__(
        self,
        address: Address,
        streams: Sequence[str],
        intake: Intake,
        queue: EventQueue,
        breaker: Breaker,
    ) -> None:
        self._address = address
        self._intake = intake
        self._queue = queue
        self._breaker = breaker
        self._cursors: dict[bytes, bytes] = {}
        self._streams = [name.encode() for name in dict.fromkeys(streams)]
        self.connected = False
        self.last_entry_at = 0.0  # on Trio's clock

    @property
    def cursors(self) -> dict[str, str]:
        """The last entry read of each stream."""
        return {name.decode(): cursor.decode() for name, cursor in self._cursors.items()}

    async def run(self) -> NoReturn:
        """Read until the link is :exc:`Lost`."""
        try:
            async with open_redis(self._address) as redis:
                with trio.move_on_after(PATIENCE) as scope:
                    await self._find_ends(redis)
                if scope.cancelled_caught:
                    raise Lost("no answer to XREVRANGE")
                self.connected = True
                self._breaker.succeeded()
                log.info("reading", source="stream", cursors=self.cursors)
                while True:
                    await self._read(redis)
        finally:
            self.connected = False

    async def _find_ends(self, redis: RedisConnection) -> None:
        for stream in self._streams:
            if stream not in self._cursors:
                last = await redis.call("XREVRANGE", stream, "+", "-", "COUNT", 1)
                self._cursors[stream] = last[0][0] if last else b"0-0"

    async def _read(self, redis: RedisConnection) -> None:
        names, cursors = self._cursors.keys(), self._cursors.values()
        with trio.move_on_after(BLOCK + PATIENCE) as scope:
            reply = await redis.call(
                "XREAD", "COUNT", COUNT, "BLOCK", int(BLOCK * 1000), "STREAMS", *names, *cursors
            )
        if scope.cancelled_caught:
            raise Lost("no answer to XREAD")
        for stream, entries in reply or ():
            for entry_id, fields in entries:
                await self._hear(stream, entry_id, fields)
                self._cursors[stream] = entry_id

    async def _hear(self, stream: bytes, entry_id: bytes, fields: Any) -> None:
        name, entry = stream.decode(), entry_id.decode()
        found = dict(zip(fields[::2], fields[1::2], strict=True)) if fields else {}
        if (payload := found.get(_FIELD)) is None:
            self._intake.received["stream"] += 1
            self._intake.refuse(
                "no_data", "entry has no field data", source="stream", channel=name, entry_id=entry
            )
            return
        event = self._intake.parse(payload, source="stream", channel=name, entry_id=entry)
        if event is not None:
            self.last_entry_at = event.heard_at
            await self._queue.put(event)
