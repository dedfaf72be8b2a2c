"""A failover that leaves old connections open: every part finds the new primary."""

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import redis
import trio

from tests.support.gateways import (
    JWT_SECRET,
    Running,
    admitted,
    http,
    make_settings,
    open_commands,
    receive_event,
    running,
    until,
    valkey,
)
from tests.support.redis_server import QUICK_REPLICA, RedisServer
from trio_gateway.broker.commands import Unavailable
from trio_gateway.core.control_messages import SectorsChanged
from trio_gateway.core.resilience import Breaker
from trio_gateway.publisher import AsyncPublisher, Publisher, PublishFailed
from trio_gateway.publisher import links as publisher_links
from trio_gateway.testing import make_jwt

STREAM = "events:critical"
EVENT = {"type": "ROUND_READY", "tenant_id": 1, "branch_id": 1}
BEARER = {"Authorization": f"Bearer {make_jwt(JWT_SECRET, roles=['WAITER'])}"}


class Name:
    """A name that new connections resolve to one server first, and to another one later."""

    def __init__(self, one: RedisServer, other: RedisServer) -> None:
        self.one, self.other = one, other
        self.admins = redis.Redis(port=one.port), redis.Redis(port=other.port)
        self.target = one.port
        self.url = "redis://redis.test:6379"

    def resolve(self, *arguments: Any) -> list[Any]:
        kind = (socket.AF_INET, socket.SOCK_STREAM, 6, "")
        return [(*kind, ("127.0.0.1", self.target))]

    def fail_over(self, *, name_too: bool = True) -> None:
        """The old primary becomes a replica of the new one, and closes no connection."""
        old, new = self.admins
        new.replicaof("NO", "ONE")
        old.replicaof("127.0.0.1", str(self.other.port))
        if name_too:
            self.target = self.other.port

    def links(self) -> list[int]:
        """The number of the gateway's connections to each server."""
        clients = [admin.client_list() for admin in self.admins]
        return [sum(each["name"] == "trio-gateway" for each in found) for found in clients]


@contextmanager
def pair() -> Iterator[tuple[RedisServer, RedisServer]]:
    with valkey(**QUICK_REPLICA) as one, valkey(**QUICK_REPLICA) as other:
        with redis.Redis(port=other.port) as replica:
            replica.replicaof("127.0.0.1", str(one.port))
        yield one, other


@pytest.fixture
def name(monkeypatch: pytest.MonkeyPatch) -> Iterator[Name]:
    with pair() as servers:
        found = Name(*servers)
        before = socket.getaddrinfo

        def getaddrinfo(host: Any, *arguments: Any, **options: Any) -> list[Any]:
            if host in ("redis.test", b"redis.test"):
                return found.resolve()
            return before(host, *arguments, **options)

        monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
        while found.admins[1].info("replication")["master_link_status"] != "up":
            time.sleep(0.01)
        yield found
        for admin in found.admins:
            admin.close()


async def ready(gateway: Running) -> bool:
    return (await http(gateway.port, "/ws/health/ready")).status == 200


async def test_failover_that_keeps_old_connections_open_is_followed(name: Name) -> None:
    async with (
        running(make_settings(name.url, ws_cluster=True)) as gateway,
        AsyncPublisher(name.url) as publisher,
        admitted(gateway.staff_url("waiter")) as waiter,
    ):
        cluster = gateway.app.parts.cluster
        assert cluster is not None
        await publisher.publish(EVENT)
        await receive_event(waiter)
        assert await ready(gateway)
        await until(lambda: cluster.link.connected)
        # Pub/Sub, streams, revocations; control, limits, presence
        await until(lambda: name.links() == [6, 0])
        name.fail_over()

        reply = await http(gateway.port, "/ws/ticket", method="POST", headers=BEARER)
        assert reply.status == 200  # sent again, on a connection to the new primary
        await until(lambda: ready(gateway))
        await until(lambda: name.links() == [0, 6], 12)
        await publisher.publish(EVENT)
        assert (await receive_event(waiter))["type"] == "ROUND_READY"
        await until(lambda: cluster.link.connected)
        assert (await cluster.control.order("refresh", SectorsChanged(1, 21))).complete


CART = {"type": "CART_CLEARED", "tenant_id": 1, "branch_id": 1, "session_id": 456}


def test_publisher_does_not_publish_on_a_replica(
    name: Name, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publisher_links, "_CHECK", 0.0)  # it asks before each event
    with (
        redis.Redis(port=name.other.port) as new,
        new.pubsub() as pubsub,
        Publisher(name.url) as publisher,
    ):
        pubsub.psubscribe("*")
        assert publisher.publish(CART) == 0
        name.fail_over(name_too=False)
        with pytest.raises(PublishFailed, match="is a replica") as failed:
            publisher.publish(CART)
        assert not failed.value.in_doubt
        name.target = name.other.port
        assert publisher.publish(CART) == 1


async def test_readers_leave_a_replica(name: Name) -> None:
    """No command writes, and the name resolves to the old server for a while."""
    async with running(make_settings(name.url)) as gateway:
        name.fail_over(name_too=False)
        await until(lambda: not gateway.app.ready, 6)
        name.target = name.other.port
        await until(lambda: gateway.app.ready, 8)


def set_password(server: "redis.Redis", password: str) -> None:
    server.acl_setuser(
        "gateway", enabled=True, reset=True, passwords=f"+{password}", keys=["*"],
        categories=["+@all"],
    )  # fmt: skip


REFUSALS: dict[str, Callable[["redis.Redis"], Any]] = {
    "readonly": lambda server: server.replicaof("127.0.0.1", "1"),
    "too few replicas": lambda server: server.config_set("min-replicas-to-write", 1),
    "another password": lambda server: set_password(server, "b"),
}


@pytest.mark.parametrize("refusal", REFUSALS)
async def test_refused_command_is_sent_to_the_server_that_the_name_resolves_to(
    name: Name, refusal: str
) -> None:
    for server in (name.one, name.other):
        with redis.Redis(port=server.port) as admin:
            admin.replicaof("NO", "ONE")
            set_password(admin, "a")
    url = name.url.replace("//", "//gateway:a@")
    async with open_commands(url, Breaker(5, 30), Breaker(5, 30), max_connections=5) as commands:
        with Publisher(url) as publisher:
            await commands.set_for("k", "v", 10)
            await trio.to_thread.run_sync(publisher.publish, EVENT)
            with redis.Redis(port=name.one.port) as old:
                REFUSALS[refusal](old)
                if refusal == "another password":
                    old.client_kill_filter(user="gateway")
            name.target = name.other.port

            await commands.mget(["k"])  # may be sent twice, if its connection was closed
            assert await commands.getdel("k") is None  # refused by the old one, not lost
            assert await commands.add_once("c", 10, "dlq", {"data": b""}, 10)
            await trio.to_thread.run_sync(publisher.publish, EVENT)  # it has no id
    with redis.Redis(port=name.other.port) as new:
        assert new.xlen(STREAM) == 1


async def test_server_that_always_refuses_is_unavailable(name: Name) -> None:
    name.target = name.other.port  # the replica
    breaker = Breaker(1, 30)
    async with open_commands(name.url, Breaker(5, 30), breaker, max_connections=5) as commands:
        with pytest.raises(Unavailable):
            await commands.set_for("k", "v", 10)
        assert (
            0 < breaker.wait(trio.current_time()) <= 1
        )  # it answers at once, so the next try is soon
