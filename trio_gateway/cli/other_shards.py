"""Streams of another number of shards: what is published there is not read."""

import time
from typing import TYPE_CHECKING, Final

from ..core.shards import MAX_SHARDS, stream_name

if TYPE_CHECKING:
    from ..broker.connection import RedisConnection
    from ..settings import Settings

_LATELY: Final = 86_400.0  # seconds: what is older is from before a change of the number
_NAMED: Final = 3


async def find_other_shards(
    settings: "Settings", redis: "RedisConnection", *, timeout: float
) -> str | None:
    """Say which streams somebody has added to in the last day with another number of shards.

    It finds only those that this user may read. Raises :exc:`ConnectionLost`.
    """
    names = [
        other
        for name in settings.redis_streams
        for other in (name, *(stream_name(name, MAX_SHARDS, k) for k in range(MAX_SHARDS)))
        if other not in settings.sharding.names
    ]
    commands = [("XREVRANGE", name, "+", "-", "COUNT", 1) for name in names]
    ages: dict[str, float] = {}  # seconds since the last entry
    now = time.time()
    for name, reply in zip(names, await redis.ask_all(commands, timeout=timeout), strict=True):
        match reply:
            case [[bytes() as entry_id, _]]:
                ages[name] = max(0.0, now - int(entry_id.partition(b"-")[0]) / 1000)
    late = [name for name, age in ages.items() if age < _LATELY]
    if not late:
        return None
    named = ", ".join(late[:_NAMED]) + (f" and {len(late) - _NAMED} more" * (len(late) > _NAMED))
    newest = min(late, key=lambda name: ages[name])
    return (
        f"not read, but published to: {named} (last: {newest}, {ages[newest]:.0f} s ago)."
        f" Another number of shards than REDIS_STREAM_SHARDS={settings.redis_stream_shards} is set"
        " at a publisher. To change the number, see REDIS_STREAM_SHARDS_PREVIOUS"
    )
