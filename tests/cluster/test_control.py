"""Control, against a real Valkey: which processes it expects to answer, and what it reads."""

import msgspec
import pytest
import redis
import trio

from tests.cluster.test_registry import KEYS, age, open_registries
from trio_gateway.cluster.control import Control
from trio_gateway.cluster.questions import Answers
from trio_gateway.core.control_messages import (
    Disconnected,
    Hello,
    Node,
    Revoked,
    SectorsChanged,
    read_control_message,
)


async def test_a_process_that_was_killed_is_missing_for_seven_seconds(
    redis_url: str, backend: "redis.Redis"
) -> None:
    async with open_registries(redis_url, "a", "dead") as (one, dead):
        control = Control(one._commands, KEYS, one, lambda: True)

        async def missing() -> list[list[str]]:
            asked = await control.ask("hello", Hello(), timeout=0.1)
            told = await control.order("hello", Hello(), timeout=0.1)
            return [asked.missing, told.missing]

        await dead.beat()
        await one.beat()
        backend.delete(KEYS.gap)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(control.run)
            control.handle_order("hello", Hello, _do_nothing)
            age(backend, 6, "dead")
            assert await missing() == [["dead"]] * 2
            age(backend, 1, "dead")
            assert one.nodes.keys() == {"a", "dead"}  # until the next beat of this process
            assert await missing() == [[], []]
            backend.flushall()
            assert await missing() == [["dead"]] * 2  # it may not have beaten again
            nursery.cancel_scope.cancel()


def test_an_answer_of_another_version_counts_as_missing() -> None:
    given = {"a": b'{"closed":2}', "b": b'{"shut":2}', "d": b'{"closed":1}'}
    answers = Answers({name: msgspec.Raw(each) for name, each in given.items()}, ["c"])
    assert dict(answers.decoded(Disconnected)) == {"a": Disconnected(2), "d": Disconnected(1)}
    assert answers.missing == ["b", "c"]
    assert not answers.complete


@pytest.mark.parametrize("text", [b'{"name":"\xff"}', b'{"name":5}'])
def test_an_answer_that_is_not_text_counts_as_missing_too(text: bytes) -> None:
    answers = Answers({"a": msgspec.Raw(text)})
    assert list(answers.decoded(Node)) == []
    assert answers.missing == ["a"]


async def _do_nothing(_order: Hello, _given_at: float) -> None:
    await trio.lowlevel.checkpoint()


@pytest.mark.parametrize("user", ["21\n", "21x", "", "\u0661"])
def test_a_user_that_is_no_number_is_not_read(user: str) -> None:
    for kind, fields in ((Revoked, {"user_id": user}), (SectorsChanged, {"waiter_id": user})):
        message = msgspec.json.encode({"tenant_id": 1, **fields})
        with pytest.raises(ValueError, match="not a"):
            read_control_message(message, kind)
