"""Numbered events, and clients in memory that receive them."""

import json
import math
from collections.abc import Sequence
from typing import Any

import trio
from trio.testing import wait_all_tasks_blocked

from trio_gateway.core.audiences import Principal
from trio_gateway.core.events import Event
from trio_gateway.runtime.connection import Connection, ConnectionLimits
from trio_gateway.runtime.hub import Hub
from trio_gateway.testing import FakeSocket, make_event


def numbered(n: int, **keys: Any) -> Event:
    return make_event(data=n, **keys)


def numbers(events: Sequence[Event]) -> list[int]:
    return [json.loads(event.payload)["data"] for event in events]


def received(socket: FakeSocket) -> list[int]:
    return [json.loads(text)["data"] for text in socket.texts]


async def connect(
    nursery: trio.Nursery, hub: Hub, principal: Principal, socket: FakeSocket | None = None
) -> FakeSocket:
    socket = FakeSocket() if socket is None else socket
    client = Connection(principal, ConnectionLimits(stale_after=math.inf, receive_timeout=math.inf))
    nursery.start_soon(client.run, socket, hub)
    await wait_all_tasks_blocked()
    return socket
