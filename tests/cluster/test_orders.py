"""Orders, against a real Valkey: each process carries out each once, also when it comes late."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import redis
import trio

from tests.support.gateways import open_commands, until
from trio_gateway.broker.commands import Commands
from trio_gateway.cluster.keys import Keys
from trio_gateway.cluster.orders import KEPT, Order, Orders
from trio_gateway.core.resilience import Breaker

KEYS = Keys()


class Worker:
    """The orders of one process, and what it has carried out."""

    def __init__(self, commands: Commands) -> None:
        self.orders = Orders(commands, KEYS)
        self.done: list[tuple[str, float]] = []

    async def run(self) -> None:
        await self.orders.run(self._carry_out)

    async def _carry_out(self, order: Order, given_at: float) -> None:
        await trio.lowlevel.checkpoint()
        self.done.append((order.id, given_at))

    @property
    def ids(self) -> list[str]:
        return [each for each, _ in self.done]


@asynccontextmanager
async def workers(url: str, number: int = 1) -> AsyncIterator[list[Worker]]:
    async with (
        open_commands(url, Breaker(5, 1), Breaker(5, 1), max_connections=5) as commands,
        trio.open_nursery() as nursery,
    ):
        found = [Worker(commands) for _ in range(number)]
        for each in found:
            nursery.start_soon(each.run)
        await trio.testing.wait_all_tasks_blocked()
        yield found
        nursery.cancel_scope.cancel()


def order(name: str) -> Order:
    return Order(name, "giver", "kind", b"{}")


def add(backend: "redis.Redis", name: str, entry: str = "*") -> str:
    """Add an order without a message about it."""
    fields: Any = {"id": name, "giver": "giver", "kind": "kind", "request": "{}"}
    added: Any = backend.xadd(KEYS.orders, fields, id=entry)
    return str(added.decode())


def now_of(backend: "redis.Redis") -> int:
    seconds, microseconds = backend.time()
    return int(seconds * 1000 + microseconds // 1000)


async def test_each_process_carries_out_each_order_once_and_in_order(
    redis_url: str, backend: "redis.Redis"
) -> None:
    names = [f"order {number}" for number in range(250)]
    async with workers(redis_url, 2) as (one, other):
        for name in names:
            await one.orders.give(order(name))
            one.orders.wake()
        other.orders.wake()
        await until(lambda: len(one.ids) == len(other.ids) == len(names))
        one.orders.wake()
        one.orders.read_again()
        await trio.sleep(0.1)
        assert one.ids == other.ids == names


async def test_messages_about_orders_that_were_read_already_change_nothing(
    redis_url: str, backend: "redis.Redis"
) -> None:
    async with workers(redis_url) as (one,):
        entries = [add(backend, name) for name in "abc"]
        one.orders.wake(entries[0])
        await until(lambda: len(one.ids) == 3)
        for entry in (*entries, "0-0", "no id", "1-1"):
            one.orders.wake(entry)
        await trio.sleep(0.1)
        assert one.ids == ["a", "b", "c"]


async def test_an_entry_that_is_no_order_is_skipped(redis_url: str, backend: "redis.Redis") -> None:
    async with workers(redis_url) as (one,):
        backend.xadd(KEYS.orders, {"data": "{}"})
        backend.xadd(KEYS.orders, {"id": b"\xff", "giver": "a", "kind": "b", "request": "{}"})
        add(backend, "an order")
        one.orders.wake()
        await until(lambda: one.ids == ["an order"])


async def test_a_process_begins_with_the_orders_since_its_start(
    redis_url: str, backend: "redis.Redis"
) -> None:
    add(backend, "before", str(now_of(backend) - 12_000))
    async with workers(redis_url) as (one,):
        add(backend, "meanwhile")
        await trio.sleep(0.2)
        one.orders.wake()
        await until(lambda: one.ids == ["meanwhile"])


async def test_the_time_of_an_order_is_that_of_redis(
    redis_url: str, backend: "redis.Redis"
) -> None:
    async with workers(redis_url) as (one,):
        one.orders.wake()
        await until(lambda: one.orders._after is not None)
        one.orders.read_again()
        add(backend, "late", str(now_of(backend) - 20_000))
        one.orders.wake()
        await until(lambda: one.done)
        assert 19.9 < trio.current_time() - one.done[0][1] < 25


async def test_orders_of_a_server_whose_clock_is_behind_are_carried_out(
    redis_url: str, backend: "redis.Redis"
) -> None:
    async with workers(redis_url) as (one,):
        first = add(backend, "first")
        one.orders.wake(first)
        await until(lambda: one.ids == ["first"])
        backend.flushall()  # another primary, without that order
        second = add(backend, "second", str(now_of(backend) - 30_000))
        one.orders.read_again()
        await until(lambda: one.ids == ["first", "second"])
        third = add(backend, "third", str(now_of(backend) - 20_000))
        assert third < first
        assert second < third
        one.orders.wake(third)
        await until(lambda: one.ids == ["first", "second", "third"])


async def test_orders_are_kept_for_an_hour(redis_url: str, backend: "redis.Redis") -> None:
    for number in range(500):  # Redis trims whole nodes of 100 entries
        add(backend, "old", f"{now_of(backend) - KEPT - 1000}-{number}")
    async with workers(redis_url) as (one,):
        await one.orders.give(order("new"))
    assert backend.xlen(KEYS.orders) < 200
    assert KEPT - 5000 < backend.pttl(KEYS.orders) <= KEPT


async def test_orders_are_read_when_redis_answers_again(
    redis_url: str, backend: "redis.Redis"
) -> None:
    async with workers(redis_url) as (one,):
        backend.set(KEYS.orders, "no stream")
        one.orders.wake()
        await trio.sleep(0.1)
        backend.delete(KEYS.orders)
        add(backend, "after it")
        await until(lambda: one.ids == ["after it"])
