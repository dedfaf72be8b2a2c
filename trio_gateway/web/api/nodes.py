"""``GET /ws/api/nodes``: the processes of the service."""

import msgspec
from quart import Response

from ...core.api_keys import ApiKey
from ...core.control_messages import Node
from ...parts import Parts
from ..responses import Answer


class NodesReply(msgspec.Struct):
    """The processes that are alive, by name."""

    nodes: list[Node]


async def nodes(parts: Parts, key: ApiKey) -> Answer:
    """The processes of the service that are alive, and the state of each."""
    assert parts.cluster is not None
    found = await parts.cluster.registry.read()
    reply = NodesReply([found[name] for name in sorted(found)])
    return Response(msgspec.json.encode(reply), content_type="application/json")
