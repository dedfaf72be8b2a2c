"""Catch-up over HTTP: in pages, without delay for other clients."""

import json
import math
import time
from collections.abc import AsyncIterator
from itertools import chain
from typing import Any, Final

import pytest
import trio

from tests.support.gateways import JWT_SECRET, TABLE_SECRET, Running, http, serving, until
from tests.support.sockets import dialled
from tests.support.stopwatch import Stopwatch
from trio_gateway.core.audiences import BranchId, TenantId, admins, diners
from trio_gateway.core.event_ids import Position, event_id, tag
from trio_gateway.runtime.resume import PATIENCE
from trio_gateway.testing import make_event, make_jwt, make_table_token
from trio_gateway.web import catchup
from trio_gateway.web.catchup import PAGE_BYTES

STREAM: Final = tag("events:critical")
TOKEN: Final = make_jwt(JWT_SECRET, roles=["ADMIN"])
MINE: Final = f"/ws/catchup?branch_id=1&token={TOKEN}&since="
TABLE: Final = f"/ws/catchup/session?session_id=456&table_token={make_table_token(TABLE_SECRET)}"
AUDIENCES: Final = (admins(TenantId(1), BranchId(1)), diners(TenantId(1), 456))  # type: ignore[arg-type]


@pytest.fixture
async def gateway(redis_url: str) -> AsyncIterator[Running]:
    async with serving(redis_url, "direct") as found:
        yield found


def fill(gateway: Running, events: int, size: int) -> list[Position]:
    """Add events of about this size, numbered from 0, to the history; return their positions."""
    history, now = gateway.app.parts.history, trio.current_time()
    first = int(time.time() * 1000) - events
    positions = [Position((first + n, 0)) for n in range(events)]
    for n, position in enumerate(positions):
        event = make_event(n=n, data="x" * size, received_at=now, stream=STREAM, position=position)
        history.add(event, AUDIENCES, now=now)
        history.extent.advance(STREAM, position)
    return positions


async def pages(gateway: Running, path: str, since: object) -> list[list[int]]:
    """The numbers of the events on each page."""
    found: list[list[int]] = []
    while since is not None:
        reply = await http(gateway.port, f"{path}{since}")
        assert reply.status == 200
        assert "gateway-complete" not in reply.headers
        assert len(reply.text) <= PAGE_BYTES
        body = reply.json
        assert body["count"] == len(body["events"])
        since = body.get("next")
        found.append([event["n"] for event in body["events"]])
    return found


@pytest.mark.parametrize(("events", "size"), [(9_000, 300), (40, 60_000), (3, 10), (0, 0)])
@pytest.mark.parametrize("path", [MINE, f"{TABLE}&since="])
async def test_pages_contain_every_event_once_and_in_order(
    gateway: Running, path: str, events: int, size: int
) -> None:
    positions = fill(gateway, events, size)
    found = await pages(gateway, path, 0)
    assert list(chain(*found)) == list(range(events))
    if events:
        by_time = await pages(gateway, path, positions[0][0] / 1000)
        assert list(chain(*by_time)) == list(range(events))
    full = events * (size + 150) // PAGE_BYTES
    assert full <= len(found) <= full + 2
    if events > 3:
        middle = events // 2
        rest = await pages(gateway, path, event_id(STREAM, positions[middle]))
        assert list(chain(*rest)) == list(range(middle + 1, events))


async def test_pages_since_a_time_do_not_wait_for_a_stream_without_events(redis_url: str) -> None:
    two = ("events:critical", "events:other")
    async with serving(redis_url, "direct", redis_streams=two) as gateway:
        fill(gateway, 40, 60_000)
        watch = Stopwatch()
        found = await pages(gateway, MINE, time.time() - 60)
        assert list(chain(*found)) == list(range(40))
        assert len(found) > 1
        assert watch.net < PATIENCE


