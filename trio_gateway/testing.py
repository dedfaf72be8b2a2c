"""Tokens, events and fakes for tests, of the gateway and of applications."""

import json
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any

import trio

from .core.audiences import (
    BranchId,
    Endpoint,
    Principal,
    SectorId,
    SessionId,
    TableId,
    TenantId,
    UserId,
)
from .core.close_codes import Close
from .core.event_ids import Position, Stream
from .core.events import Event, parse_event
from .core.frames import PING, PONG, TEXT, boundary, split
from .core.minting import lifetime, mint, staff_claims, table_claims
from .core.routing import ROUTES
from .runtime.socket import Disconnected, Ping, Pong

__all__ = [
    "Endpoint",
    "FakeClient",
    "FakeSocket",
    "NullAuth",
    "Principal",
    "make_event",
    "make_jwt",
    "make_payload",
    "make_principal",
    "make_table_token",
]


def make_principal(
    endpoint: Endpoint = Endpoint.WAITER,
    *,
    tenant: int = 1,
    user: int = 21,
    branches: Iterable[int] = (1,),
    sectors: Iterable[int] = (),
    roles: Iterable[str] | None = None,
    session: int = 456,
    table: int = 10,
    expires_at: float = float("inf"),
) -> Principal:
    """Make a principal for an endpoint; it has the ``sectors`` in each of its ``branches``.

    ``user`` counts for staff endpoints, ``session`` and ``table`` for diners. ``roles`` defaults
    to the endpoint's own role. ``expires_at`` is unix time.
    """
    diner = endpoint is Endpoint.DINER
    return Principal(
        endpoint=endpoint,
        tenant=TenantId(tenant),
        branches=frozenset(map(BranchId, branches)),
        expires_at=expires_at,
        user=None if diner else UserId(str(user)),
        session=SessionId(session) if diner else None,
        table=TableId(table) if diner else None,
        roles=frozenset([endpoint.name] if roles is None else roles),
        sectors={BranchId(b): frozenset(map(SectorId, sectors)) for b in branches},
    )


def make_payload(type: str = "ROUND_READY", **keys: Any) -> bytes:  # noqa: A002 - the event's key
    """Make the JSON of an event, as a backend publishes it; a key set to ``...`` is left out."""
    event = {"type": type, "tenant_id": 1, "branch_id": 1} | keys
    return json.dumps({k: v for k, v in event.items() if v is not ...}).encode()


def make_event(
    type: str = "ROUND_READY",  # noqa: A002 - the event's key
    *,
    channel: str = "channel:branch:1:waiters",
    received_at: float = 0.0,
    stream: Stream | None = None,
    position: Position | None = None,
    **keys: Any,
) -> Event:
    """Make an event as the gateway reads it from ``channel``; ``keys`` as in :func:`make_payload`.

    With ``stream`` and ``position``, as the gateway reads it from that stream; the event is durable
    if its type is. ``received_at`` is the time of receipt on Trio's clock, in seconds.
    """
    return parse_event(
        make_payload(type, **keys),
        channel=channel,
        received_at=received_at,
        stream=stream,
        position=position,
        durable_types=ROUTES.durable_types,
    )


def make_jwt(secret: str, *, life: float = 3600, algorithm: str = "HS256", **claims: Any) -> str:
    """Make a staff token that expires in ``life`` seconds; a claim set to ``...`` is left out."""
    found = staff_claims(tenant=1, user=21, branches=[1], roles=["WAITER"])
    return _mint(found | lifetime(time.time(), life) | claims, secret, algorithm)


def make_table_token(secret: str, *, life: float = 3600, **claims: Any) -> str:
    """Make a table token that expires in ``life`` seconds; a claim set to ``...`` is left out."""
    found = table_claims(tenant=1, branch=1, table=10, session=456)
    return _mint(found | lifetime(time.time(), life) | claims, secret)


def _mint(claims: Mapping[str, Any], secret: str, algorithm: str = "HS256") -> str:
    return mint({k: v for k, v in claims.items() if v is not ...}, secret, algorithm)


