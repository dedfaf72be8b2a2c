"""The 39 sample events, published on their channels to a real gateway."""

import re
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from importlib.resources import files

import msgspec
import pytest
import redis
from trio_websocket import WebSocketConnection

from tests.support.gateways import (
    Running,
    Transport,
    admitted,
    make_settings,
    metrics,
    received_texts,
    running,
    settle,
)

STREAM = "events:critical"


class Sample(msgspec.Struct):
    """A line of the file; the event as it is written there, byte for byte."""

    channel: str
    event: msgspec.Raw


_FILE = files("trio_gateway") / "data" / "events.jsonl"
SAMPLES = [
    msgspec.json.decode(line, type=Sample) for line in _FILE.read_bytes().splitlines() if line
]

# Copies of the line before them, on another channel, with another ``ts``.
COPIES = {9: 8, 17: 16, 22: 21, 23: 21, 34: 33}


def lines(text: str) -> list[int]:
    """``"1-3 7"`` is 1, 2, 3, 7."""
    return [n for part in text.split() for n in _span(*part.split("-"))]


def _span(first: str, last: str = "") -> Iterator[int]:
    yield from range(int(first), int(last or first) + 1)


# Lines that each client should receive, by hand from the contract's table.
HEARD = {
    "waiter of sector 5": "1-6 8 10-16 18-21 24 27-28 33",
    "waiter of sector 6": "1 7 14-16 18-21 25-28 33",
    "waiter of both sectors": "1-8 10-16 18-21 24-28 33",
    "waiter without sectors": "1 14-16 18-21 27-28 33",
    "manager as waiter": "1-8 10-16 18-21 24-28 33 35-37",
    "kitchen": "4-5 7-8 10 27-28 33",
    "manager in the kitchen": "4-5 7-8 10 27-28 33",
    "manager": "1-8 10-16 18-21 24-28 33 35-37",
    "admin": "1-8 10-16 18-21 24-28 33 35-37",
    "diner of session 456": "1-6 8 10 12-16 18-20 24 29-33",
    "diner of session 457": "21 33",
    "diner of session 460": "7 26 33",
    "waiter of branch 2": "",
    "kitchen of branch 2": "",
    "admin of branch 2": "36-37",
    "diner in branch 2": "",
    "waiter of tenant 2, sector 40": "38-39",
    "waiter of tenant 2, sector 5": "38-39",
    "kitchen of tenant 2": "",
    "admin of tenant 2": "38-39",
    "admin of tenant 2, branch 1": "",
    "diner of tenant 2": "38",
    "diner of tenant 2, session 456": "",
}


def urls(gateway: Running) -> Mapping[str, str]:
    staff, diner = gateway.staff_url, gateway.diner_url
    second = {"tenant_id": 2, "branch_ids": [7]}
    return {
        "waiter of sector 5": staff("waiter", sector_ids=[5]),
        "waiter of sector 6": staff("waiter", sector_ids=[6]),
        "waiter of both sectors": staff("waiter", sector_ids=[5, 6]),
        "waiter without sectors": staff("waiter"),
        "manager as waiter": staff("waiter", roles=["MANAGER"]),
        "kitchen": staff("kitchen"),
        "manager in the kitchen": staff("kitchen", roles=["MANAGER"]),
        "manager": staff("admin", roles=["MANAGER"]),
        "admin": staff("admin"),
        "diner of session 456": diner(session_id=456),
        "diner of session 457": diner(session_id=457),
        "diner of session 460": diner(session_id=460),
        "waiter of branch 2": staff("waiter", branch_ids=[2], sector_ids=[5, 6]),
        "kitchen of branch 2": staff("kitchen", branch_ids=[2]),
        "admin of branch 2": staff("admin", branch_ids=[2]),
        "diner in branch 2": diner(branch_id=2, session_id=500),
        "waiter of tenant 2, sector 40": staff("waiter", sector_ids=[40], **second),
        "waiter of tenant 2, sector 5": staff("waiter", sector_ids=[5], **second),
        "kitchen of tenant 2": staff("kitchen", **second),
        "admin of tenant 2": staff("admin", **second),
        "admin of tenant 2, branch 1": staff("admin", tenant_id=2, branch_ids=[1]),
        "diner of tenant 2": diner(tenant_id=2, branch_id=7, session_id=9100),
        "diner of tenant 2, session 456": diner(tenant_id=2, branch_id=1, session_id=456),
    }


