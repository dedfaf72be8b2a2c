"""The streams source: every entry, read by every process from its own cursor (plain XREAD)."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, NoReturn

import structlog
import trio

from ..core.event_ids import START, Position, Stream, entry_id, tag
from ..core.resilience import Breaker
from ..redis_url import Address
from ..runtime.stream_inlet import Entry, Past, StreamInlet
from ..runtime.supervision import ConnectionLost, Demoted
from ..runtime.throttled_log import ThrottledLog
from .connection import RedisConnection, open_redis
from .stream_replies import read_deleted, read_entries, read_info, read_news, read_time

log = structlog.get_logger()

BLOCK: Final = 2.0  # seconds that Redis waits for news before it says that there are none
PATIENCE: Final = 2.0  # seconds beyond that before the link counts as lost
COUNT: Final = 500  # entries in one reply
_PAGE: Final = 1000  # entries in one reply while warming
# Entries whose ids are remembered, so that none is delivered again after the cursor was set back.
RECENT: Final = 10_000


@dataclass(slots=True)
class _Source:
    """One stream, and how far it has been read."""

    name: str
    stream: Stream
    cursor: Position | None = None  # None before it is read the first time
    # How many entries the stream had when that one was its last: Redis counts them for ever, so
    # that entries which were trimmed away unread show. None if that is not known.
    entries: int | None = 0
    is_counted: bool = True  # Redis counts them: from version 7 on
    proven: Position = START  # the cursor at the last look, when all up to it had been read
    first_read: Position | None = None  # of a stream that was empty before
    tail: Entry | None = None  # the one at the cursor, if it was read
    high: Position = START  # the furthest cursor that there was
    recent: deque[Position] = field(default_factory=lambda: deque(maxlen=RECENT))
    read_before: frozenset[Position] = frozenset()  # when the cursor was set back
    remembered_since: Position = START  # the oldest of these
    looked_at: float = 0.0  # when that was last compared with what Redis says
    is_sure: bool = True  # nothing was read since

    @property
    def cursor_id(self) -> str:
        return entry_id(self.cursor or START)

    def passed(self, entry: Entry) -> None:
        """It has been read."""
        if self.cursor == START:
            self.first_read = entry.position
        self.cursor, self.tail = entry.position, entry
        self.recent.append(entry.position)
        if self.entries is not None:
            self.entries += 1
        self.is_sure = False

    def has_read(self, position: Position) -> bool:
        """Whether an entry stood there that clients may have got, before the cursor was set back.
        What is older than all that is remembered counts as read.
        """
        return position in self.read_before or position < self.remembered_since

    def set_back(self, end: Position) -> None:
        """Read on from here."""
        cursor = self.cursor or START
        self.high = max(self.high, cursor)
        if end < cursor:
            self.read_before = frozenset(self.recent)
            self.remembered_since = min(self.recent, default=_after(self.high))
        if end != cursor:
            self.tail = None
        self.cursor = self.proven = end


class Streams:
    """Reads streams from their end, and after a lost connection from where it was.

    A fresh process reads the past of each stream first. ``on_demoted`` is called when the server
    on the other end of a connection that was in use has become a replica.
    """

    def __init__(
        self,
        address: Address,
        streams: Sequence[str],
        inlet: StreamInlet,
        breaker: Breaker,
        *,
        on_demoted: Callable[[], None] = lambda: None,
    ) -> None:
        self._address = address
        self._sources = [_Source(name, tag(name)) for name in dict.fromkeys(streams)]
        self._inlet = inlet
        for source in self._sources:
            inlet.expect(source.stream)
        self._breaker = breaker
        self._on_demoted = on_demoted
        self._role_checked_at = 0.0
        self.connected = False
        self.gaps = 0
        self._throttled_log = ThrottledLog(log)

    @property
    def cursors(self) -> dict[str, str]:
        """The last entry read of each stream."""
        return {source.name: source.cursor_id for source in self._sources}

    async def run(self) -> NoReturn:
        """Read until the link is :exc:`ConnectionLost`."""
        try:
            async with open_redis(self._address) as redis:
                for source in self._sources:
                    if source.cursor is None:
                        await self._begin(redis, source)
                    else:
                        await self._look_for_gap(redis, source, anew=True)
                await self._read(redis, block=False)  # nothing less shows that we may
                self.connected = True
                self._breaker.succeeded()
                log.info("reading", source="stream", cursors=self.cursors)
                self._role_checked_at = trio.current_time()
                while True:
                    await self._read(redis)
                    await self._check_role(redis)
        except Demoted:
            if self.connected:  # other links were made when it was the primary, too
                self._on_demoted()
            raise
        finally:
            self.connected = False

    async def _check_role(self, redis: RedisConnection) -> None:
        """Its link may outlive its being the primary."""
        now = trio.current_time()
        if now - self._role_checked_at >= BLOCK:
            self._role_checked_at = now
            await redis.check_role(patience=PATIENCE)

    async def _read(self, redis: RedisConnection, *, block: bool = True) -> None:
        waiting = ("BLOCK", str(int(BLOCK * 1000))) if block else ()
        reply = await redis.call(
            "XREAD", "COUNT", COUNT, *waiting, "STREAMS",
            *(source.name for source in self._sources),
            *(source.cursor_id for source in self._sources),
            patience=BLOCK + PATIENCE,
        )  # fmt: skip
        news = read_news(reply)
        for name, entries in news:
            source = self._named(name)
            is_event, again = True, 0
            for entry in entries:
                if entry.position <= (source.cursor or START):
                    raise ConnectionLost(
                        "an answer to an earlier question"
                    )  # its entries would come twice
                if entry.position <= source.high and source.has_read(entry.position):
                    # No id is delivered twice, and this may be another event with it.
                    is_event = False
                    again += 1
                else:
                    is_event = await self._inlet.entry(source.stream, source.name, entry)
                source.passed(entry)
            if not is_event:
                await self._inlet.advance(source.stream, entry.position)
            if again:
                here = entry.position
                await self._gap(source, "ids came a second time", since=here, end=here)
            # If we lag: is it trimmed faster than we read?
            if len(entries) == COUNT or not source.is_counted:
                await self._look_for_gap(redis, source)
        now = trio.current_time()
        for source in self._sources:
            if not source.is_sure and (not news or source.looked_at + BLOCK < now):
                await self._look_for_gap(redis, source)

    def _named(self, name: str) -> _Source:
        for source in self._sources:
            if source.name == name:
                return source
        raise ConnectionLost("a stream that was not asked for")

    # The first time

    async def _begin(self, redis: RedisConnection, source: _Source) -> None:
        """Stand at the stream's end, with the history of what it still holds."""
        now = read_time(await redis.ask("TIME", patience=PATIENCE))
        ahead = now - trio.current_time() if now is not None else None
        info = read_info(await redis.ask("XINFO", "STREAM", source.name, patience=PATIENCE))
        entries, unread = await self._past(redis, source.name, info.last)
        is_whole = unread is None and (info.last == START or info.added == info.length)
        since = unread or (entries[0].position if entries else info.last)
        past = Past(entries, since, is_whole, end=info.last)
        await self._inlet.begin(source.stream, source.name, past, ahead)
        source.cursor = source.proven = info.last
        source.entries = info.added
        source.is_counted = info.added is not None
        source.recent.extend(entry.position for entry in entries)
        if entries and entries[-1].position == info.last:
            source.tail = entries[-1]
        if not source.is_counted:
            log.warning("Redis before 7 counts no entries: gaps are told on suspicion")
        log.info("history warmed", stream=source.name, entries=len(entries))

    async def _past(
        self, redis: RedisConnection, name: str, last: Position
    ) -> tuple[list[Entry], Position | None]:
        """The entries up to ``last`` that the history has room for, the oldest first, and where
        the one before them stands, if there is one.
        """
        found: list[Entry] = []
        size, end = 0, entry_id(last)
        room = self._inlet.room()
        while True:
            reply = await redis.call("XREVRANGE", name, end, "-", "COUNT", _PAGE, patience=PATIENCE)
            page = read_entries(reply)
            for entry in page:
                size += len(entry.payload or b"")
                if (
                    len(found) >= room.entries
                    or size > room.payload_bytes
                    or entry.position[0] < room.since
                ):
                    return found[::-1], entry.position
                found.append(entry)
            if len(page) < _PAGE:
                return found[::-1], None
            end = f"({entry_id(page[-1].position)}"

    # Gaps

    async def _look_for_gap(
        self, redis: RedisConnection, source: _Source, *, anew: bool = False
    ) -> None:
        """Find out whether what we would read next is what came next; ``anew``, whether this is
        the stream that was read over another link.
        """
        cursor = source.cursor
        assert cursor is not None
        is_there = not anew or await self._is_tail_there(redis, source)
        reply = await redis.ask("XINFO", "STREAM", source.name, patience=PATIENCE)
        info = read_info(reply)
        source.looked_at, source.is_sure = trio.current_time(), True
        last, added = info.last, info.added
        source.is_counted = added is not None
        first = info.first or _after(last)  # where the next one will stand, if there is none
        # All before the first entry was taken away: as much as has been read, if all is well.
        away = None if added is None else added - info.length
        if last < cursor:
            # A Redis that came back without what it had. What it still holds was read before.
            await self._gap(source, "stream was recreated", since=_after(cursor), end=last)
            source.entries = added
        elif not is_there and first <= cursor and read_deleted(reply) < cursor:
            # Entries before ours are there and ours is not. Others may stand before the cursor,
            # as many as there were, if the clock is behind.
            await self._gap(source, "another stream", since=_after(cursor), end=cursor)
            source.entries = None
        elif away is None:
            await self._look_without_counts(source, first, last)
        elif last == cursor:
            if source.entries not in (added, None):
                await self._gap(source, "entries were taken away unread", since=cursor, end=cursor)
            source.entries = added
        elif first <= cursor or away == source.entries:
            pass
        elif source.entries is not None and away < source.entries:
            await self._gap(source, "stream was recreated", since=_after(cursor), end=cursor)
            source.entries = away
        else:
            end = _before(first)
            await self._gap(source, "stream was trimmed beyond the cursor", since=end, end=end)
            source.entries = away
        source.proven = source.cursor or START

    async def _look_without_counts(self, source: _Source, first: Position, last: Position) -> None:
        """Before Redis 7 nothing tells how many entries there were. All have been read if the
        stream still begins at the place of the last look or before it, or if nothing was added.
        """
        cursor = source.cursor or START
        whole = first <= _after(source.proven) or last == source.proven
        if not whole and (source.proven != START or first != source.first_read):
            end = cursor if first <= cursor or last == cursor else _before(first)
            await self._gap(source, "entries may have been trimmed unread", since=end, end=end)

    async def _is_tail_there(self, redis: RedisConnection, source: _Source) -> bool:
        """Whether the last entry that was read still stands where it stood, if that is known."""
        if source.tail is None:
            return True
        where = entry_id(source.tail.position)
        reply = await redis.call(
            "XREVRANGE", source.name, where, where, "COUNT", 1, patience=PATIENCE
        )
        return read_entries(reply) == [source.tail]

    async def _gap(self, source: _Source, reason: str, *, since: Position, end: Position) -> None:
        self.gaps += 1
        self._throttled_log.error(
            "gap", kind=reason, stream=source.name, cursor=source.cursor_id, reason=reason
        )
        await self._inlet.gap(source.stream, since=since, end=end)
        source.set_back(end)


def _before(position: Position) -> Position:
    milliseconds, sequence = position
    return Position((milliseconds, sequence - 1) if sequence else (milliseconds - 1, 2**64 - 1))


def _after(position: Position) -> Position:
    milliseconds, sequence = position
    return Position((milliseconds, sequence + 1) if sequence < 2**64 - 1 else (milliseconds + 1, 0))
