"""Entries that are no events are put aside once, and can be looked at and replayed."""

from typing import Any

import pytest
import redis
from click.testing import CliRunner, Result
from harness import make_settings, running, settle, until

from trio_gateway.cli import main

STREAM = "events:critical"
GOOD = b'{"type":"ROUND_READY","tenant_id":1,"branch_id":1}'


def dlq(monkeypatch: pytest.MonkeyPatch, redis_url: str, *arguments: str) -> Result:
    monkeypatch.setenv("REDIS_URL", redis_url)
    return CliRunner().invoke(main, ["dlq", *arguments])


async def test_poison_is_put_aside_once_by_however_many_gateways(
    redis_url: str, backend: "redis.Redis"
) -> None:
    settings = make_settings(redis_url, redis_dlq_stream="events:dlq")
    async with running(settings) as one, running(settings) as other:
        entry: Any = backend.xadd(STREAM, {"data": "no json"})
        backend.xadd(STREAM, {"other": "field"})
        backend.xadd(STREAM, {"data": b"x" * 200_000})
        backend.xadd(STREAM, {"data": GOOD})
        backend.publish("branch:1:admin", "no json either")
        for gateway in (one, other):
            await settle(gateway)
        await until(lambda: backend.xlen("events:dlq") == 3)
        await settle(one)

        letters: Any = backend.xrange("events:dlq")
        reasons = [fields[b"reason"] for _, fields in letters]
        assert reasons == [b"not_json", b"no_data", b"too_big"]
        assert letters[0][1][b"entry_id"] == entry
        assert letters[0][1][b"data"] == b"no json"
        assert letters[2][1][b"size"] == b"200000"


async def test_no_letter_is_written_unless_it_is_asked_for(
    redis_url: str, backend: "redis.Redis"
) -> None:
    async with running(make_settings(redis_url)) as gateway:
        backend.xadd(STREAM, {"data": "no json"})
        await settle(gateway)

    assert not backend.exists("events:dlq")


def put(backend: "redis.Redis", data: bytes) -> str:
    fields: Any = {
        "stream": STREAM, "entry_id": "1-1", "reason": "not_json", "error": "event is not JSON",
        "size": len(data), "data": data,
    }  # fmt: skip
    letter_id: Any = backend.xadd("events:dlq", fields)
    return str(letter_id.decode())


def test_letters_are_listed_and_shown(
    redis_url: str, backend: "redis.Redis", monkeypatch: pytest.MonkeyPatch
) -> None:
    letter_id = put(backend, b"no json")

    assert f"{letter_id}  {STREAM} 1-1  not_json" in dlq(monkeypatch, redis_url, "list").output
    shown = dlq(monkeypatch, redis_url, "show", letter_id)
    assert shown.stdout == "no json\n"
    assert "reason: not_json" in shown.stderr
    assert dlq(monkeypatch, redis_url, "show", "5-5").exit_code == 1


def test_what_is_an_event_by_now_is_replayed_and_the_rest_stays(
    redis_url: str, backend: "redis.Redis", monkeypatch: pytest.MonkeyPatch
) -> None:
    put(backend, GOOD)
    bad = put(backend, b"no json")

    result = dlq(monkeypatch, redis_url, "replay", "--all")

    assert result.exit_code == 1
    assert f"{bad} stays: event is not JSON" in result.stderr
    entries: Any = backend.xrange(STREAM)
    assert [fields for _, fields in entries] == [{b"data": GOOD}]
    left: Any = backend.xrange("events:dlq")
    assert [letter_id.decode() for letter_id, _ in left] == [bad]


def test_replay_wants_to_be_told_what(
    redis_url: str, backend: "redis.Redis", monkeypatch: pytest.MonkeyPatch
) -> None:
    assert dlq(monkeypatch, redis_url, "replay").exit_code == 2
