"""Reading streams on one connection: entries in order, none twice, and gaps reported."""

import math
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from itertools import groupby
from operator import itemgetter
from typing import Final

import structlog
import trio

from ..core.event_ids import START, Position, Stream, entry_id, tag
from ..runtime.source import Entry, Lost, Sink
from ..runtime.supervision import ConnectionLost
from ..runtime.throttled_log import ThrottledLog
from .connection import RedisConnection, no_error
from .stream_cursor import StreamCursor
from .stream_gaps import Check, Gap, check
from .stream_past import read_past
from .stream_replies import error_of_key, read_entries, read_info, read_news, read_time
from .unreadable import Unreadable

log = structlog.get_logger()

BLOCK: Final = 2.0  # seconds that Redis waits for new entries before it replies that there are none
REPLY_TIMEOUT: Final = 2.0  # seconds beyond that until the connection counts as lost
COUNT: Final = 500  # entries of each stream in one reply
_CHECKED_TOGETHER: Final = 64  # streams
_PACE: Final = 0.003  # seconds from one read to the next while more than _FEW entries come in it
_FEW: Final = 8

_News = Sequence[tuple[StreamCursor, Sequence[Entry]]]


class StreamReader:
    """Reads the streams of ``cursors`` on one connection, and moves the cursors.

    ``cursors`` and ``unreadable`` are shared with the reader before it, which reads until
    :meth:`stop`, and with the one that follows. ``ranks`` and ``old_streams`` are those of
    :class:`.core.shards.Sharding`.
    """

    def __init__(
        self,
        redis: RedisConnection,
        sink: Sink,
        cursors: dict[str, StreamCursor],
        unreadable: Unreadable,
        *,
        ranks: Mapping[Stream, int],
        old_streams: Collection[Stream],
        on_gap: Callable[[], None],
    ) -> None:
        self._redis = redis
        self._sink = sink
        self._cursors = cursors
        self._unreadable = unreadable
        self._ranks = ranks
        self._old_streams = old_streams
        self._throttled_log = ThrottledLog(log)
        self._stopped = trio.Event()
        self._is_waiting = False  # for news
        self._ended = trio.Event()
        self._on_gap = on_gap
        self._counted_since, self._counted = -_PACE, 0  # entries read in the last while
        self.reading: Collection[str] = ()  # the names in its last XREAD

    async def look_ahead(self, names: Sequence[str]) -> None:
        """Let the sink look at what is new in streams that are about to be begun."""
        if (limits := self._sink.look_ahead_limits()) is None:
            return
        for name in names:
            reply = await self._redis.ask("XINFO", "STREAM", name, timeout=REPLY_TIMEOUT)
            if self._unreadable.note(name, "XINFO", reply):
                continue
            info = read_info(reply, name)
            past = await read_past(self._redis, name, info, limits, timeout=REPLY_TIMEOUT)
            await self._sink.look_ahead(tag(name), name, past.entries)

    async def begin(self, name: str) -> None:
        """Begin a stream at its end, with the history of what it still holds.

        One that can't be read is noted as such and not begun.
        """
        redis = self._redis
        now = read_time(await redis.ask("TIME", timeout=REPLY_TIMEOUT))
        ahead = now - trio.current_time() if now is not None else None
        reply = await redis.ask("XINFO", "STREAM", name, timeout=REPLY_TIMEOUT)
        if self._unreadable.note(name, "XINFO", reply):
            return
        info = read_info(reply, name)
        past = await read_past(redis, name, info, self._sink.past_limits(), timeout=REPLY_TIMEOUT)
        stream = tag(name)
        await self._sink.begin(stream, name, past, ahead)
        cursor = self._cursors[name] = StreamCursor(name, stream, info, past.entries)
        await self._learn_tails([cursor])
        if not cursor.is_counted:
            log.warning("Redis before 7 counts no entries: gaps are reported on suspicion")
        log.info("history warmed", stream=name, entries=len(past.entries))

    async def run_until_stopped(self, read: Callable[[], Awaitable[None]]) -> None:
        """Call ``read`` again and again, until :meth:`stop`."""
        try:
            while not self.stopping:
                await read()
        except ConnectionLost:
            if not self.stopping:  # else stop() has closed it
                raise
        finally:
            self._ended.set()

    async def idle(self) -> None:
        """Wait for as long as Redis would wait for news."""
        with trio.move_on_after(BLOCK):
            await self._stopped.wait()

    async def stop(self) -> None:
        """End the reader, at once if it waits for news; return when it reads no more."""
        self._stopped.set()
        if self._is_waiting:  # for news, and not in the middle of taking them
            await self._redis.close()
        await self._ended.wait()

    @property
    def stopping(self) -> bool:
        """Whether :meth:`stop` was called. The connection is not to be used any more then."""
        return self._stopped.is_set()

    async def read(self, *, block: bool = True) -> None:
        """Read what is new in all streams, and look for gaps."""
        if self.stopping:
            return
        names = self.reading = [name for name in self._cursors if name not in self._unreadable]
        cursors = [self._cursors[name] for name in names]
        if not names:
            if block:
                await self.idle()
            return
        waiting = ("BLOCK", str(int(BLOCK * 1000))) if block else ()
        self._is_waiting = True
        reply = await self._redis.ask(
            "XREAD", "COUNT", COUNT, *waiting, "STREAMS",
            *names, *[cursor.entry_id for cursor in cursors],
            timeout=BLOCK + REPLY_TIMEOUT,
        )  # fmt: skip
        self._is_waiting = False
        if error_of_key(reply) is not None and await self._look_for_unreadable(names):
            return
        no_error(reply, "XREAD")
        news: list[tuple[StreamCursor, Sequence[Entry]]] = []
        for name, entries in read_news(reply):
            if (cursor := self._cursors.get(name)) is None:
                raise ConnectionLost("a stream that was not asked for")
            news.append((cursor, entries))
        for cursor, run in self._in_order(news):
            await self._take(cursor, run)
        await self._pace(news)
        # A full reply says that we lag: the stream may be trimmed faster than we read.
        lagging = {c.name for c, entries in news if len(entries) == COUNT or not c.is_counted}
        due = trio.current_time() - BLOCK if news else math.inf
        await self.check(
            c for c in cursors
            if c.name in lagging or (not c.is_checked and c.checked_at < due)
        )  # fmt: skip

    async def _look_for_unreadable(self, names: Sequence[str]) -> bool:
        """Find out which of these streams can't be read; return whether there are any.

        An error of one stream is Redis' reply for all that it was asked for at once.
        """
        replies = await self._redis.ask_all(
            [("XREAD", "COUNT", 1, "STREAMS", name, "$") for name in names],
            timeout=REPLY_TIMEOUT,
        )
        found = [
            self._unreadable.note(name, "XREAD", reply)
            for name, reply in zip(names, replies, strict=True)
        ]
        return any(found)

    async def retry_unreadable(self) -> None:
        """Look again at the streams that can't be read. One that was begun is read on if it can."""
        back: list[str] = []
        for name in list(self._unreadable):
            commands = (("XINFO", "STREAM", name), ("XREAD", "COUNT", 1, "STREAMS", name, "$"))
            replies = await self._redis.ask_all(commands, timeout=REPLY_TIMEOUT)
            if any(error_of_key(reply) is not None for reply in replies):
                continue
            no_error(replies[1], "XREAD")
            back.append(name)
        for name in back:
            self._unreadable.is_back(name)
        cursors = [self._cursors[name] for name in back if name in self._cursors]
        await self.check(cursors, is_new_connection=True)
        if self._ranks and cursors:
            # Later entries of the tenants' other streams were delivered, so an id of those does
            # not say any more where a client was in these.
            now = Position((await self._now(), 0))
            await self._gap([(each, Gap("out of order", now, each.position)) for each in cursors])

    async def _now(self) -> int:
        """Redis' unix time in milliseconds; ours, if the user has no right to ask."""
        now = read_time(await self._redis.ask("TIME", timeout=REPLY_TIMEOUT))
        return int((time.time() if now is None else now) * 1000)

    async def _pace(self, news: _News) -> None:
        """Wait before the next read while many entries come: reading them one by one costs more.

        A full reply is followed by the next read at once. So is one that brings few.
        """
        now = trio.current_time()
        if now >= self._counted_since + _PACE:
            self._counted_since, self._counted = now, 0
        self._counted += sum(len(entries) for _, entries in news)
        if self._counted > _FEW and all(len(entries) < COUNT for _, entries in news):
            await trio.sleep_until(self._counted_since + _PACE)

    def _in_order(self, news: _News) -> _News:
        """One reply's entries as they are delivered.

        While events of a tenant can be in an old stream and in a new one, entries of all streams
        are taken in the order of their ids, in which clients resume. What could be preceded by an
        entry that did not fit into the reply is left for the next one.
        """
        if len(news) < 2 or not any(cursor.stream in self._old_streams for cursor, _ in news):
            return news
        return merge(news, self._ranks)

    async def _take(self, cursor: StreamCursor, entries: Sequence[Entry]) -> None:
        """Hand on entries of one stream, the oldest first."""
        last = cursor.position
        for entry in entries:
            if entry.position <= last:  # else its entries would be delivered twice
                raise ConnectionLost("an answer to an earlier question")
            last = entry.position
        if not entries or not cursor.may_repeat(entries[0].position):
            await self._sink.take(cursor.stream, cursor.name, entries, cursor.passed)
            return
        repeated: Position | None = None
        for entry in entries:
            if cursor.has_read(entry.position):
                # No id is delivered twice, and this may be another event with the same id.
                repeated = entry.position
                cursor.passed([entry])
            else:
                await self._sink.take(cursor.stream, cursor.name, [entry], cursor.passed)
        if repeated is not None:
            here = cursor.position
            await self._sink.advance(cursor.stream, here)
            await self._gap([(cursor, Gap("ids came a second time", since=here, end=here))])

    async def check(
        self, cursors: Iterable[StreamCursor], *, is_new_connection: bool = False
    ) -> None:
        """Compare cursors with their streams, and report all gaps at once.

        On a new connection this also checks that it leads to the same streams as before.
        """
        checked: list[tuple[StreamCursor, Check]] = []
        for some in _parts([c for c in cursors if c.name not in self._unreadable]):
            lost_tails = await self._lost_tails(some) if is_new_connection else ()
            replies = await self._redis.ask_all(
                [("XINFO", "STREAM", cursor.name) for cursor in some], timeout=REPLY_TIMEOUT
            )
            for cursor, reply in zip(some, replies, strict=True):
                if self._unreadable.note(cursor.name, "XINFO", reply):
                    continue
                info = read_info(reply, cursor.name)
                cursor.checked_at, cursor.is_checked = trio.current_time(), True
                cursor.is_counted = info.added is not None
                is_tail_there = cursor.name not in lost_tails
                checked.append((cursor, check(cursor, info, is_tail_there=is_tail_there)))
        await self._gap([(cursor, each.gap) for cursor, each in checked if each.gap is not None])
        for cursor, each in checked:
            cursor.read_count = each.read_count
            cursor.proven = cursor.position
        for some in _parts([cursor for cursor, _ in checked]):
            await self._learn_tails(some)

    async def _lost_tails(self, cursors: Sequence[StreamCursor]) -> set[str]:
        """The streams in which the last entry that was read is known and not in its place."""
        known = [(cursor, cursor.tail) for cursor in cursors if cursor.tail is not None]
        if not known:
            return set()
        places = [(cursor.name, entry_id(tail.position)) for cursor, tail in known]
        replies = await self._redis.ask_all(
            [("XREVRANGE", name, place, place, "COUNT", 1) for name, place in places],
            timeout=REPLY_TIMEOUT,
        )
        return {
            cursor.name
            for (cursor, tail), reply in zip(known, replies, strict=True)
            if not self._unreadable.note(cursor.name, "XREVRANGE", reply)
            and read_entries(no_error(reply, "XREVRANGE")) != [tail]
        }

    async def _learn_tails(self, cursors: Iterable[StreamCursor]) -> None:
        """Look up the entries at cursors that did not read them: a new primary may lack them."""
        unknown = [c for c in cursors if c.tail is None and c.position != START]
        if not unknown:
            return
        places = [(cursor, cursor.entry_id) for cursor in unknown]
        replies = await self._redis.ask_all(
            [("XREVRANGE", cursor.name, place, place, "COUNT", 1) for cursor, place in places],
            timeout=REPLY_TIMEOUT,
        )
        for cursor, reply in zip(unknown, replies, strict=True):
            if not self._unreadable.note(cursor.name, "XREVRANGE", reply):
                cursor.tail = next(iter(read_entries(no_error(reply, "XREVRANGE"))), None)

    async def _gap(self, gaps: Sequence[tuple[StreamCursor, Gap]]) -> None:
        """Report gaps: each client is told once of all of them."""
        for cursor, gap in gaps:
            self._on_gap()
            self._throttled_log.error(
                "gap",
                kind=gap.reason,
                stream=cursor.name,
                cursor=cursor.entry_id,
                reason=gap.reason,
            )
        if gaps:
            await self._sink.gap([Lost(cursor.stream, gap.since, gap.end) for cursor, gap in gaps])
        for cursor, gap in gaps:  # in the same step: a cancelled notice leaves the cursors
            cursor.set_back(gap.end)


def _parts(cursors: Sequence[StreamCursor]) -> list[Sequence[StreamCursor]]:
    return [cursors[n : n + _CHECKED_TOGETHER] for n in range(0, len(cursors), _CHECKED_TOGETHER)]


def merge(news: _News, ranks: Mapping[Stream, int], count: int = COUNT) -> _News:
    """The entries of one reply in the order of time, as runs of entries of one stream.

    Entries of one millisecond are in the order of the ranks. ``count`` is how many entries of a
    stream fit into a reply: behind the last one of a full reply, entries of others wait.
    """
    end = min(
        (_order(entries[-1], ranks[cursor.stream]) for cursor, entries in news
         if len(entries) >= count),
        default=None,
    )  # fmt: skip
    found = [
        (order, cursor, entry)
        for cursor, entries in news
        for entry in entries
        if (order := _order(entry, ranks[cursor.stream])) and (end is None or order <= end)
    ]
    found.sort(key=itemgetter(0))
    return [
        (run[0][1], [entry for _, _, entry in run])
        for run in (list(group) for _, group in groupby(found, lambda each: each[1].stream))
    ]


def _order(entry: Entry, rank: int) -> tuple[int, int, int]:
    milliseconds, sequence = entry.position
    return milliseconds, rank, sequence
