"""A client of the gateway for Trio: it connects, stays connected, and misses nothing in silence.

    async with connect("wss://gateway.example/ws/waiter", token) as client:
        async for event in client:
            print(event.type, event.data)

What it does when is in docs/clients.md.
"""

from .connection import Client, connect
from .transport import NoUpgrade
from .values import Event, Gap, Refused, Status, TokenProvider

__all__ = ["Client", "Event", "Gap", "NoUpgrade", "Refused", "Status", "TokenProvider", "connect"]
