"""Fakes and makers for tests: the gateway's own, and those of whoever builds on it."""

import json
import time
from collections.abc import Iterable, Mapping
from typing import Any

import trio

from .core.audiences import BranchId, Endpoint, Principal, SectorId, SessionId, TenantId, UserId
from .core.close_codes import Close
from .core.event_ids import Position, Stream
from .core.events import Event, parse_event
from .core.frames import PING, PONG, TEXT, boundary, split
from .core.minting import lifetime, mint, staff_claims, table_claims
from .core.routing import ROUTES
from .runtime.connection import Disconnected, Ping, Pong
from .runtime.outbox import Outbox


def make_principal(
    endpoint: Endpoint = Endpoint.WAITER,
    *,
    tenant: int = 1,
    user: int = 21,
    branches: Iterable[int] = (1,),
    sectors: Iterable[int] = (),
    roles: Iterable[str] | None = None,
    session: int = 456,
    expires_at: float = float("inf"),
) -> Principal:
    """A principal with sectors in every one of its branches."""
    diner = endpoint is Endpoint.DINER
    return Principal(
        endpoint=endpoint,
        tenant=TenantId(tenant),
        branches=frozenset(map(BranchId, branches)),
        expires_at=expires_at,
        user=None if diner else UserId(str(user)),
        session=SessionId(session) if diner else None,
        roles=frozenset([endpoint.name] if roles is None else roles),
        sectors={BranchId(b): frozenset(map(SectorId, sectors)) for b in branches},
    )


def make_payload(type: str = "ROUND_READY", **keys: Any) -> bytes:  # noqa: A002 - the event's key
    """An event as a backend would publish it; a key set to ``...`` is left out."""
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
    """An event as the gateway makes it of :func:`make_payload`.

    With ``stream`` and ``position``, as it is read from there; it is durable if its type is.
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
    """A staff token; a claim set to ``...`` is left out."""
    found = staff_claims(tenant=1, user=21, branches=[1], roles=["WAITER"])
    return _mint(found | lifetime(time.time(), life) | claims, secret, algorithm)


def make_table_token(secret: str, *, life: float = 3600, **claims: Any) -> str:
    """A table token; a claim set to ``...`` is left out."""
    found = table_claims(tenant=1, branch=1, table=10, session=456)
    return _mint(found | lifetime(time.time(), life) | claims, secret)


def _mint(claims: Mapping[str, Any], secret: str, algorithm: str = "HS256") -> str:
    return mint({k: v for k, v in claims.items() if v is not ...}, secret, algorithm)


class NullAuth:
    """Lets everybody in, as the principal it was given or as one made for the endpoint."""

    def __init__(self, principal: Principal | None = None) -> None:
        self._principal = principal

    async def authenticate(self, credential: str, endpoint: Endpoint) -> Principal:
        await trio.lowlevel.checkpoint()
        return self._principal or make_principal(endpoint)


class FakeClient:
    """The other end of a :class:`FakeSocket`."""

    def __init__(self) -> None:
        self.to_gateway, self.from_client = trio.open_memory_channel[str | Ping | Pong | Exception](
            1000
        )

    async def send(self, said: str | Ping | Pong) -> None:
        await self.to_gateway.send(said)

    async def leave(self, code: int = Close.NORMAL, reason: str = "") -> None:
        await self.to_gateway.send(Disconnected(code, reason))

    async def misbehave(self, outcome: Exception) -> None:
        await self.to_gateway.send(outcome)


class FakeSocket:
    """A socket in memory. ``room`` is how many bytes the client's kernel still takes."""

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
        """The text messages that the client has been sent, of what is written in whole."""
        return [str(payload, "utf-8") for payload in self._sent(TEXT)]

    @property
    def pings(self) -> int:
        return len(self._sent(PING))

    @property
    def pongs(self) -> list[bytes]:
        return self._sent(PONG)

    def _sent(self, wanted: int) -> list[bytes]:
        written, end = memoryview(bytes(self.written)), 0
        padded = memoryview(self.written + bytes(9))  # a cut head is a head all the same
        while (following := end + boundary(padded[end:], 1)) <= len(written):
            end = following
        return [bytes(payload) for opcode, payload in split(written[:end]) if opcode == wanted]

    def read(self, size: float) -> None:
        """The client reads on: so many bytes more fit."""
        self.room += size
        self._more_room.set()

    def try_write(self, data: bytes | memoryview) -> int:
        if self.aborted:
            raise BrokenPipeError
        taken = int(min(self.room, len(data)))
        self.room -= taken
        self.written += data[:taken]
        self.writes += 1
        return taken

    async def write_from(self, outbox: Outbox) -> None:
        while not self.room and not self.aborted:
            self._more_room = trio.Event()
            await self._more_room.wait()
        outbox.took(self.try_write(outbox.head()))

    def traffic(self) -> tuple[int, int]:
        return 0, 0

    async def receive(self) -> str | Ping | Pong:
        said = await self.client.from_client.receive()
        if isinstance(said, Exception):
            raise said
        return said

    async def close(self, code: int, reason: str) -> None:
        await trio.lowlevel.checkpoint()
        if self.aborted:
            return
        try:
            self.closed = Close(code)
        except ValueError:
            self.closed = code
        self.reason = reason

    def abort(self) -> None:
        self.aborted = True
        self._more_room.set()
