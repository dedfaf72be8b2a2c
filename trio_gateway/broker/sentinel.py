"""Sentinel: which server is the primary of a Sentinel set."""

from ..core.primaries import SentinelAnswer, newest_primary
from ..core.slots import SlotMap
from ..redis_url import RedisAddress, RedisUrl
from ..runtime.supervision import ConnectionLost
from .asking import ask_servers
from .connection import RedisConnection, no_error
from .topology import Topology


def sentinel_topology(url: RedisUrl) -> Topology:
    """The topology of a Sentinel set. It asks the Sentinels of the URL."""

    async def ask(redis: RedisConnection, sentinel: RedisAddress) -> SentinelAnswer:
        address, details = await redis.ask_all(
            [
                ("SENTINEL", "GET-MASTER-ADDR-BY-NAME", url.master_name),
                ("SENTINEL", "MASTER", url.master_name),
            ]
        )
        try:
            return SentinelAnswer.read(no_error(address, "SENTINEL"), details, url.master_name)
        except ValueError as error:
            raise ConnectionLost(f"a Sentinel: {error}") from None

    async def look(before: SlotMap) -> SlotMap:
        return SlotMap.of_one(newest_primary(await ask_servers(url.seeds, ask)))

    return Topology(look, lambda node: url.node(*node))
