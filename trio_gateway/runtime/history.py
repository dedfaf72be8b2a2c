"""History: recent durable events in memory, by audience, so that replay touches no Redis."""

import math
from collections import deque
from collections.abc import Collection, Iterable
from typing import NamedTuple

import trio

from ..core.audiences import Audience
from ..core.events import Event
from ..core.positions import START, Cursor, Position, Stream


class Kept(NamedTuple):
    """A durable event as clients get it, and where it stands."""

    stream: Stream
    position: Position
    frame: bytes
    audiences: tuple[Audience, ...]
    heard_before: bool  # a Pub/Sub copy of it was delivered live before it came


class History:
    """The durable events of the last while, bounded by count, bytes and age (seconds).

    A replay costs what was missed, not what happened: each audience has its own list, read from
    its end. ``since`` is the place up to which events may have been forgotten: whoever has seen
    less can't be told what it missed.
    """

    def __init__(self, *, events: int = 50_000, size: int = 67_108_864, age: float = 3600) -> None:
        self.most_events = events
        self.most_bytes = size
        self.age = age
        self._kept: deque[Kept] = deque()
        self._by_audience: dict[Audience, deque[Kept]] = {}
        self._grown = trio.Event()
        self.bytes = 0
        self.since: dict[Stream, Position] = {}
        self.end: Cursor = {}  # the present place: replaced, never changed, so it can be shared

    def __len__(self) -> int:
        return len(self._kept)

    def begin(self, stream: Stream, position: Position) -> None:
        """Nothing before this place is known of the stream: there the history begins."""
        self.since[stream] = position
        self.end = {**self.end, stream: max(self.end.get(stream, START), position)}

    def restart(self, stream: Stream, position: Position) -> None:
        """Entries behind this place were lost: who has seen no more can't be told what followed."""
        for kept in [kept for kept in self._kept if kept.stream == stream]:
            self._forget(kept)
        self.since[stream] = Position((position[0], position[1] + 1))
        self.end = {**self.end, stream: position}

    def add(
        self,
        event: Event,
        audiences: Collection[Audience],
        *,
        now: float,
        heard_before: bool = False,
    ) -> None:
        """Keep a durable event, the newest of its stream. ``now`` is unix time in seconds."""
        assert event.stream is not None
        assert event.position is not None
        stream, position = event.stream, event.position
        kept = Kept(stream, position, event.frame, tuple(audiences), heard_before)
        self._kept.append(kept)
        self.bytes += len(kept.frame)
        for audience in kept.audiences:
            if (mine := self._by_audience.get(audience)) is None:
                mine = self._by_audience[audience] = deque()
            mine.append(kept)
        self.pass_by(stream, position)
        self.trim(now)

    def pass_by(self, stream: Stream, position: Position) -> None:
        """The stream has been read up to here."""
        self.end = {**self.end, stream: position}
        self._grown.set()

    def trim(self, now: float) -> None:
        """Forget what is over the bounds."""
        oldest = (now - self.age) * 1000
        while self._kept and (
            len(self._kept) > self.most_events
            or self.bytes > self.most_bytes
            or self._kept[0].position[0] < oldest
        ):
            kept = self._kept[0]
            self.since[kept.stream] = max(self.since.get(kept.stream, START), kept.position)
            self._forget(kept)

    def covers(self, cursor: Cursor) -> bool:
        """Whether everything after this place is still known, as far as it has been read."""
        return bool(cursor) and all(
            stream in self.since and (self.since[stream] == START or self.since[stream] <= position)
            for stream, position in cursor.items()
        )

    def is_ahead(self, cursor: Cursor) -> bool:
        """Whether this place lies beyond what has been read: another process was quicker."""
        return any(self.end.get(s, START) < position for s, position in cursor.items())

    async def wait_for(self, cursor: Cursor) -> None:
        """Wait until it has been read that far."""
        while self.is_ahead(cursor):
            self._grown = trio.Event()
            await self._grown.wait()

    def missed(self, cursor: Cursor, audiences: Iterable[Audience]) -> list[Kept]:
        """What these audiences heard after this place, each event once, in order.

        Only of the streams that the cursor names: a tenant's events live in one of them.
        """
        found: dict[int, Kept] = {}
        several = len(self.end) > 1
        for audience in audiences:
            for kept in reversed(self._by_audience.get(audience, ())):
                if (seen := cursor.get(kept.stream)) is not None and seen < kept.position:
                    found[id(kept)] = kept
                elif not several:  # a stream's own are in order
                    break
        return sorted(found.values(), key=_order)

    def since_time(self, moment: float, audiences: Iterable[Audience]) -> tuple[list[Kept], bool]:
        """What these audiences heard since a unix time, when the events entered Redis, and
        whether that is all.
        """
        just_before = Position((math.floor(moment * 1000), -1))
        cursor = dict.fromkeys(self.end, just_before)
        return self.missed(cursor, audiences), self.covers(cursor)

    def _forget(self, kept: Kept) -> None:
        """The oldest of all is the oldest of its audiences, too: found at the head of each."""
        self._kept.remove(kept)
        self.bytes -= len(kept.frame)
        for audience in kept.audiences:
            mine = self._by_audience[audience]
            mine.remove(kept)
            if not mine:
                del self._by_audience[audience]


def _order(kept: Kept) -> tuple[Position, Stream]:
    return kept.position, kept.stream
