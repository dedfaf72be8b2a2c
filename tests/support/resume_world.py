"""A hub with its history, dispatch and resume, and clients of it, in virtual time."""

import json
import math
from typing import Any, Final

import trio
from trio.testing import wait_all_tasks_blocked

from trio_gateway.core.audiences import Principal
from trio_gateway.core.escalation import ESCALATED
from trio_gateway.core.event_ids import START, Cursor, Position, Stream, event_id
from trio_gateway.core.events import Event, parse_event
from trio_gateway.core.routing import ROUTES, Routing
from trio_gateway.core.shards import Sharding
from trio_gateway.runtime.connection import Connection, ConnectionLimits
from trio_gateway.runtime.dispatch import Dispatch
from trio_gateway.runtime.history import History
from trio_gateway.runtime.hub import Hub
from trio_gateway.runtime.older_events import OlderEvents, ReadEntry, ReadFailed
from trio_gateway.runtime.past_routing import PastRouting
from trio_gateway.runtime.places import Places
from trio_gateway.runtime.receipt_writing import ReceiptWriting
from trio_gateway.runtime.receipts import ReceiptLog
from trio_gateway.runtime.resume import Replays
from trio_gateway.runtime.resume_state import Phase
from trio_gateway.runtime.socket import Ping
from trio_gateway.runtime.tracked_events import TrackedEvents
from trio_gateway.testing import FakeSocket, make_event, make_principal

A, B = Stream("aaaa"), Stream("bbbb")
GAP: Final = {"type": "gap"}


def at(milliseconds: int) -> Position:
    return Position((milliseconds, 0))


def place(milliseconds: int, stream: Stream = A) -> str:
    return event_id(stream, at(milliseconds))


def still_to_come(n: int, stream: Stream) -> Event:
    return make_event(data=n, stream=stream, position=at(n))


def bounded(**changes: float) -> ConnectionLimits:
    return ConnectionLimits(**{"stale_after": math.inf, "receive_timeout": math.inf} | changes)  # type: ignore[arg-type]


class Client:
    """A client and its connection; what it is sent is read as it is written."""

    def __init__(self, connection: Connection, socket: FakeSocket) -> None:
        self.connection = connection
        self.socket = socket
        self._said: list[Any] = []
        self._read = 0  # bytes of what was written

    @property
    def said(self) -> list[Any]:
        if self._read < (written := len(self.socket.written)):
            self._said += map(json.loads, self.socket.texts[len(self._said) :])
            self._read = written
        return list(self._said)

    @property
    def heard(self) -> list[int]:
        """The numbers of the events, in the order in which they came."""
        return [message["data"] for message in self.said if "data" in message]

    @property
    def resumed(self) -> list[dict[str, Any]]:
        return [message for message in self.said if message["type"] == "resumed"]

    async def say(self, message: str | dict[str, Any] | Ping) -> None:
        await self.socket.client.send(json.dumps(message) if isinstance(message, dict) else message)
        await wait_all_tasks_blocked()

    async def ask(self, last_event_id: Any) -> None:
        await self.say({"type": "resume", "last_event_id": last_event_id})

    async def leave(self) -> None:
        await self.socket.client.leave()
        await wait_all_tasks_blocked()


class FakeStreams:
    """What Redis holds of the streams, and whether it answers."""

    def __init__(self) -> None:
        self.entries: dict[Stream, list[ReadEntry]] = {}
        self.fails = False
        self.seconds = 0.0  # for a page
        self.pages = self.entries_read = 0
        self.is_trimmed = False

    async def read_back(self, stream: Stream, end: Position, most: int) -> list[ReadEntry]:
        await self._answer()
        found = [entry for entry in self.entries.get(stream, ()) if entry[0] <= end]
        return self._page(found[::-1], most)

    async def read_on(self, stream: Stream, after: Position, most: int) -> list[ReadEntry]:
        await self._answer()
        found = [entry for entry in self.entries.get(stream, ()) if entry[0] > after]
        return self._page(found, most)

    async def is_whole(self, stream: Stream) -> bool:
        await self._answer()
        return not self.is_trimmed

    def _page(self, found: list[ReadEntry], most: int) -> list[ReadEntry]:
        page = found[:most]
        self.entries_read += len(page)
        return page

    async def _answer(self) -> None:
        self.pages += 1
        await trio.sleep(self.seconds)
        if self.fails:
            raise ReadFailed


