"""The reaper: keeps quiet connections open and removes stale, dead and stuck ones."""

import time
from collections.abc import Callable
from typing import NoReturn

import structlog
import trio

from .hub import Hub

log = structlog.get_logger()

STUCK_AFTER = 30.0  # seconds that the close of a connection may take
_PER_CHECKPOINT = 100


async def reap(
    hub: Hub,
    *,
    ping_interval: float,
    cleanup_interval: float,
    wall_clock: Callable[[], float] = time.time,
) -> NoReturn:
    """Ping connections that were sent nothing for a while, and clean up at intervals.

    Intervals are seconds. A connection closes itself at its deadline; this finds the ones that
    failed to. Returns only when cancelled.
    """
    tick = min(ping_interval / 10, cleanup_interval)
    clean_up_at = trio.current_time() + cleanup_interval
    offset = wall_clock() - trio.current_time()
    while True:
        await trio.sleep(tick)
        now = trio.current_time()
        for n, connection in enumerate(list(hub.connections), 1):
            if now - connection.sent_at >= ping_interval:
                connection.ping(now)
            if n % _PER_CHECKPOINT == 0:
                await trio.lowlevel.checkpoint()
                now = trio.current_time()
        if trio.current_time() < clean_up_at:
            continue
        clean_up_at = trio.current_time() + cleanup_interval
        shift = wall_clock() - trio.current_time() - offset
        if abs(shift) > 1:  # the wall clock was set, and tokens expire by it
            offset += shift
            for connection in hub.connections:
                connection.renew(connection.principal.expires_at - offset)
        clean_up(hub, trio.current_time())


def clean_up(hub: Hub, now: float) -> None:
    """Close connections that are overdue, and abort those whose close is stuck."""
    for connection in list(hub.connections):
        if connection.deadline < now:
            connection.close_on_time(now)
    stuck = [
        connection
        for connection in [*hub.connections, *hub.leaving]
        if connection.ended_at is not None and connection.ended_at + STUCK_AFTER < now
    ]
    for connection in stuck:
        connection.abort()
    if stuck:
        log.warning("stuck connections aborted", connections=len(stuck))