class LongestStep(trio.abc.Instrument):
    """The most CPU time between two checkpoints of a task."""

    seconds = 0.0
    _began = math.inf  # the step that adds it is not measured

    def before_task_step(self, task: Any) -> None:
        self._began = time.thread_time()

    def after_task_step(self, task: Any) -> None:
        self.seconds = max(self.seconds, time.thread_time() - self._began)


async def test_many_concurrent_requests_delay_no_other_client(gateway: Running) -> None:
    fill(gateway, 30_000, 100)
    statuses: list[int] = []

    async def ask() -> None:
        statuses.append((await http(gateway.port, f"{MINE}0")).status)

    trio.lowlevel.add_instrument(longest := LongestStep())
    async with trio.open_nursery() as nursery:
        for _ in range(8):
            nursery.start_soon(ask)
    trio.lowlevel.remove_instrument(longest)
    assert statuses == [200] * 8
    assert longest.seconds < 0.05
    await until(lambda: not gateway.app.parts.catch_ups._there)


async def test_transfer_in_progress_has_no_time_limit_and_a_disconnect_frees_its_slot(
    gateway: Running,
) -> None:
    assert gateway.app.config["RESPONSE_TIMEOUT"] is None  # Quart has one for the whole response
    fill(gateway, 18, 50_000)
    request = f"GET {MINE}0 HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n".encode()
    async with dialled(gateway.port, receive_buffer=4096) as slow:
        await slow.send(request)
        received = b""
        with trio.fail_after(8):
            while chunk := await slow.stream.receive_some(4096):
                received += chunk
                await trio.sleep(0.003)
    assert received.count(b'"n":') == 18
    assert b'],"count":18}' in received

    fill(gateway, 200, 60_000)
    async with dialled(gateway.port, receive_buffer=4096) as client:
        await client.send(request)
        await until(lambda: gateway.app.parts.catch_ups._there)
    await until(lambda: not gateway.app.parts.catch_ups._there)


async def test_request_beyond_the_history_is_marked_incomplete(
    gateway: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catchup, "PATIENCE", 0.05)
    newest = fill(gateway, 3, 10)[-1]
    ahead = Position((newest[0] + 1000, 0))
    for since in (event_id(STREAM, ahead), event_id(tag("another"), newest), "0-0-none"):
        reply = await http(gateway.port, f"{MINE}{since}")
        assert (reply.status, reply.json["count"]) == (200, 0)
        assert reply.headers["gateway-complete"] == "false"
    nobodys = Position((newest[0] - 1, 7))  # an entry that a new primary lacks, or of nowhere
    reply = await http(gateway.port, f"{MINE}{event_id(STREAM, nobodys)}")
    assert (reply.json["count"], reply.headers["gateway-complete"]) == (1, "false")

    gateway.app.parts.history.forget(STREAM)  # as before the first entry was read
    for since in ("0", event_id(STREAM, newest)):
        for path in (MINE, f"{TABLE}&since="):
            reply = await http(gateway.port, f"{path}{since}")
            assert (reply.status, reply.headers["retry-after"]) == (503, "1")


async def test_next_page_is_marked_incomplete_if_the_history_moved_past_it(
    gateway: Running,
) -> None:
    fill(gateway, 18, 50_000)
    history = gateway.app.parts.history
    body = catchup._page(gateway.app.parts, {STREAM: Position((1, 0))}, {}, frozenset(AUDIENCES))
    first = await anext(body)
    history.most_events = 1
    history.trim(trio.current_time())
    text = first + b"".join([piece async for piece in body])
    since = json.loads(text)["next"]
    reply = await http(gateway.port, f"{MINE}{since}")
    assert reply.headers["gateway-complete"] == "false"
    assert [event["n"] for event in reply.json["events"]] == [17]


async def test_request_over_the_concurrency_limit_is_429(
    gateway: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateway.app.parts.catch_ups, "_most", 0)
    monkeypatch.setattr(gateway.app.parts.catch_ups, "_patience", 0.05)
    reply = await http(gateway.port, f"{MINE}0")
    assert (reply.status, reply.headers["retry-after"]) == (429, "1")
