"""What can happen to the primary of the events, and to its set."""

import time

import trio

from trio_gateway.redis_sets import Cluster

from .durable import STREAM
from .failover_run import Stage


async def kill(stage: Stage) -> None:
    """The primary is killed with -9, and started again once there is another one."""
    old = await stage.primary()

    async def mend() -> None:
        await trio.to_thread.run_sync(stage.servers.rejoin, old)

    began = time.monotonic()
    old.kill()
    await stage.failed_over(old, began, mend)


async def kill_and_forget(stage: Stage) -> None:
    """The primary is killed with -9, and started again as it was: it takes itself for the primary.

    Sentinels make it a replica only 10 s later.
    """
    old = await stage.primary()

    async def mend() -> None:
        await trio.to_thread.run_sync(old.restart)

    began = time.monotonic()
    old.kill()
    await stage.failed_over(old, began, mend)


async def freeze(stage: Stage) -> None:
    """The primary is frozen until after there is another one; then it answers again, as before."""
    old = await stage.primary()

    async def mend() -> None:
        old.thaw()

    began = time.monotonic()
    old.freeze()
    await stage.failed_over(old, began, mend)


async def plan(stage: Stage) -> None:
    """A planned failover."""
    old = await stage.primary()
    began = time.monotonic()
    await trio.to_thread.run_sync(stage.servers.failover, STREAM)
    await stage.failed_over(old, began)


async def move(stage: Stage) -> None:
    """The slot of the stream moves to another primary, with its keys."""
    cluster, old = stage.servers, await stage.primary()
    assert isinstance(cluster, Cluster)
    others = [node for node in await trio.to_thread.run_sync(cluster.primaries) if node is not old]
    began = time.monotonic()
    await trio.to_thread.run_sync(cluster.move_slot, STREAM, others[0])
    await stage.failed_over(old, began)


async def restart_all(stage: Stage) -> None:
    """All servers are killed and started again with their data, one after the other."""
    for node in stage.servers.all_nodes:
        old = await stage.primary()
        began = time.monotonic()
        await trio.to_thread.run_sync(node.restart)
        if node is old:
            await stage.failed_over(None, began)
        await stage.healthy()
        await stage.progress()


async def split(stage: Stage) -> None:
    """The network splits: the gateways, the backend and the old primary are on one side.

    The old primary goes on answering; the other servers are cut off from it.
    """
    old = await stage.primary()

    async def mend() -> None:
        stage.network.heal()

    began = time.monotonic()
    stage.network.cut_off(old, stage.servers)
    await stage.failed_over(old, began, mend)
