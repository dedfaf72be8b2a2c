"""Pages of a stream: a few entries of its past at a time, for clients that resume."""

from collections.abc import Mapping, Sequence
from typing import Final

from ..core.event_ids import Position, Stream, entry_id, read_position
from ..runtime.older_events import ReadEntry, ReadFailed
from .commands import Commands, Unavailable

_FIELD: Final = b"data"


class StreamPages:
    """Reads pages of the streams with these names."""

    def __init__(self, commands: Commands, names: Mapping[Stream, str]) -> None:
        self._commands = commands
        self._names = names

    async def read_back(self, stream: Stream, end: Position, most: int) -> Sequence[ReadEntry]:
        """The last entries up to this position, the newest first."""
        return await self._read(stream, "-", entry_id(end), most, newest_first=True)

    async def read_on(self, stream: Stream, after: Position, most: int) -> Sequence[ReadEntry]:
        """The first entries after this position, the oldest first."""
        return await self._read(stream, f"({entry_id(after)}", "+", most)

    async def _read(
        self, stream: Stream, first: str, last: str, most: int, *, newest_first: bool = False
    ) -> list[ReadEntry]:
        try:
            found = await self._commands.xrange(
                self._names[stream], first, last, most, newest_first=newest_first
            )
            return [(read_position(i.decode()), (fields or {}).get(_FIELD)) for i, fields in found]
        except (Unavailable, KeyError, ValueError) as error:
            raise ReadFailed from error