class World:
    """A hub, its history and its dispatch; events are numbers, which are their places too."""

    def __init__(
        self,
        nursery: trio.Nursery,
        *streams: Stream,
        begun: bool = True,
        most_scanned: int = 0,
        uncovered_to_branch: bool = False,
        routes: Routing = ROUTES,
        sharding: Sharding | None = None,
        **bounds: Any,
    ) -> None:
        self.hub = Hub()
        routing = PastRouting(routes, uncovered_to_branch=uncovered_to_branch)
        self.history = History(**{"age": 10**12} | bounds, routing=routing)
        self.dispatch = Dispatch(
            self.hub,
            history=self.history,
            uncovered_to_branch=uncovered_to_branch,
            writes_per_checkpoint=1,
        )
        self.redis = FakeStreams()
        self.older = OlderEvents(
            self.history,
            self.redis,
            routing=routing,
            most_entries=most_scanned,
            most_bytes=10**7,
        )
        self.tracked_events = TrackedEvents(routes, trio.current_time, 10**9)
        self.receipts = ReceiptLog(
            self.tracked_events,
            self.history,
            trio.current_time,
            ReceiptWriting(),
            self.dispatch.times,
        )
        if self.tracked_events.tracks:
            self.dispatch.receipts = self.receipts
        if sharding is not None:
            self.history.ranks = sharding.ranks
        self.replays = Replays(
            self.history,
            self.hub,
            Places(self.history.extent, sharding),
            self.older,
            self.receipts,
            self.dispatch.times,
        )
        self.nursery = nursery
        nursery.start_soon(self.replays.feeding.keep_ahead)
        if begun:
            for stream in streams or (A,):
                self.history.extent.begin(stream, START, whole=True)
                self.history.extent.advance(stream, START)

    async def publish(self, *numbers: int, stream: Stream | None = A, **keys: Any) -> None:
        """Deliver a batch; ``stream=None`` is Pub/Sub."""
        channel = "channel:branch:1:waiters" if stream is None else f"stream {stream}"
        batch = []
        for n in numbers:
            now = trio.current_time()
            batch.append(
                make_event(
                    data=n, channel=channel, received_at=now, stream=stream, position=at(n), **keys
                )
            )
        if stream is not None:
            entries = self.redis.entries.setdefault(stream, [])
            entries += [(at(n), event.payload) for n, event in zip(numbers, batch, strict=True)]
            self.tracked_events.note(batch)
        await self.dispatch.deliver(batch)

    async def connect(
        self,
        resume_from: str | None = None,
        *,
        principal: Principal | None = None,
        socket: FakeSocket | None = None,
        terms: ConnectionLimits | None = None,
        accepted_at: Cursor | None = None,
    ) -> Client:
        socket = FakeSocket() if socket is None else socket
        connection = Connection(
            principal or make_principal(),
            bounded(write_timeout=math.inf) if terms is None else terms,
            replays=self.replays,
            receipts=self.receipts,
            resume_from=resume_from,
            accepted_at=accepted_at,
        )
        self.nursery.start_soon(connection.run, socket, self.hub)
        await wait_all_tasks_blocked()
        return Client(connection, socket)

    async def live(self, **options: Any) -> Client:
        """A client that is past the moment in which it may ask to resume."""
        client = await self.connect(**options)
        await client.say("x")
        assert client.connection.resume_state.phase is Phase.LIVE
        return client


def escalated(world: World, number: int, position: int = 100) -> Event:
    """The event of this number on its way to the floor, without the waiters of its sector."""
    payload = dict(world.redis.entries[A])[at(number)]
    assert payload is not None
    keys = {
        "type": ESCALATED, "tenant_id": 1, "branch_id": 1, "sector_id": 5, "step": 1, "to": "floor",
        "of": "ROUND_READY", "event_id": place(number), "unless": ["waiters"],
        "event": json.loads(payload),
    }  # fmt: skip
    text = json.dumps(keys, separators=(",", ":")).encode()
    return parse_event(text, channel="", received_at=0.0, stream=A, position=at(position))
