"""Every event type × every endpoint and role × sector × session × branch × tenant, for real."""

import itertools
import json
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import redis
import trio
from trio_websocket import WebSocketConnection

from tests.support.gateways import (
    JWT_SECRET,
    TABLE_SECRET,
    Running,
    Transport,
    admitted,
    make_settings,
    metrics,
    received,
    running,
    settle,
)
from trio_gateway.testing import make_jwt, make_table_token

# The contract's table (section 2), written out again: W waiters of the event's sector or else of
# the branch, F every waiter of the branch, K kitchen, A admins, D diners of the session, B diners
# of the branch.
TABLE = {
    "ROUND_PENDING": "F A D",
    "ROUND_CONFIRMED": "W A D",
    "ROUND_SUBMITTED": "W A D",
    "ROUND_IN_KITCHEN": "W K A D",
    "ROUND_READY": "W K A D",
    "ROUND_CANCELED": "W K A D",
    "ROUND_ITEM_VOIDED": "W K A D",
    "ROUND_ITEM_DELETED": "W K A D",
    "ROUND_SERVED": "W A D",
    "SERVICE_CALL_CREATED": "W A",
    "SERVICE_CALL_ACKED": "W A D",
    "SERVICE_CALL_CLOSED": "W A D",
    "CHECK_REQUESTED": "W A D",
    "CHECK_PAID": "W A D",
    "PAYMENT_APPROVED": "W A D",
    "PAYMENT_REJECTED": "W A D",
    "PAYMENT_FAILED": "W A D",
    "TABLE_SESSION_STARTED": "F A D",
    "TABLE_CLEARED": "W A D",
    "TABLE_STATUS_CHANGED": "W A D",
    "TABLE_TRANSFERRED": "W A D",
    "TICKET_IN_PROGRESS": "W K A",
    "TICKET_READY": "W K A",
    "TICKET_DELIVERED": "W K A",
    "PRODUCT_AVAILABILITY_CHANGED": "F K A B",
    "CART_ITEM_ADDED": "D",
    "CART_ITEM_UPDATED": "D",
    "CART_ITEM_REMOVED": "D",
    "CART_CLEARED": "D",
    "CART_SYNC": "D",
    "ENTITY_CREATED": "A",
    "ENTITY_UPDATED": "A",
    "ENTITY_DELETED": "A",
    "CASCADE_DELETE": "A",
    "NOBODY_KNOWS_THIS": "A",
}
SECTOR, OTHER_SECTOR, NOBODYS_SECTOR = 5, 6, 99
SESSION, OTHER_SESSION = 456, 457
STREAM = "events:critical"
# The body decides who gets an event, the channel does not: these are taken in turn.
CHANNELS = (
    STREAM,
    "channel:branch:1:waiters",
    STREAM,
    "channel:branch:2:kitchen",
    STREAM,
    "channel:branch:1:admin",
    STREAM,
    "channel:sector:1:5:waiters",
    STREAM,
    "channel:session:456",
    STREAM,
    "channel:tenant:2:admin",
    STREAM,
    "branch:2:waiters",
    STREAM,
    "branch:1:kitchen",
    STREAM,
    "branch:1:admin",
    STREAM,
    "sector:1:6:waiters",
    STREAM,
    "sector:5:waiters",
    STREAM,
    "session:457",
    STREAM,
    "tenant:1:admin",
)


@dataclass(frozen=True)
class Client:
    """A client of the matrix, and its audiences by the contract."""

    name: str
    endpoint: str
    is_a: str  # the letters of the table that may mean this client
    tenant: int = 1
    branch: int = 1
    sectors: tuple[int, ...] = ()
    role: str = ""
    session: int | None = None

    def url(self, gateway: Running) -> str:
        if self.session is not None:
            token = make_table_token(
                TABLE_SECRET,
                tenant_id=self.tenant,
                branch_id=self.branch,
                session_id=self.session,
            )
            return f"{gateway.url}/ws/diner?table_token={token}"
        token = make_jwt(
            JWT_SECRET,
            tenant_id=self.tenant,
            branch_ids=[self.branch],
            roles=[self.role],
            sector_ids=list(self.sectors),
        )
        return f"{gateway.url}/ws/{self.endpoint}?token={token}"

    def should_receive(self, event: "dict[str, Any]") -> bool:
        letters = set(TABLE[event["type"]].split()) & set(self.is_a)
        if event["tenant_id"] != self.tenant:
            return False
        if event["branch_id"] == 0:
            return "A" in letters
        here = event["branch_id"] == self.branch
        return (
            ("W" in letters and here and event["sector_id"] in {None, *self.sectors})
            or ("F" in letters and here)
            or ("K" in letters and here)
            or ("A" in letters and here)
            or ("B" in letters and here)
            # A session belongs to the tenant, whatever the branch in the diner's token.
            or ("D" in letters and event["session_id"] == self.session)
        )


