"""Places: where a client of a tenant is in the history, in the streams that concern it."""

from collections.abc import Collection

import trio

from ..core.audiences import TenantId
from ..core.event_ids import LAST, START, Cursor, Position, Stream
from ..core.shards import Sharding
from .extent import Extent


class Places:
    """Cursors for clients of each tenant.

    With shards, a tenant's clients have places in the streams of this tenant only: another process
    may read none of the others. Without shards, every stream concerns every tenant.
    """

    def __init__(self, extent: Extent, sharding: Sharding | None = None) -> None:
        self._extent = extent
        self._sharding = sharding if sharding is not None and sharding.by_tenant else None
        self.by_tenant = self._sharding is not None

    def streams_of(self, tenant: TenantId) -> Collection[Stream] | None:
        """The streams that can hold events of this tenant; None for all."""
        return None if self._sharding is None else self._sharding.streams_of(tenant)

    def concern(self, stream: Stream, tenant: TenantId) -> bool:
        """Whether this stream can hold events of the tenant."""
        streams = self.streams_of(tenant)
        return streams is None or stream in streams

    def of(self, tenant: TenantId, cursor: Cursor | None = None) -> Cursor:
        """What of a cursor, by default of the present place, concerns the tenant."""
        if cursor is None:
            cursor = self._extent.end
        streams = self.streams_of(tenant)
        return cursor if streams is None else {s: cursor[s] for s in streams if s in cursor}

    async def wait_begun(self, tenant: TenantId) -> None:
        """Wait until the streams of the tenant have been read up to their present ends.

        Without shards, until one has.
        """
        await self._extent.wait_begun(self.streams_of(tenant))

    def is_known(self, tenant: TenantId) -> bool:
        """Whether all streams of the tenant have been read up to their present ends.

        Without shards this is always true.
        """
        streams = self.streams_of(tenant)
        return streams is None or self._extent.are_begun(streams)

    async def wait_known(self, tenant: TenantId, patience: float) -> bool:
        """Whether all streams of the tenant have been read up to their present ends.

        A shard may be read only since now: it is waited for, at most ``patience`` seconds.
        """
        if (streams := self.streams_of(tenant)) is None:
            return self._extent.warm
        with trio.move_on_after(patience):
            await self._extent.wait_begun(streams)
        return self._extent.are_begun(streams)

    async def after(self, cursor: Cursor, tenant: TenantId) -> Cursor | None:
        """Wait until the cursor of an event id has been read, and return the place after it.

        Returns None if it names a stream that is not one of the tenant's, or not read here.

        While the number of shards is being changed, an id names one of a tenant's two streams. The
        client that has it was sent the entries of both in the order of their times, which says
        where it was in the other one.
        """
        streams = self.streams_of(tenant)
        if streams is not None and not cursor.keys() <= set(streams):
            return None
        await self.wait_begun(tenant)
        # An id may name thousands of streams, and is looked at again with each entry meanwhile.
        if streams is None and not cursor.keys() <= self._extent.known_streams():
            return None
        await self._extent.wait_for(cursor)
        if streams is None or cursor.keys() == set(streams):
            return cursor
        assert self._sharding is not None
        ranks = self._sharding.ranks
        ((named, (milliseconds, _)),) = cursor.items()
        found = dict(cursor)
        for stream in streams:
            if stream != named:
                is_earlier = ranks[stream] < ranks[named]
                found[stream] = self._extent.reached(
                    stream, _end_of(milliseconds if is_earlier else milliseconds - 1)
                )
        return found


def _end_of(milliseconds: int) -> Position:
    """The position behind all entries of this millisecond."""
    return START if milliseconds < 0 else Position((milliseconds, LAST[1]))
