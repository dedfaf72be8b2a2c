"""Floods of rejected clients: the log has one line a second of each kind."""

from collections import defaultdict

import structlog
import trio
from trio.testing import MockClock

from tests.support.gateways import make_settings
from tests.support.sockets import HEADS, in_memory
from trio_gateway.gateway import create_app

PER_SECOND = 20


async def test_flood_of_rejected_clients_logs_one_line_a_second_of_each_kind(
    autojump_clock: MockClock,
) -> None:
    app = create_app(make_settings("redis://127.0.0.1:1"))
    with structlog.testing.capture_logs() as logs:
        async with in_memory(app) as dial:
            for second in range(3):
                for n in range(PER_SECOND):
                    client = dial()
                    await client.send(HEADS["no key"].data)
                    await client.response()
                    await client.leave()
                    client = dial()
                    await client.upgrade(f"/ws/waiter?token={n}")
                    await client.leave()
                assert trio.current_time() < second + 1
                await trio.sleep(second + 1 - trio.current_time())

    lines = defaultdict(list)
    for each in logs:
        lines[each["event"], each["reason"]].append(each["held_back"])
    refused, rejected = lines.values()
    assert {event for event, _ in lines} == {"upgrade refused", "rejected"}
    assert refused == rejected == [0, PER_SECOND - 1, PER_SECOND - 1]
    assert app.parts.counts.refused[400] == app.parts.counts.rejected.total() == 3 * PER_SECOND
