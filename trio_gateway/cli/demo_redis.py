"""The demo's Redis: one server, a Sentinel set or a Cluster, whose primary may be killed."""

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager, asynccontextmanager
from typing import TYPE_CHECKING, Final, TypeVar

from ..core.event_ids import DEFAULT_STREAM
from ..redis_sets import RedisSet, cluster_set, sentinel_set, single_redis
from .demo_processes import is_ready

if TYPE_CHECKING:
    from .demo_tally import Tally
    from .rendering import Screen

KINDS: Final[dict[str, Callable[..., AbstractContextManager[RedisSet]]]] = {
    "single": single_redis,
    "sentinel": sentinel_set,
    "cluster": cluster_set,
}
NAMES: Final = {
    "single": "Valkey server",
    "sentinel": "Valkey servers: a primary, two replicas and three Sentinels",
    "cluster": "Valkey Cluster: three primaries, each with a replica",
}
T = TypeVar("T")
_POLL: Final = 0.05  # seconds


@asynccontextmanager
async def open_redis(kind: str) -> AsyncIterator[RedisSet]:
    """Start the servers of a kind; at the end nothing of them is left.

    What they have acknowledged is on the disk, so that it survives a restart.
    """
    import trio

    opened = KINDS[kind](appendonly="yes", appendfsync="always")
    # A thread is not cancelled, so each start is followed by an end.
    found = await trio.to_thread.run_sync(opened.__enter__)
    try:
        yield found
    finally:
        with trio.CancelScope(shield=True):  # bounded
            await trio.to_thread.run_sync(opened.__exit__, None, None, None)


async def kill_primaries(
    servers: RedisSet, every: float, port: int, screen: "Screen", tally: "Tally"
) -> None:
    """Kill the primary of the events again and again, and show what follows.

    ``port`` is the gateway's. A killed server is started again, and the next one is not killed
    before the servers are healthy.
    """
    import trio

    while True:
        await trio.sleep(every)
        await _wait(servers.wait_healthy)
        await _kill_primary(servers, port, screen, tally)


async def _kill_primary(servers: RedisSet, port: int, screen: "Screen", tally: "Tally") -> None:
    import trio

    primary = await _wait(lambda: servers.primary(DEFAULT_STREAM))
    primary.kill()
    killed_at = trio.current_time()
    await screen.show(f"\nThe primary, 127.0.0.1:{primary.port}, is killed ({tally.counters}).")
    alone = len(servers.nodes) == 1
    if alone:
        primary.start()
    other_than = None if alone else primary
    new = await _wait(lambda: servers.wait_writable(DEFAULT_STREAM, other_than=other_than))
    accepts_at = trio.current_time()
    await screen.show(
        f"The primary is now 127.0.0.1:{new.port}, {accepts_at - killed_at:.1f} s after the kill."
    )
    if not alone:
        primary.start()
    before = tally.received.total()
    while tally.received.total() == before or not await is_ready(port):  # noqa: ASYNC110
        await trio.sleep(_POLL)
    took = trio.current_time() - accepts_at
    await screen.show(f"Events are delivered again, {took:.1f} s later ({tally.counters}).\n")


async def _wait(ask: Callable[[], T]) -> T:
    """Ask the servers in a thread; Ctrl-C does not wait for it."""
    import trio

    return await trio.to_thread.run_sync(ask, abandon_on_cancel=True)
