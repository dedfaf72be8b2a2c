"""A client of the gateway for Trio: it connects, stays connected, and reports every gap.

    async with connect("wss://gateway.example/ws/waiter", token) as client:
        async for event in client:
            print(event.type, event.data)

docs/api.md documents the names, and docs/clients.md the behaviour when a connection ends.
"""

from .connection import Client, connect
from .transport import NoUpgrade
from .values import Event, Gap, Presence, Refused, Status, TokenProvider

__all__ = [
    "Client",
    "Event",
    "Gap",
    "NoUpgrade",
    "Presence",
    "Refused",
    "Status",
    "TokenProvider",
    "connect",
]
