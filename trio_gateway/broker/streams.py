"""The streams source: every process reads every entry from its own cursor (plain XREAD)."""

from collections.abc import Callable, Sequence
from typing import Final, NoReturn

import structlog
import trio

from ..core.event_ids import START, Position, entry_id, tag
from ..core.resilience import Breaker
from ..redis_url import RedisAddress
from ..runtime.stream_inlet import Entry, StreamInlet
from ..runtime.supervision import ConnectionLost, Demoted
from ..runtime.throttled_log import ThrottledLog
from .connection import RedisConnection, open_redis
from .stream_cursor import StreamCursor
from .stream_gaps import Gap, check
from .stream_past import read_past
from .stream_replies import read_entries, read_info, read_news, read_time

log = structlog.get_logger()

BLOCK: Final = 2.0  # seconds that Redis waits for new entries before it replies that there are none
REPLY_TIMEOUT: Final = 2.0  # seconds beyond that until the connection counts as lost
COUNT: Final = 500  # entries in one reply


class Streams:
    """Reads streams from their end, and after a lost connection from where it was.

    A fresh process reads the past of each stream first. ``on_demoted`` is called when the server
    at the other end of a connection that was in use has become a replica.
    """

    def __init__(
        self,
        address: RedisAddress,
        streams: Sequence[str],
        inlet: StreamInlet,
        breaker: Breaker,
        *,
        on_demoted: Callable[[], None] = lambda: None,
    ) -> None:
        self._address = address
        self._names = list(dict.fromkeys(streams))
        self._by_name: dict[str, StreamCursor] = {}  # of the streams that have been begun
        self._inlet = inlet
        for name in self._names:
            inlet.expect(tag(name))
        self._breaker = breaker
        self._on_demoted = on_demoted
        self._role_checked_at = 0.0
        self.connected = False
        self.gaps = 0
        self._throttled_log = ThrottledLog(log)

    @property
    def cursors(self) -> dict[str, str]:
        """The id of the last entry read, by stream; ``0-0`` before a stream is begun."""
        begun = {name: cursor.entry_id for name, cursor in self._by_name.items()}
        return dict.fromkeys(self._names, entry_id(START)) | begun

    async def run(self) -> NoReturn:
        """Read until the connection is :exc:`ConnectionLost`."""
        try:
            async with open_redis(self._address) as redis:
                for name in self._names:
                    if name in self._by_name:
                        await self._check(redis, self._by_name[name], is_new_connection=True)
                    else:
                        await self._begin(redis, name)
                # Only a successful read proves that the user has the right to read.
                await self._read(redis, block=False)
                self.connected = True
                self._breaker.succeeded()
                log.info("reading", source="stream", cursors=self.cursors)
                self._role_checked_at = trio.current_time()
                while True:
                    await self._read(redis)
                    await self._check_role(redis)
        except Demoted:
            # The other connections were made when the server was the primary, too.
            if self.connected:
                self._on_demoted()
            raise
        finally:
            self.connected = False

    async def _begin(self, redis: RedisConnection, name: str) -> None:
        """Begin at the stream's end, with the history of what it still holds."""
        now = read_time(await redis.ask("TIME", timeout=REPLY_TIMEOUT))
        ahead = now - trio.current_time() if now is not None else None
        info = read_info(await redis.ask("XINFO", "STREAM", name, timeout=REPLY_TIMEOUT))
        past = await read_past(redis, name, info, self._inlet.room(), timeout=REPLY_TIMEOUT)
        stream = tag(name)
        await self._inlet.begin(stream, name, past, ahead)
        cursor = self._by_name[name] = StreamCursor(name, stream, info, past.entries)
        if not cursor.is_counted:
            log.warning("Redis before 7 counts no entries: gaps are told on suspicion")
        log.info("history warmed", stream=name, entries=len(past.entries))

    async def _check_role(self, redis: RedisConnection) -> None:
        """A connection can outlive its server's time as the primary."""
        now = trio.current_time()
        if now - self._role_checked_at >= BLOCK:
            self._role_checked_at = now
            await redis.check_role(timeout=REPLY_TIMEOUT)

    async def _read(self, redis: RedisConnection, *, block: bool = True) -> None:
        """Read what is new in all streams, and look for gaps."""
        waiting = ("BLOCK", str(int(BLOCK * 1000))) if block else ()
        cursors = self._by_name.values()
        reply = await redis.call(
            "XREAD", "COUNT", COUNT, *waiting, "STREAMS",
            *(cursor.name for cursor in cursors),
            *(cursor.entry_id for cursor in cursors),
            timeout=BLOCK + REPLY_TIMEOUT,
        )  # fmt: skip
        news = read_news(reply)
        for name, entries in news:
            if (cursor := self._by_name.get(name)) is None:
                raise ConnectionLost("a stream that was not asked for")
            await self._take(cursor, entries)
            # A full reply says that we lag: the stream may be trimmed faster than we read.
            if len(entries) == COUNT or not cursor.is_counted:
                await self._check(redis, cursor)
        now = trio.current_time()
        for cursor in cursors:
            if not cursor.is_checked and (not news or cursor.checked_at + BLOCK < now):
                await self._check(redis, cursor)

    async def _take(self, cursor: StreamCursor, entries: Sequence[Entry]) -> None:
        """Hand on the entries of one reply, the oldest first."""
        is_event = True
        repeated: Position | None = None
        for entry in entries:
            if entry.position <= cursor.position:  # else its entries would be delivered twice
                raise ConnectionLost("an answer to an earlier question")
            if cursor.has_read(entry.position):
                # No id is delivered twice, and this may be another event with the same id.
                repeated, is_event = entry.position, False
            else:
                is_event = await self._inlet.entry(cursor.stream, cursor.name, entry)
            cursor.passed(entry)
        if not is_event:
            await self._inlet.advance(cursor.stream, cursor.position)
        if repeated is not None:
            here = cursor.position
            await self._gap(cursor, Gap("ids came a second time", since=here, end=here))

    async def _check(
        self, redis: RedisConnection, cursor: StreamCursor, *, is_new_connection: bool = False
    ) -> None:
        """Compare the cursor with its stream, and tell of a gap if there is one.

        On a new connection this also checks that it leads to the same stream as before.
        """
        is_tail_there = not is_new_connection or await _is_tail_there(redis, cursor)
        info = read_info(await redis.ask("XINFO", "STREAM", cursor.name, timeout=REPLY_TIMEOUT))
        cursor.checked_at, cursor.is_checked = trio.current_time(), True
        cursor.is_counted = info.added is not None
        gap, read_count = check(cursor, info, is_tail_there=is_tail_there)
        if gap is not None:
            await self._gap(cursor, gap)
        cursor.read_count = read_count
        cursor.proven = cursor.position

    async def _gap(self, cursor: StreamCursor, gap: Gap) -> None:
        self.gaps += 1
        self._throttled_log.error(
            "gap",
            kind=gap.reason,
            stream=cursor.name,
            cursor=cursor.entry_id,
            reason=gap.reason,
        )
        await self._inlet.gap(cursor.stream, since=gap.since, end=gap.end)
        cursor.set_back(gap.end)  # in the same step: a cancelled notice leaves the cursor


async def _is_tail_there(redis: RedisConnection, cursor: StreamCursor) -> bool:
    """Whether the last entry that was read is still in its place; True if it is unknown."""
    if cursor.tail is None:
        return True
    where = entry_id(cursor.tail.position)
    reply = await redis.call(
        "XREVRANGE", cursor.name, where, where, "COUNT", 1, timeout=REPLY_TIMEOUT
    )
    return read_entries(reply) == [cursor.tail]