def clients() -> Iterator[Client]:
    everywhere = {
        "waiter of the sector": partial(
            Client, endpoint="waiter", role="WAITER", is_a="WF", sectors=(SECTOR,)
        ),
        "waiter of another sector": partial(
            Client, endpoint="waiter", role="WAITER", is_a="WF", sectors=(OTHER_SECTOR,)
        ),
        "waiter without sectors": partial(Client, endpoint="waiter", role="WAITER", is_a="WF"),
        "manager as waiter": partial(Client, endpoint="waiter", role="MANAGER", is_a="WFA"),
        "admin as waiter": partial(
            Client, endpoint="waiter", role="ADMIN", is_a="WFA", sectors=(SECTOR, OTHER_SECTOR)
        ),
        "kitchen": partial(Client, endpoint="kitchen", role="KITCHEN", is_a="K"),
        "manager in the kitchen": partial(Client, endpoint="kitchen", role="MANAGER", is_a="K"),
        "admin in the kitchen": partial(Client, endpoint="kitchen", role="ADMIN", is_a="K"),
        "admin": partial(Client, endpoint="admin", role="ADMIN", is_a="A"),
        "manager": partial(Client, endpoint="admin", role="MANAGER", is_a="A"),
        "diner": partial(Client, endpoint="diner", is_a="DB", session=SESSION),
        "diner of another session": partial(
            Client, endpoint="diner", is_a="DB", session=OTHER_SESSION
        ),
    }
    places = {"here": (1, 1), "in another branch": (1, 2), "in another tenant": (2, 1)}
    for (who, make), (where, (tenant, branch)) in itertools.product(
        everywhere.items(), places.items()
    ):
        yield make(f"{who} {where}", tenant=tenant, branch=branch)


def events() -> Iterator[dict[str, Any]]:
    """All events, each with its own marker."""
    marker = itertools.count()
    for kind, branch, sector, session in itertools.product(
        TABLE, (1, 0), (SECTOR, None, NOBODYS_SECTOR), (SESSION, None)
    ):
        yield {
            "type": kind,
            "tenant_id": 1,
            "branch_id": branch,
            "sector_id": sector,
            "session_id": session,
            "entity": {"marker": next(marker)},
        }


@asynccontextmanager
async def connected(gateway: Running) -> AsyncIterator[dict[Client, WebSocketConnection]]:
    async with AsyncExitStack() as stack:
        yield {
            client: await stack.enter_async_context(admitted(client.url(gateway)))
            for client in clients()
        }


async def receive_all(
    sockets: dict[Client, WebSocketConnection],
) -> dict[Client, list[dict[str, Any]]]:
    received_by: dict[Client, list[dict[str, Any]]] = {}

    async def ask(client: Client, socket: WebSocketConnection) -> None:
        received_by[client] = await received(socket)

    async with trio.open_nursery() as nursery:
        for client, socket in sockets.items():
            nursery.start_soon(ask, client, socket)
    return received_by


def publish(
    backend: "redis.Redis", events: Sequence[dict[str, Any]], *, shift: int
) -> dict[str, list[dict[str, Any]]]:
    """Publish each event once, on alternating channels; returns the order of each source."""
    ways: dict[str, list[dict[str, Any]]] = {"stream": [], "pubsub": []}
    pipeline = backend.pipeline(transaction=False)
    for n, event in enumerate(events, shift):
        channel, payload = CHANNELS[n % len(CHANNELS)], json.dumps(event)
        if channel == STREAM:
            pipeline.xadd(STREAM, {"data": payload})
        else:
            pipeline.publish(channel, payload)
        ways["stream" if channel == STREAM else "pubsub"].append(event)
    pipeline.execute()
    return ways