class NullAuth:
    """Authenticates every client, as the given principal or as one made for the endpoint."""

    def __init__(self, principal: Principal | None = None) -> None:
        self._principal = principal

    async def authenticate(self, credential: str, endpoint: Endpoint) -> Principal:
        """Return the principal."""
        await trio.lowlevel.checkpoint()
        return self._principal or make_principal(endpoint)


class FakeClient:
    """The client's end of a :class:`FakeSocket`."""

    def __init__(self) -> None:
        self.to_gateway, self.from_client = trio.open_memory_channel[str | Ping | Pong | Exception](
            1000
        )

    async def send(self, message: str | Ping | Pong) -> None:
        """Send a message or a control frame to the gateway."""
        await self.to_gateway.send(message)

    async def leave(self, code: int = Close.NORMAL, reason: str = "") -> None:
        """Close the connection with a close code."""
        await self.to_gateway.send(Disconnected(code, reason))

    async def misbehave(self, outcome: Exception) -> None:
        """Make the gateway's next receive raise ``outcome``."""
        await self.to_gateway.send(outcome)


class FakeSocket:
    """A socket in memory. ``room`` is how many bytes it accepts until the client reads on."""

    is_plain = True
    measures_progress = False
    answers_pings = True

    def __init__(self, room: float = float("inf")) -> None:
        self.client = FakeClient()
        self.room = room
        self.written = bytearray()
        self.writes = 0
        self.closed: Close | int | None = None
        self.reason = ""
        self.aborted = False
        self._more_room = trio.Event()

    @property
    def texts(self) -> list[str]:
        """The complete text messages that were written."""
        return [str(payload, "utf-8") for payload in self._sent(TEXT)]

    @property
    def pings(self) -> int:
        """The number of pings that were written."""
        return len(self._sent(PING))

    @property
    def pongs(self) -> list[bytes]:
        """The payloads of the pongs that were written."""
        return self._sent(PONG)

    def _sent(self, wanted: int) -> list[bytes]:
        written, end = memoryview(bytes(self.written)), 0
        padded = memoryview(self.written + bytes(9))  # boundary() reads a whole frame head
        while (following := end + boundary(padded[end:], 1)) <= len(written):
            end = following
        return [bytes(payload) for opcode, payload in split(written[:end]) if opcode == wanted]

    def read(self, size: float) -> None:
        """Let the client read: the socket accepts ``size`` more bytes."""
        self.room += size
        self._more_room.set()

    def try_write(self, data: bytes | memoryview) -> int:
        """Write as much as there is room for; return the number of bytes."""
        if self.aborted:
            raise BrokenPipeError
        taken = int(min(self.room, len(data)))
        self.room -= taken
        self.written += data[:taken]
        self.writes += 1
        return taken

    async def send_some(self, head: Callable[[], memoryview]) -> int:
        """Wait for room, then write the bytes that ``head`` returns; return the number written."""
        while not self.room and not self.aborted:
            self._more_room = trio.Event()
            await self._more_room.wait()
        return self.try_write(head())

    def traffic(self) -> tuple[int, int]:
        """Bytes received and acknowledged; a socket in memory measures neither."""
        return 0, 0

    def has_left(self) -> bool:
        """Return whether the connection was dropped."""
        return self.aborted

    async def receive(self) -> str | Ping | Pong:
        """Return the client's next message, or raise how the connection ended."""
        message = await self.client.from_client.receive()
        if isinstance(message, Exception):
            raise message
        return message

    def interrupt(self) -> None:
        """End a wait for the client's next message, as if it had vanished."""
        with suppress(trio.WouldBlock):  # full: nobody waits
            self.client.to_gateway.send_nowait(Disconnected(Close.ABNORMAL))

    async def close(self, code: int, reason: str) -> None:
        """Record the close code and the reason, unless the socket was aborted."""
        await trio.lowlevel.checkpoint()
        if self.aborted:
            return
        try:
            self.closed = Close(code)
        except ValueError:
            self.closed = code
        self.reason = reason

    def abort(self) -> None:
        """Drop the connection: from now on a write raises :exc:`BrokenPipeError`."""
        self.aborted = True
        self._more_room.set()