@asynccontextmanager
async def all_clients(gateway: Running) -> AsyncIterator[dict[str, WebSocketConnection]]:
    async with AsyncExitStack() as stack:
        yield {
            who: await stack.enter_async_context(admitted(url))
            for who, url in urls(gateway).items()
        }


def numbers(found: list[str]) -> list[int]:
    """The numbers of the lines that a client received; each is compared byte for byte."""
    return [_number(text) for text in found]


_TEXTS = [str(bytes(sample.event), "utf-8") for sample in SAMPLES]
_EVENT_ID = re.compile(r',"event_id":"[^"\\]+"}$')


def _number(text: str) -> int:
    as_published = _EVENT_ID.sub("}", text)
    number = _TEXTS.index(as_published) + 1
    # Events of the stream are durable and gain this key at their end.
    assert (as_published != text) == (SAMPLES[number - 1].channel == STREAM), text
    return number


def play(backend: "redis.Redis", sample: Sample) -> None:
    if sample.channel == STREAM:
        backend.xadd(STREAM, {"data": bytes(sample.event)})
    else:
        backend.publish(sample.channel, bytes(sample.event))


@pytest.mark.parametrize("transport", ["direct", "asgi"])
async def test_each_client_receives_its_samples_byte_for_byte(
    backend: "redis.Redis", redis_url: str, transport: Transport
) -> None:
    assert len(SAMPLES) == 39
    async with (
        running(make_settings(redis_url), transport=transport) as gateway,
        all_clients(gateway) as clients,
    ):
        for sample in SAMPLES:
            play(backend, sample)
            await settle(gateway)  # one after the other, so that the order is known
        received_by = {who: await received_texts(client) for who, client in clients.items()}
        figures = await metrics(gateway.port)

    for who, found in received_by.items():
        assert numbers(found) == lines(HEARD[who]), who
    assert figures["events_received_total{stream}"] == 18
    assert figures["events_received_total{pubsub}"] == 21
    assert figures["events_duplicate_total"] == len(COPIES)
    assert figures["events_processed_total"] == 39 - len(COPIES)
    assert figures["events_invalid_total"] == 0
    assert figures["deliveries_total"] == sum(map(len, received_by.values()))


@pytest.mark.parametrize("transport", ["direct", "asgi"])
async def test_samples_played_all_at_once_reach_the_same_clients(
    backend: "redis.Redis", redis_url: str, transport: Transport
) -> None:
    async with (
        running(make_settings(redis_url), transport=transport) as gateway,
        all_clients(gateway) as clients,
    ):
        for sample in SAMPLES:
            play(backend, sample)
        await settle(gateway)
        received_by = {who: await received_texts(client) for who, client in clients.items()}

    for who, found in received_by.items():
        got = numbers(found)
        # If an event came over both sources, either copy may have been the first.
        assert sorted(COPIES.get(n, n) for n in got) == lines(HEARD[who]), who
        for way in (True, False):  # each source keeps its order
            here = [n for n in got if (SAMPLES[n - 1].channel == STREAM) is way]
            assert here == sorted(here), who


async def test_samples_played_again_are_new_events(backend: "redis.Redis", redis_url: str) -> None:
    """The same content twice on one channel is two events, and copies pair off with each."""
    async with (
        running(make_settings(redis_url)) as gateway,
        admitted(gateway.staff_url("waiter", sector_ids=[5])) as waiter,
    ):
        for sample in SAMPLES * 2:
            play(backend, sample)
            await settle(gateway)

        assert numbers(await received_texts(waiter)) == lines(HEARD["waiter of sector 5"]) * 2
