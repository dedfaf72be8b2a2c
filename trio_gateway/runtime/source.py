"""What reads durable events, and what takes them: the interfaces between an engine and the gateway.

A *shard* is one ordered sequence of entries. Its name is the engine's; :func:`.event_ids.tag`
makes of it the tag that goes into event ids. Positions are two integers that grow within a shard.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import NamedTuple, NoReturn, Protocol

import msgspec

from ..core.event_ids import Position, Stream


class Entry(msgspec.Struct, frozen=True, gc=False):
    """An entry of a shard."""

    position: Position
    payload: bytes | None  # None if it has no field ``data``


class Past(NamedTuple):
    """What a shard held when it was read for the first time."""

    entries: Sequence[Entry]  # the newest that the history has room for, the oldest first
    since: Position  # all entries after this position are among them
    is_whole: bool  # nothing has ever been in the shard that is not among them
    end: Position  # where live reading begins


class PastLimits(NamedTuple):
    """How much of a shard's past the history can hold."""

    entries: int
    payload_bytes: int
    since: float  # milliseconds of unix time; older entries are out


class Lost(NamedTuple):
    """Entries of a shard before ``since`` were lost unread; reading goes on from ``end``.

    ``end`` is before ``since`` if the shard was created again.
    """

    stream: Stream
    since: Position
    end: Position


class Sink(Protocol):
    """Takes what a source reads.

    For each shard: first :meth:`begin`, then :meth:`take` for all entries behind the past, in
    order and each once, until :meth:`forget`. Different shards may be begun while others are read.
    Before any of several is begun, each is looked at with :meth:`look_ahead`.
    """

    def past_limits(self) -> PastLimits:
        """How much of a shard's past is worth reading."""

    def look_ahead_limits(self) -> PastLimits | None:
        """How much of new shards to look ahead at, as :meth:`past_limits`; None if nothing."""

    async def look_ahead(self, stream: Stream, name: str, entries: Sequence[Entry]) -> None:
        """Look at the newest entries of a shard that is begun soon, as others are begun first."""

    async def begin(self, stream: Stream, name: str, past: Past, ahead: float | None) -> None:
        """Begin a shard with its past. If this is cancelled, call it again.

        ``ahead`` is a lower bound of (the engine's unix time - Trio's time) in seconds, or None if
        it is unknown.
        """

    async def take(
        self,
        stream: Stream,
        name: str,
        entries: Sequence[Entry],
        passed: Callable[[Sequence[Entry]], None],
    ) -> None:
        """Take entries that have just been read, waiting while too many are undelivered.

        ``passed`` is called for each part of them in the step in which it is taken: one that was
        not passed when this is cancelled is to be read again.
        """

    async def advance(self, stream: Stream, position: Position) -> None:
        """Note an entry that was read and is not delivered."""

    async def gap(self, lost: Sequence[Lost]) -> None:
        """Say what was lost: one gap for each client, whatever the number of shards.

        Returns in the step in which clients are sent the gap.
        """

    def set_clock(self, streams: Iterable[Stream], ahead: float) -> None:
        """Note (the engine's unix time - Trio's time) in seconds, where these shards are."""

    async def settle(self) -> None:
        """Wait until all entries that were taken are delivered."""

    def forget(self, stream: Stream) -> None:
        """Give up a shard and its history, in the step in which :meth:`settle` has returned."""


class Source(Protocol):
    """Reads the shards that are followed, and is their only reader in this process.

    It hands over each entry once and in the order of its shard, whatever happens to connections
    and servers; where it cannot, it says so with :meth:`Sink.gap`.
    """

    @property
    def connected(self) -> bool:
        """Whether what is followed is being read, except for what is :attr:`unreadable`."""

    @property
    def gaps(self) -> int:
        """The number of gaps so far."""

    @property
    def cursors(self) -> Mapping[str, str]:
        """The place of each shard that is followed, as people write it."""

    @property
    def unreadable(self) -> Collection[str]:
        """The shards that are followed and can't be read at present, though it is connected."""

    def follow(self, shards: Collection[str]) -> None:
        """Read these shards from now on, and no other. Returns at once.

        A new shard is begun with its past. One that is left out is forgotten soon, unless it is
        followed again before that.
        """

    async def run(self, sink: Sink) -> NoReturn:
        """Read until :exc:`.supervision.ConnectionLost`; run it again to read on."""
