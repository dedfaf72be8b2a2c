"""Watching a topology: a failover is noticed even if the old primary goes on answering."""

from collections.abc import Sequence
from typing import Final, NoReturn

import structlog
import trio

from ..redis_url import RedisAddress
from ..runtime.supervision import ConnectionLost
from .connection import open_redis
from .topology import Topology

log = structlog.get_logger()

EVERY: Final = 2.0  # seconds from one look to the next
HURRIED: Final = 0.25  # the same while a failover may be under way
HURRY: Final = 10.0  # seconds after the last sign of a failover
# What Sentinels publish in a failover; all but the last, only the one that leads it.
_SIGNS: Final = ("+odown", "+try-failover", "+promoted-slave", "+switch-master")
_PING_EVERY: Final = 10.0  # seconds of silence
_AGAIN_AFTER: Final = 2.0  # seconds


async def watch(topology: Topology, sentinels: Sequence[RedisAddress] = ()) -> NoReturn:
    """Keep a topology up to date; return only when cancelled.

    It is looked at every :data:`EVERY` seconds, and more often for a while after somebody has
    suspected a server, or a Sentinel has published a sign of a failover.
    """
    if topology.is_fixed:
        await trio.sleep_forever()
    async with trio.open_nursery() as nursery:
        for sentinel in sentinels:
            nursery.start_soon(_listen, sentinel, topology)
        nursery.start_soon(_look, topology)
    raise AssertionError("it never ends")


async def _look(topology: Topology) -> NoReturn:
    hurried_until, was_known = -HURRY, True
    while True:
        suspicions = topology.suspicions
        try:
            await topology.look_again()
            was_known = True
        except ConnectionLost as lost:
            if was_known:
                log.warning("primary unknown", error=str(lost))
            was_known = False
        if trio.current_time() < hurried_until:
            await trio.sleep(HURRIED)
        else:
            with trio.move_on_after(EVERY):
                await topology.wait_suspected(suspicions)
        if topology.suspicions != suspicions:
            hurried_until = trio.current_time() + HURRY


async def _listen(sentinel: RedisAddress, topology: Topology) -> NoReturn:
    """Listen to one Sentinel, while it can be reached and allows it."""
    while True:
        try:
            async with open_redis(sentinel, any_role=True) as redis:
                await redis.send("SUBSCRIBE", *_SIGNS)
                is_asked = False
                while True:
                    with trio.move_on_after(_PING_EVERY) as scope:
                        replies = await redis.receive()
                        is_asked = False
                        if any(isinstance(reply, list) and reply[:1] == [b"message"]
                               for reply in replies):  # fmt: skip
                            topology.suspect_all()
                    if scope.cancelled_caught:
                        if is_asked:
                            raise ConnectionLost("no answer to PING")
                        is_asked = True
                        await redis.send("PING")
        except ConnectionLost:
            await trio.sleep(_AGAIN_AFTER)  # the looks say so, if it matters
