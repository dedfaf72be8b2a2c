"""Shards: the streams among which the events of the tenants are divided.

All events of a tenant are in one stream, so the order of a stream is the order that clients see.
"""

from binascii import crc_hqx
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from typing import Final

from .event_ids import Stream, tag

MAX_SHARDS: Final = 256
STREAM_LENGTH: Final = 100_000  # entries that are kept in a stream, about
_MOST_KNOWN: Final = 100_000  # tenants of which the streams are remembered


def shard_of(tenant: int, shards: int) -> int:
    """The shard of a tenant, from 0: CRC-16/XMODEM of its decimal text, modulo their number.

    It is the checksum that Redis Cluster takes for its slots.
    """
    return crc_hqx(b"%d" % tenant, 0) % shards


def stream_name(name: str, shards: int, shard: int) -> str:
    """The Redis stream of a shard; without shards it is ``name`` itself.

    The braces are a hash tag: all keys with the same one are in the same slot of a Redis Cluster.
    """
    return name if shards == 1 else f"{name}:{{{shard}}}"


class Sharding:
    """In which streams the events of a tenant are.

    With ``shards`` or ``previous`` above 1 there is one name, and the events of a tenant are in its
    shard. While the number of shards is being changed, they are also in the shard that the tenant
    had when there were ``previous`` shards; one of the two numbers must be a multiple of the other.
    Otherwise, the events of a tenant can be in each of the streams that are named.
    """

    def __init__(self, names: Sequence[str], *, shards: int = 1, previous: int = 1) -> None:
        self._shards, self._previous = shards, previous
        self.by_tenant = shards > 1 or previous > 1
        self._known: dict[int, Sequence[Stream]] = {}  # by tenant
        if not self.by_tenant:
            self.names: tuple[str, ...] = tuple(dict.fromkeys(names))
            return
        (name,) = names
        self._new, self._old = _of_each_shard(name, shards), _of_each_shard(name, previous)
        # In this order every tenant's old stream is before its new one.
        if shards >= previous:
            self.names = tuple(dict.fromkeys((*self._old, *self._new)))
        else:
            self.names = tuple(dict.fromkeys((*self._new, *self._old)))[::-1]

    @cached_property
    def ranks(self) -> Mapping[Stream, int]:
        """The order of entries of one millisecond in different streams; empty if there is none.

        Backends turn from a tenant's old stream to its new one, so those of the old one are first.
        """
        if self._shards == self._previous:
            return {}
        return {tag(name): rank for rank, name in enumerate(self.names)}

    @cached_property
    def old_streams(self) -> Collection[Stream]:
        """Streams that can hold earlier events of tenants whose events are in another one now."""
        return frozenset(map(tag, self._old)) if self.ranks else frozenset()

    def names_of(self, tenant: int) -> tuple[str, ...]:
        """The names of the streams that can hold events of this tenant, the old one first."""
        if not self.by_tenant:
            return self.names
        old = self._old[shard_of(tenant, self._previous)]
        new = self._new[shard_of(tenant, self._shards)]
        return (new,) if old == new else (old, new)

    def name_for_new(self, tenant: int) -> str:
        """The name of the stream that new events of this tenant are added to."""
        return self.names_of(tenant)[-1 if self.by_tenant else 0]

    def numbers_of(self, names: Collection[str]) -> list[int]:
        """The numbers of the shards whose streams are among these; without shards, 0."""
        if not self.by_tenant:
            return [0]
        return [number for number, name in enumerate(self._new) if name in names]

    def streams_of(self, tenant: int) -> Sequence[Stream]:
        """The tags of :meth:`names_of`."""
        if (found := self._known.get(tenant)) is None:
            if len(self._known) >= _MOST_KNOWN:
                self._known.clear()
            found = self._known[tenant] = tuple(map(tag, self.names_of(tenant)))
        return found


def _of_each_shard(name: str, shards: int) -> tuple[str, ...]:
    return tuple(stream_name(name, shards, shard) for shard in range(shards))
