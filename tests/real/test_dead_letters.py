"""Dead letters: invalid entries are copied once, and can be listed and replayed."""

from typing import Any

import pytest
import redis
import trio
from click.testing import CliRunner, Result

from e2e.chaos.relay import Way, open_relay
from tests.support.gateways import make_settings, open_commands, running, settle, until
from trio_gateway.broker.commands import Commands, Unavailable
from trio_gateway.cli import main
from trio_gateway.core.resilience import Breaker

STREAM = "events:critical"
GOOD = b'{"type":"ROUND_READY","tenant_id":1,"branch_id":1}'


def dlq(monkeypatch: pytest.MonkeyPatch, redis_url: str, *arguments: str) -> Result:
    monkeypatch.setenv("REDIS_URL", redis_url)
    return CliRunner().invoke(main, ["dlq", *arguments])


async def test_invalid_entry_is_copied_once_however_many_gateways_read_it(
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


async def test_dead_letters_are_written_only_if_configured(
    redis_url: str, backend: "redis.Redis"
) -> None:
    async with running(make_settings(redis_url)) as gateway:
        backend.xadd(STREAM, {"data": "no json"})
        await settle(gateway)

    assert not backend.exists("events:dlq")


LETTER: dict[str, str | bytes] = {"stream": STREAM, "entry_id": "1-1", "data": b"no json"}


async def put_aside(commands: Commands) -> bool:
    return await commands.add_once("gateway:dlq:x", 60, "events:dlq", LETTER, 10_000)


async def test_dead_letter_that_could_not_be_added_is_tried_again(
    redis_url: str, backend: "redis.Redis"
) -> None:
    backend.set("events:dlq", "no stream")
    breakers = Breaker(5, 30), Breaker(5, 30)
    async with open_commands(redis_url, *breakers, max_connections=1) as commands:
        with pytest.raises(Unavailable):
            await put_aside(commands)
        backend.delete("events:dlq")
        assert await put_aside(commands)
        assert not await put_aside(commands)
    assert backend.xlen("events:dlq") == 1


@pytest.mark.parametrize("fault", ["no stream", "no right"])
async def test_dead_letters_that_redis_refuses_do_not_affect_tickets(
    redis_url: str, backend: "redis.Redis", fault: str
) -> None:
    url = redis_url
    if fault == "no stream":
        backend.set("events:dlq", "no stream")
    else:
        backend.acl_setuser(
            "meek", enabled=True, reset=True, passwords="+pw", keys=["*"],
            categories=["+@all"], commands=["-eval"],
        )  # fmt: skip
        url = redis_url.replace("//", "//meek:pw@")
    async with open_commands(url, Breaker(2, 30), Breaker(2, 30), max_connections=1) as commands:
        for _ in range(8):
            with pytest.raises(Unavailable):
                await put_aside(commands)
        await commands.set_for("ticket", "token", 5)
        assert await commands.getdel("ticket") == b"token"


async def test_dead_letter_whose_reply_is_lost_is_added_once(
    redis_url: str, backend: "redis.Redis"
) -> None:
    breakers = Breaker(5, 30), Breaker(5, 30)
    async with open_relay(int(redis_url.rpartition(":")[2])) as relay:
        url = f"redis://127.0.0.1:{relay.port}"
        async with open_commands(url, *breakers, max_connections=1) as commands:
            await commands.mget(["a"])  # it is connected
            relay.vanish(Way.TO_CLIENT)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(put_aside, commands)
                await until(lambda: backend.exists("events:dlq"))
                relay.reset()
                relay.forward()
    assert backend.xlen("events:dlq") == 1


def put(backend: "redis.Redis", data: bytes) -> str:
    fields: Any = {
        "stream": STREAM, "entry_id": "1-1", "reason": "not_json", "error": "event is not JSON",
        "size": len(data), "data": data,
    }  # fmt: skip
    letter_id: Any = backend.xadd("events:dlq", fields)
    return str(letter_id.decode())


def test_dead_letters_are_listed_and_shown(
    redis_url: str, backend: "redis.Redis", monkeypatch: pytest.MonkeyPatch
) -> None:
    letter_id = put(backend, b"no json")

    assert f"{letter_id}  {STREAM} 1-1  not_json" in dlq(monkeypatch, redis_url, "list").output
    shown = dlq(monkeypatch, redis_url, "show", letter_id)
    assert shown.stdout == "no json\n"
    assert "reason: not_json" in shown.stderr
    assert dlq(monkeypatch, redis_url, "show", "5-5").exit_code == 1


def test_dead_letters_that_are_valid_now_are_replayed_and_the_rest_stays(
    redis_url: str, backend: "redis.Redis", monkeypatch: pytest.MonkeyPatch
) -> None:
    put(backend, GOOD)
    bad = put(backend, b"no json")

    result = dlq(monkeypatch, redis_url, "replay", "--all")

    assert result.exit_code == 1
    assert f"{bad}: event is not JSON" in result.stderr
    entries: Any = backend.xrange(STREAM)
    assert [fields for _, fields in entries] == [{b"data": GOOD}]
    left: Any = backend.xrange("events:dlq")
    assert [letter_id.decode() for letter_id, _ in left] == [bad]


def test_replay_requires_ids_or_all(
    redis_url: str, backend: "redis.Redis", monkeypatch: pytest.MonkeyPatch
) -> None:
    assert dlq(monkeypatch, redis_url, "replay").exit_code == 2
