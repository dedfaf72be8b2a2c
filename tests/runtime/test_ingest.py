"""Ingest: every payload is checked, counted by its source, and rejected with a reason."""

import trio
from structlog.testing import capture_logs
from trio.testing import MockClock

from trio_gateway.core.event_ids import Position, Stream
from trio_gateway.runtime.ingest import Ingest
from trio_gateway.runtime.source import Entry
from trio_gateway.testing import make_payload


async def test_event_is_counted_by_its_source(autojump_clock: MockClock) -> None:
    ingest = Ingest()
    await trio.sleep(7)

    [event] = ingest.parse_messages([("sector:5:waiters", make_payload())])

    assert (event.type, event.channel, event.received_at) == ("ROUND_READY", "sector:5:waiters", 7)
    assert ingest.received == {"pubsub": 1}
    assert not ingest.invalid


async def test_invalid_payload_is_counted_by_reason_and_logged_without_its_content(
    autojump_clock: MockClock,
) -> None:
    ingest = Ingest()

    with capture_logs() as logs:
        for payload in (make_payload(tenant_id=..., data="secret"), b"secret"):
            entries = [Entry(Position((1, 0)), payload)]
            assert not ingest.parse_entries(
                entries, channel="s", stream=Stream("aaaa"), durable_types=()
            )

    assert ingest.received == {"stream": 2}
    assert ingest.invalid == {"tenant_id": 1, "not_json": 1}
    assert [log["reason"] for log in logs] == ["tenant_id", "not_json"]
    assert {log["entry_id"] for log in logs} == {"1-0"}
    assert "secret" not in str(logs)


async def test_flood_of_invalid_payloads_is_logged_once_a_second(
    autojump_clock: MockClock,
) -> None:
    ingest = Ingest()

    with capture_logs() as logs:
        for _ in range(3):
            for _ in range(1000):
                ingest.parse_messages([("c", b"nonsense")])
            await trio.sleep(1)

    assert ingest.invalid == {"not_json": 3000}
    assert [log["held_back"] for log in logs] == [0, 999, 999]
