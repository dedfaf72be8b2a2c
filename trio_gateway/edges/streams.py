"""The streams source: every entry, read by every process from its own cursor (plain XREAD)."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NoReturn

import structlog
import trio

from ..core.events import InvalidEvent, parse_event
from ..core.limits import LogLimit
from ..core.positions import START, Position, Stream, tag
from ..core.resilience import Breaker
from ..core.routing import UNKNOWN, Route
from ..redis_url import Address
from ..runtime.dispatch import Dispatch
from ..runtime.history import History
from ..runtime.intake import Intake
from ..runtime.queue import EventQueue
from ..runtime.supervision import Demoted, Lost
from .resp import RedisConnection, open_redis
from .stream_replies import Entry, entry_id, read_entries, read_info, read_news, read_time

log = structlog.get_logger()

BLOCK: Final = 2.0  # seconds that Redis waits for news before it says that there are none
PATIENCE: Final = 2.0  # seconds beyond that before the link counts as lost
COUNT: Final = 500  # entries in one reply
_PAGE: Final = 1000  # entries in one reply while warming


@dataclass(slots=True)
class _Source:
    """One stream, and how far it has been read."""

    name: str
    stream: Stream
    cursor: Position | None = None  # None before it is read the first time
    # How many entries the stream had when that one was its last: Redis counts them for ever, so
    # that entries which were trimmed away unread show.
    entries: int = 0
    looked_at: float = 0.0  # when that was last compared with what Redis says
    is_sure: bool = True  # nothing was read since

    @property
    def cursor_id(self) -> str:
        return entry_id(self.cursor or START)


class Streams:
    """Reads streams from their end, and after a lost connection from where it was.

    A fresh process warms its history from what the streams still hold. ``on_begin`` is called then,
    with how far Redis' clock is ahead of Trio's: clients may have come before. ``on_gap`` is called
    when entries were lost unread: every client has to be told. ``on_demoted`` is called when the
    server on the other end of a link has become a replica.
    """

    def __init__(
        self,
        address: Address,
        streams: Sequence[str],
        intake: Intake,
        queue: EventQueue,
        breaker: Breaker,
        *,
        routes: Mapping[str, Route],
        dispatch: Dispatch,
        history: History,
        on_begin: Callable[[Stream, float | None], None],
        on_gap: Callable[[], None],
        on_demoted: Callable[[], None] = lambda: None,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._address = address
        self._sources = [_Source(name, tag(name)) for name in dict.fromkeys(streams)]
        self._intake = intake
        self._queue = queue
        self._breaker = breaker
        self._routes = routes
        self._dispatch = dispatch
        self._history = history
        history.expected.update(source.stream for source in self._sources)
        self._on_begin = on_begin
        self._on_gap = on_gap
        self._on_demoted = on_demoted
        self._role_checked_at = 0.0
        self._wall_clock = wall_clock
        self.connected = False
        self.gaps = 0
        self._log_limit = LogLimit()

    @property
    def cursors(self) -> dict[str, str]:
        """The last entry read of each stream."""
        return {source.name: source.cursor_id for source in self._sources}

    async def run(self) -> NoReturn:
        """Read until the link is :exc:`Lost`."""
        try:
            async with open_redis(self._address) as redis:
                for source in self._sources:
                    if source.cursor is None:
                        await self._begin(redis, source)
                    else:
                        await self._look_for_gap(redis, source)
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
            is_event = True
            for entry in entries:
                if entry.position <= (source.cursor or START):
                    raise Lost("an answer to an earlier question")  # its entries would come twice
                is_event = await self._hear(source, entry)
                source.cursor = entry.position
                source.entries += 1
                source.is_sure = False
            if not is_event:  # no event moves the history's end to here
                await self._queue.wait_idle()
                self._history.pass_by(source.stream, entry.position)
            if len(entries) == COUNT:  # we lag: is it trimmed faster than we read?
                await self._look_for_gap(redis, source)
        now = trio.current_time()
        for source in self._sources:
            if not source.is_sure and (not news or source.looked_at + BLOCK < now):
                await self._look_for_gap(redis, source)

    def _named(self, name: str) -> _Source:
        for source in self._sources:
            if source.name == name:
                return source
        raise Lost("a stream that was not asked for")

    async def _hear(self, source: _Source, entry: Entry) -> bool:
        """Whether it is an event: then it is on its way."""
        position, payload = entry
        where = entry_id(position)
        if payload is None:
            self._intake.received["stream"] += 1
            self._intake.refuse(
                "no_data", "entry has no field data",
                source="stream", channel=source.name, entry_id=where,
            )  # fmt: skip
            return False
        event = self._intake.parse(payload, source="stream", channel=source.name, entry_id=where)
        if event is not None:
            event.stand(source.stream, position, durable=self._is_durable(event.type))
            await self._queue.put(event)
        return event is not None

    def _is_durable(self, kind: str) -> bool:
        return self._routes.get(kind, UNKNOWN).durable

    # The first time

    async def _begin(self, redis: RedisConnection, source: _Source) -> None:
        """Stand at the stream's end, with the history of what it still holds."""
        now = read_time(await redis.ask("TIME", patience=PATIENCE))
        ahead = now - trio.current_time() if now is not None else None
        info = read_info(await redis.ask("XINFO", "STREAM", source.name, patience=PATIENCE))
        entries, unread = await self._past(redis, source.name, info.last)
        whole = unread is None and info.added in (info.length, None)
        since = unread or (entries[0].position if entries else info.last)
        self._history.begin(source.stream, since, whole=whole)
        for n, entry in enumerate(entries):
            self._remember(source, entry)
            if n % 100 == 0:
                await trio.lowlevel.checkpoint()
        source.cursor = info.last
        source.entries = info.added or 0
        self._history.pass_by(source.stream, source.cursor)
        if entries or not whole:
            self._on_begin(source.stream, ahead)
        log.info("history warmed", stream=source.name, entries=len(entries))

    async def _past(
        self, redis: RedisConnection, name: str, last: Position
    ) -> tuple[list[Entry], Position | None]:
        """The entries up to ``last`` that the history has room for, the oldest first, and where
        the one before them stands, if there is one.
        """
        found: list[Entry] = []
        size, end = 0, entry_id(last)
        too_old = (self._wall_clock() - self._history.age) * 1000
        while True:
            reply = await redis.call("XREVRANGE", name, end, "-", "COUNT", _PAGE, patience=PATIENCE)
            page = read_entries(reply)
            for entry in page:
                size += len(entry.payload or b"")
                if (
                    len(found) >= self._history.most_events
                    or size > self._history.most_bytes
                    or entry.position[0] < too_old
                ):
                    return found[::-1], entry.position
                found.append(entry)
            if len(page) < _PAGE:
                return found[::-1], None
            end = f"({entry_id(page[-1].position)}"

    def _remember(self, source: _Source, entry: Entry) -> None:
        position, payload = entry
        if payload is None:
            return
        ago = max(0.0, self._wall_clock() - position[0] / 1000)  # clocks differ
        try:
            event = parse_event(payload, channel=source.name, heard_at=trio.current_time() - ago)
        except InvalidEvent:
            return  # whoever read it live has counted it
        event.stand(source.stream, position, durable=self._is_durable(event.type))
        self._dispatch.remember(event)

    # Gaps

    async def _look_for_gap(self, redis: RedisConnection, source: _Source) -> None:
        """Find out whether what we would read next is what came next."""
        cursor = source.cursor
        assert cursor is not None
        info = read_info(await redis.ask("XINFO", "STREAM", source.name, patience=PATIENCE))
        source.looked_at, source.is_sure = trio.current_time(), True
        last, added = info.last, info.added
        first = info.first or _after(last)  # where the next one will stand, if there is none
        # All before the first entry was taken away: as much as has been read, if all is well.
        away = None if added is None else added - info.length
        if last < cursor:
            # A Redis that came back without what it had. What it still holds was read before.
            await self._gap(source, "stream was recreated", since=_after(cursor), end=last)
            source.entries = added or 0
        elif last == cursor:
            if added is not None and added != source.entries:
                await self._gap(source, "entries were taken away unread", since=cursor, end=cursor)
            source.entries = added or 0
        elif away is None or first <= cursor or away == source.entries:
            pass
        elif away < source.entries:
            await self._gap(source, "stream was recreated", since=_after(cursor), end=cursor)
            source.entries = away
        else:
            end = _before(first)
            await self._gap(source, "stream was trimmed beyond the cursor", since=end, end=end)
            source.entries = away

    async def _gap(self, source: _Source, reason: str, *, since: Position, end: Position) -> None:
        self.gaps += 1
        if (held_back := self._log_limit.allows(reason, trio.current_time())) is not None:
            log.error(
                "gap",
                stream=source.name,
                cursor=source.cursor_id,
                reason=reason,
                held_back=held_back,
            )
        await self._queue.wait_idle()  # what was read before the gap comes before its notice
        source.cursor = end
        self._history.restart(source.stream, since=since, end=end)
        self._on_gap()


def _before(position: Position) -> Position:
    milliseconds, sequence = position
    return Position((milliseconds, sequence - 1) if sequence else (milliseconds - 1, 2**64 - 1))


def _after(position: Position) -> Position:
    milliseconds, sequence = position
    return Position((milliseconds, sequence + 1) if sequence < 2**64 - 1 else (milliseconds + 1, 0))
