"""Pages of a stream: a few entries of its past at a time, for clients that resume."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Final

from ..core.event_ids import Position, Stream, entry_id, read_position
from ..runtime.older_events import ReadEntry, ReadFailed
from .commands import Commands, Entries, Unavailable

_FIELD: Final = b"data"


class StreamPages:
    """Reads pages of the streams with these names."""

    def __init__(self, commands: Commands, names: Mapping[Stream, str]) -> None:
        self._commands = commands
        self._names = names

    async def read_back(self, stream: Stream, end: Position, most: int) -> Sequence[ReadEntry]:
        """The last entries up to this position, the newest first."""
        return await self._read(self._commands.read_back, stream, end, most)

    async def read_on(self, stream: Stream, after: Position, most: int) -> Sequence[ReadEntry]:
        """The first entries after this position, the oldest first."""
        return await self._read(self._commands.read_on, stream, after, most)

    async def is_whole(self, stream: Stream) -> bool:
        """Whether the stream still holds every entry that was ever added; False before Redis 7."""
        try:
            return await self._commands.is_whole(self._names[stream])
        except (Unavailable, KeyError) as error:
            raise ReadFailed from error

    async def _read(
        self,
        read: Callable[[str, str, int], Awaitable[Entries]],
        stream: Stream,
        position: Position,
        most: int,
    ) -> list[ReadEntry]:
        try:
            found = await read(self._names[stream], entry_id(position), most)
            return [(read_position(i.decode()), (fields or {}).get(_FIELD)) for i, fields in found]
        except (Unavailable, KeyError, ValueError) as error:
            raise ReadFailed from error
