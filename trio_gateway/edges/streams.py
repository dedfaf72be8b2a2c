"""The streams source: every entry, read by every process from its own cursor (plain XREAD)."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NoReturn

import hiredis
import structlog
import trio

from ..core.events import InvalidEvent, parse_event
from ..core.limits import LogLimit
from ..core.positions import START, Position, Stream, read_position, tag
from ..core.resilience import Breaker
from ..core.routing import UNKNOWN, Route
from ..runtime.dispatch import Dispatch
from ..runtime.history import History
from ..runtime.intake import Intake
from ..runtime.queue import EventQueue
from ..runtime.supervision import Lost
from .resp import Address, RedisConnection, open_redis

log = structlog.get_logger()

BLOCK: Final = 2.0  # seconds that Redis waits for news before it says that there are none
PATIENCE: Final = 2.0  # seconds beyond that before the link counts as lost
COUNT: Final = 500  # entries in one reply
_PAGE: Final = 1000  # entries in one reply while warming
_FIELD: Final = b"data"

_Entry = tuple[bytes, Sequence[bytes] | None]


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
        return _entry_id(self.cursor or START)


class Streams:
    """Reads streams from their end, and after a lost connection from where it was.

    A fresh process warms its history from what the streams still hold. ``on_gap`` is called when
    entries were lost unread: every client has to be told.
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
        on_gap: Callable[[], None],
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
        self._on_gap = on_gap
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
                self.connected = True
                self._breaker.succeeded()
                log.info("reading", source="stream", cursors=self.cursors)
                while True:
                    await self._read(redis)
        finally:
            self.connected = False

    async def _read(self, redis: RedisConnection) -> None:
        reply = await _ask(
            redis, "XREAD", "COUNT", COUNT, "BLOCK", int(BLOCK * 1000), "STREAMS",
            *(source.name for source in self._sources),
            *(source.cursor_id for source in self._sources),
            patience=BLOCK + PATIENCE,
        )  # fmt: skip
        for name, entries in reply or ():
            source = next(each for each in self._sources if each.name == name.decode())
            is_event = True
            for entry_id, fields in entries:
                position = read_position(entry_id.decode())
                is_event = await self._hear(source, position, fields)
                source.cursor = position
                source.entries += 1
                source.is_sure = False
            if not is_event:  # no event moves the history's end to here
                await self._queue.wait_idle()
                self._history.pass_by(source.stream, position)
            if len(entries) == COUNT:  # we lag: is it trimmed faster than we read?
                await self._look_for_gap(redis, source)
        now = trio.current_time()
        for source in self._sources:
            if not source.is_sure and (not reply or source.looked_at + BLOCK < now):
                await self._look_for_gap(redis, source)

    async def _hear(
        self, source: _Source, position: Position, fields: Sequence[bytes] | None
    ) -> bool:
        """Whether it is an event: then it is on its way."""
        entry_id = _entry_id(position)
        payload = _payload(fields)
        if payload is None:
            self._intake.received["stream"] += 1
            self._intake.refuse(
                "no_data", "entry has no field data",
                source="stream", channel=source.name, entry_id=entry_id,
            )  # fmt: skip
            return False
        event = self._intake.parse(payload, source="stream", channel=source.name, entry_id=entry_id)
        if event is not None:
            event.stand(source.stream, position, durable=self._is_durable(event.type))
            await self._queue.put(event)
        return event is not None

    def _is_durable(self, kind: str) -> bool:
        return self._routes.get(kind, UNKNOWN).durable

    # The first time

    async def _begin(self, redis: RedisConnection, source: _Source) -> None:
        """Stand at the stream's end, with the history of what it still holds."""
        info = await _info(redis, source.name)
        entries: list[_Entry] = []
        whole = True
        if info is not None:
            entries, whole = await self._past(redis, source.name, info["last-generated-id"])
            whole = whole and info["entries-added"] in (info["length"], None)
        since = read_position(entries[0][0].decode()) if entries else _position(info)
        self._history.begin(source.stream, since, whole=whole)
        for n, (entry_id, fields) in enumerate(entries):
            self._remember(source, read_position(entry_id.decode()), fields)
            if n % 100 == 0:
                await trio.lowlevel.checkpoint()
        source.cursor = _position(info)
        source.entries = 0 if info is None else info["entries-added"] or 0
        self._history.pass_by(source.stream, source.cursor)
        log.info("history warmed", stream=source.name, entries=len(entries))

    async def _past(
        self, redis: RedisConnection, name: str, last: bytes
    ) -> tuple[list[_Entry], bool]:
        """The entries up to ``last`` that the history has room for, the oldest first, and
        whether they are all that the stream holds.
        """
        found: list[_Entry] = []
        size, end = 0, last.decode()
        too_old = (self._wall_clock() - self._history.age) * 1000
        while True:
            page = await _ask(redis, "XREVRANGE", name, end, "-", "COUNT", _PAGE)
            for entry in page:
                size += sum(map(len, entry[1] or ()))
                if (
                    len(found) >= self._history.most_events
                    or size > self._history.most_bytes
                    or read_position(entry[0].decode())[0] < too_old
                ):
                    return found[::-1], False
                found.append(entry)
            if len(page) < _PAGE:
                return found[::-1], True
            end = f"({page[-1][0].decode()}"

    def _remember(
        self, source: _Source, position: Position, fields: Sequence[bytes] | None
    ) -> None:
        if (payload := _payload(fields)) is None:
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
        info = await _info(redis, source.name)
        source.looked_at, source.is_sure = trio.current_time(), True
        last = _position(info)
        first = _first(info)
        added = 0 if info is None else info["entries-added"]
        # All before the first entry was taken away: as much as has been read, if all is well.
        away = None if info is None or added is None else added - info["length"]
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


