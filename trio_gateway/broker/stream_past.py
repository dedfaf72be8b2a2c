"""The past of a stream: what it holds when a process reads it for the first time."""

from typing import Final

from ..core.event_ids import START, Position, entry_id
from ..runtime.source import Entry, Past, PastLimits
from .connection import RedisConnection
from .stream_replies import Info, read_entries

_PAGE: Final = 1000  # entries in one reply


async def read_past(
    redis: RedisConnection, name: str, info: Info, limits: PastLimits, *, timeout: float
) -> Past:
    """Read the newest entries, backwards from the end that ``info`` gives, while there is room.

    Each reply may take ``timeout`` seconds, else this raises :exc:`ConnectionLost`.
    """
    found: list[Entry] = []
    unread: Position | None = None  # the newest entry that there is no room for
    size, end = 0, entry_id(info.last)
    while unread is None:
        reply = await redis.call("XREVRANGE", name, end, "-", "COUNT", _PAGE, timeout=timeout)
        page = read_entries(reply)
        for entry in page:
            size += len(entry.payload or b"")
            if (
                len(found) >= limits.entries
                or size > limits.payload_bytes
                or entry.position[0] < limits.since
            ):
                unread = entry.position
                break
            found.append(entry)
        if len(page) < _PAGE:
            break
        end = f"({entry_id(page[-1].position)}"
    entries = found[::-1]
    return Past(
        entries,
        since=unread or (entries[0].position if entries else info.last),
        is_whole=unread is None and (info.last == START or info.added == info.length),
        end=info.last,
    )
