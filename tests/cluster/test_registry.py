"""The registry, against a real Valkey: who is alive, and what a beat tells."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import redis
import trio
from trio.testing import wait_all_tasks_blocked

from tests.support.gateways import open_commands
from trio_gateway.broker.commands import Commands, Unavailable
from trio_gateway.cluster.keys import Keys
from trio_gateway.cluster.liveness import NAMES
from trio_gateway.cluster.registry import _BEAT, Registry, make_name
from trio_gateway.core.control_messages import Node
from trio_gateway.core.resilience import Breaker

KEYS = Keys()
MS = 1000


@asynccontextmanager
async def open_registries(url: str, *names: str) -> AsyncIterator[list[Registry]]:
    """Registries of several processes; none of them beats by itself."""
    async with open_commands(url, Breaker(5, 1), Breaker(5, 1), max_connections=5) as commands:
        yield [registry(commands, name) for name in names]


@asynccontextmanager
async def alive(url: str, backend: "redis.Redis", *names: str) -> AsyncIterator[list[Registry]]:
    """Registries that have beaten, in this order, while Redis was there all the time."""
    async with open_registries(url, *names) as found:
        for each in found:
            await each.beat()
        backend.delete(KEYS.gap)
        yield found


def registry(commands: Commands, name: str) -> Registry:
    found = Registry(name, commands, KEYS, lambda: Node(name, "1", 5.0, connections=len(name)))
    found.forgotten = 0  # type: ignore[attr-defined]

    def forgotten() -> None:
        found.forgotten += 1  # type: ignore[attr-defined]

    found.on_forgotten.append(forgotten)
    return found


def times_forgotten(of: Registry) -> int:
    return int(of.forgotten)  # type: ignore[attr-defined]


def age(backend: "redis.Redis", seconds: float, *names: str) -> None:
    """Let beats be older than they are."""
    for name in names:
        backend.zincrby(KEYS.nodes, -seconds * MS, name)


async def alive_by_script(of: Registry) -> set[str]:
    found = await of._commands.evaluate(NAMES + "return names", [KEYS.nodes, KEYS.gap])
    return {name.decode() for name in found}


async def test_a_process_is_alive_for_seven_seconds_after_its_beat(
    redis_url: str, backend: "redis.Redis"
) -> None:
    async with alive(redis_url, backend, "a", "bb") as (one, _):
        age(backend, 6.5, "bb")
        assert await one.read() == {
            "a": Node("a", "1", 5.0, connections=1), "bb": Node("bb", "1", 5.0, connections=2)
        }  # fmt: skip
        age(backend, 0.5, "bb")
        assert (await one.read()).keys() == {"a"}
        backend.delete(KEYS.gap)
        await one.beat()
        assert one.nodes.keys() == {"a"}


async def test_who_was_forgotten_is_told(redis_url: str, backend: "redis.Redis") -> None:
    async with open_registries(redis_url, "a", "b") as (one, other):
        await one.beat()
        assert times_forgotten(one) == 1  # the first beat
        await one.beat()
        await other.beat()
        assert (times_forgotten(one), times_forgotten(other)) == (1, 1)
        age(backend, 8, "a")  # it was paused
        await one.beat()
        await other.beat()
        assert (times_forgotten(one), times_forgotten(other)) == (2, 1)
        backend.flushall()
        await one.beat()
        assert times_forgotten(one) == 3


async def test_when_redis_has_lost_its_data_the_others_stay_known_until_they_can_beat(
    redis_url: str, backend: "redis.Redis"
) -> None:
    async with open_registries(redis_url, "a", "b") as (one, other):
        await other.beat()
        await one.beat()
        backend.flushall()
        await one.beat()
        assert one.nodes.keys() == {"a", "b"}
        assert (await one.read()).keys() == {"a"}
        backend.delete(KEYS.gap)  # 7 s later
        await one.beat()
        assert one.nodes.keys() == {"a"}


async def test_while_redis_was_away_nobody_died(redis_url: str, backend: "redis.Redis") -> None:
    async with alive(redis_url, backend, "dead", "a", "b") as (_, one, _):
        age(backend, 8, "dead")
        assert await alive_by_script(one) == {"a", "b"}
        age(backend, 20, "a", "b", "dead")  # frozen for 20 s; "b" beats later than "a"
        assert await alive_by_script(one) == {"a", "b"}
        one._failed = True
        await one.beat()
        assert times_forgotten(one) == 1  # what it has in Redis is still there, and was kept
        assert await alive_by_script(one) == {"a", "b"}
        assert 6000 < backend.pttl(KEYS.gap) <= 7000
        backend.delete(KEYS.gap)
        assert await alive_by_script(one) == {"a"}


async def test_processes_that_died_together_do_not_live_again(
    redis_url: str, backend: "redis.Redis"
) -> None:
    async with (
        alive(redis_url, backend, "old"),
        open_registries(redis_url, "new") as (new,),
    ):
        age(backend, 8, "old")
        await new.beat()  # Redis was there all the time
        assert await alive_by_script(new) == {"new"}


async def test_a_clock_that_was_set_back_keeps_nobody_alive(
    redis_url: str, backend: "redis.Redis"
) -> None:
    async with alive(redis_url, backend, "b", "a") as (_, one):
        age(backend, -3600, "b")
        await one.beat()
        age(backend, 7, "b")
        assert await alive_by_script(one) == {"a"}


async def test_who_leaves_is_gone_at_once_and_does_not_come_back(
    redis_url: str, backend: "redis.Redis"
) -> None:
    async with alive(redis_url, backend, "a", "b") as (one, other):
        async with trio.open_nursery() as nursery:
            await other.leave()
            nursery.start_soon(other.run)
            await trio.sleep(0.1)
            nursery.cancel_scope.cancel()
        assert (await one.read()).keys() == {"a"}
        for key in (KEYS.states, KEYS.settings):
            fields: Any = backend.hgetall(key)
            assert fields.keys() == {b"a"}


async def test_beat_that_comes_to_redis_late_does_not_bring_back_who_leaves(
    redis_url: str, backend: "redis.Redis", monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_registries(redis_url, "a") as (one,):
        evaluate = one._commands.evaluate

        async def late(script: str, *args: Any, **options: Any) -> Any:
            if script == _BEAT:
                await trio.sleep(0.05)
            reply = await evaluate(script, *args, **options)
            if script == _BEAT:
                await trio.sleep(0.2)
            return reply

        monkeypatch.setattr(one._commands, "evaluate", late)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(one.run)
            await wait_all_tasks_blocked()
            await one.leave()
            await trio.sleep(0.1)
            nursery.cancel_scope.cancel()
    assert backend.zcard(KEYS.nodes) == 0


async def test_the_state_of_the_dead_is_deleted_after_a_minute(
    redis_url: str, backend: "redis.Redis"
) -> None:
    async with alive(redis_url, backend, "a", "b") as (one, _):
        age(backend, 66, "b")
        await one.beat()
        assert backend.zcard(KEYS.nodes) == 2
        age(backend, 2, "b")
        await one.beat()
        assert one.lost == 1
        fields: Any = backend.hgetall(KEYS.states)
        assert fields.keys() == {b"a"}
        assert backend.zcard(KEYS.nodes) == 1


async def test_a_state_of_another_version_is_a_live_process(
    redis_url: str, backend: "redis.Redis"
) -> None:
    async with open_registries(redis_url, "a", "b") as (one, other):
        await other.beat()
        backend.hset(KEYS.states, "b", '{"name":5}')
        await one.beat()
        assert one.nodes["b"] == Node("b")


async def test_without_redis_the_last_known_processes_stay() -> None:
    async with open_registries("redis://127.0.0.1:1", "a") as (one,):
        one._others = {"b": Node("b")}
        with pytest.raises(Unavailable):
            await one.beat()
        assert one.nodes.keys() == {"a", "b"}


def test_a_name_fits_into_a_channel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "ñ*x y" + "z" * 100)
    name = make_name()
    assert name.startswith("--x-yzzz")
    assert len(name) < 100
    assert make_name() != name


@pytest.mark.parametrize(
    ("stream", "is_cluster", "prefix"),
    [
        (None, True, "{gateway}:"),
        ("presence", False, "{gateway}:"),
        ("presence", True, "{presence}:gateway:"),
        ("users:{p}", True, "{p}:gateway:"),
    ],
)
def test_in_a_cluster_all_keys_are_in_the_slot_of_the_presence_stream(
    stream: str | None, is_cluster: bool, prefix: str
) -> None:
    assert Keys(stream, is_cluster=is_cluster).nodes == f"{prefix}nodes"