def _payload(fields: Sequence[bytes] | None) -> bytes | None:
    if not fields:
        return None
    return dict(zip(fields[::2], fields[1::2], strict=True)).get(_FIELD)


def _entry_id(position: Position) -> str:
    return f"{position[0]}-{position[1]}"


def _position(info: "dict[str, Any] | None") -> Position:
    return START if info is None else read_position(info["last-generated-id"].decode())


def _first(info: "dict[str, Any] | None") -> Position:
    """Where the oldest entry stands; where the next one will, if there is none."""
    if info is None or info["first-entry"] is None:
        return _after(_position(info))
    return read_position(info["first-entry"][0].decode())


def _before(position: Position) -> Position:
    milliseconds, sequence = position
    return Position((milliseconds, sequence - 1) if sequence else (milliseconds - 1, 2**64 - 1))


def _after(position: Position) -> Position:
    milliseconds, sequence = position
    return Position((milliseconds, sequence + 1) if sequence < 2**64 - 1 else (milliseconds + 1, 0))


async def _info(redis: RedisConnection, name: str) -> dict[str, Any] | None:
    """What Redis says of a stream; None if there is none."""
    reply = await _ask(redis, "XINFO", "STREAM", name, may_fail=True)
    if isinstance(reply, hiredis.ReplyError):
        if "no such key" in str(reply):
            return None
        raise Lost(f"XINFO STREAM failed: {str(reply).split(' ', 1)[0]}")
    info = {key.decode(): value for key, value in zip(reply[::2], reply[1::2], strict=True)}
    info.setdefault("entries-added", None)  # before Redis 7: what is taken away goes unnoticed
    return info


async def _ask(
    redis: RedisConnection,
    *words: str | int,
    patience: float = PATIENCE,
    may_fail: bool = False,
) -> Any:
    with trio.move_on_after(patience) as scope:
        reply = await (redis.ask(*words) if may_fail else redis.call(*words))
    if scope.cancelled_caught:
        raise Lost(f"no answer to {words[0]}")
    return reply
