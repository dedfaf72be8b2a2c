"""Publishing, for backends: send an event to every gateway, or raise an error with the reason.

::

    with Publisher("redis://localhost:6380") as publisher:
        publisher.publish({"type": "ROUND_READY", "tenant_id": 1, "branch_id": 1}, id="round-9001")
"""

from ..core.events import InvalidEvent
from ..core.routes_file import InvalidRoutes, read_routes
from .asynchronous import AsyncPublisher
from .errors import InDoubt, PublishFailed
from .links import TIMEOUT
from .sync import Publisher

__all__ = [
    "TIMEOUT",
    "AsyncPublisher",
    "InDoubt",
    "InvalidEvent",
    "InvalidRoutes",
    "PublishFailed",
    "Publisher",
    "read_routes",
]