def markers(events: Sequence[dict[str, Any]]) -> list[int]:
    return [event["entity"]["marker"] for event in events]


@pytest.mark.parametrize("transport", ["direct", "asgi"])
@pytest.mark.parametrize("shift", [0, 1])  # the second run exchanges stream and Pub/Sub
async def test_each_client_receives_exactly_its_events_once_and_in_order(
    backend: "redis.Redis", redis_url: str, transport: Transport, shift: int
) -> None:
    everything = list(events())
    async with (
        running(make_settings(redis_url), transport=transport) as gateway,
        connected(gateway) as sockets,
    ):
        ways = publish(backend, everything, shift=shift)
        await settle(gateway)
        received_by = await receive_all(sockets)
        figures = await metrics(gateway.port)

    by_marker = {event["entity"]["marker"]: event for event in everything}
    streamed = set(markers(ways["stream"]))
    for client, found in received_by.items():
        got = markers(found)
        for way, published in ways.items():
            here = [marker for marker in got if (marker in streamed) == (way == "stream")]
            expected = markers([event for event in published if client.should_receive(event)])
            wrong = [by_marker[marker] for marker in set(here) ^ set(expected)]
            assert not wrong, f"{client.name}, {way}"
            assert here == expected, f"{client.name}, {way}: not once, or not in order"
        # No event has gained or lost a key.
        for event in found:
            original = by_marker[event["entity"]["marker"]]
            assert {**event, "event_id": None} == {**original, "event_id": None}
    assert any(len(found) > 100 for found in received_by.values())
    assert all(not found for client, found in received_by.items() if client.tenant != 1)
    assert figures["events_processed_total"] == len(everything)
    assert figures["deliveries_total"] == sum(map(len, received_by.values()))
    assert figures["events_unknown_type_total"] == 12
    assert figures["events_duplicate_total"] == 0


@pytest.mark.parametrize("transport", ["direct", "asgi"])
async def test_staff_of_two_branches_receive_each_event_of_both_once(
    backend: "redis.Redis", redis_url: str, transport: Transport
) -> None:
    async with running(make_settings(redis_url), transport=transport) as gateway:
        both = partial(gateway.staff_url, branch_ids=[1, 2])
        async with (
            admitted(both("waiter", sector_ids=[SECTOR])) as waiter,
            admitted(both("waiter", roles=["MANAGER", "WAITER"])) as manager,
            admitted(both("kitchen")) as kitchen,
            admitted(both("admin")) as admin,
        ):
            for n, (branch, kind) in enumerate(
                itertools.product((1, 2, 3, 0), ("ROUND_READY", "TABLE_SESSION_STARTED"))
            ):
                event = {
                    "type": kind,
                    "tenant_id": 1,
                    "branch_id": branch,
                    "sector_id": SECTOR,
                    "entity": {"marker": n},
                }
                backend.publish(f"branch:{branch}:admin", json.dumps(event))
            await settle(gateway)

            assert markers(await received(waiter)) == [0, 1, 2, 3]
            assert markers(await received(manager)) == [0, 1, 2, 3, 6, 7]
            assert markers(await received(kitchen)) == [0, 2]
            assert markers(await received(admin)) == [0, 1, 2, 3, 6, 7]


async def test_event_of_an_uncovered_sector_goes_to_the_branch_if_configured(
    backend: "redis.Redis", redis_url: str
) -> None:
    settings = make_settings(redis_url, ws_uncovered_sector="branch")
    async with (
        running(settings) as gateway,
        admitted(gateway.staff_url("waiter", sector_ids=[OTHER_SECTOR])) as waiter,
        admitted(gateway.staff_url("waiter", branch_ids=[2])) as elsewhere,
    ):
        for n, sector in enumerate((NOBODYS_SECTOR, OTHER_SECTOR, SECTOR)):
            event = {
                "type": "ROUND_READY",
                "tenant_id": 1,
                "branch_id": 1,
                "sector_id": sector,
                "entity": {"marker": n},
            }
            backend.xadd(STREAM, {"data": json.dumps(event)})
        await settle(gateway)

        assert markers(await received(waiter)) == [0, 1, 2]
        assert await received(elsewhere) == []
        assert (await metrics(gateway.port))["events_unheard_total"] == 2
