"""``confirm``: an event is confirmed only when replicas have it, and is in doubt otherwise."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import pytest
import redis
import trio

from tests.support.gateways import valkey
from tests.support.redis_server import QUICK_REPLICA, RedisServer
from trio_gateway.publisher import AsyncPublisher, InDoubt, Publisher, PublishFailed, adding

DURABLE = {"type": "ROUND_READY", "tenant_id": 1, "branch_id": 1}
CART = {"type": "CART_CLEARED", "tenant_id": 1, "branch_id": 1, "session_id": 456}


@pytest.fixture(scope="module")
def primary() -> Iterator[RedisServer]:
    with valkey(**QUICK_REPLICA) as server:
        yield server


@pytest.fixture(scope="module")
def replica(primary: RedisServer) -> Iterator[RedisServer]:
    with valkey(**QUICK_REPLICA) as server, redis.Redis(port=server.port) as client:
        client.replicaof("127.0.0.1", str(primary.port))
        while client.info("replication")["master_link_status"] != "up":
            time.sleep(0.01)
        yield server


def published(server: RedisServer) -> list[dict[str, Any]]:
    with redis.Redis(port=server.port) as client:
        found: Any = client.xrange("events:critical")
    return [json.loads(fields[b"data"]) for _, fields in found]


@pytest.mark.parametrize("confirm", [1, "all"])
def test_event_without_a_replica_is_published_and_in_doubt(
    confirm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adding, "_WAIT", 0.1)
    with valkey() as alone, Publisher(alone.connection_url, confirm=confirm) as publisher:
        with pytest.raises(InDoubt, match=r"0 of 1 replicas|no replica") as doubt:
            publisher.publish(DURABLE, id="a")
        assert doubt.value.in_doubt
        assert doubt.value.entry is not None
        assert published(alone) == [{**DURABLE, "id": "a"}]
        assert publisher.publish(CART) == 0  # not an entry of a stream: nothing to confirm


@pytest.mark.parametrize("confirm", [1, "all"])
@pytest.mark.parametrize("library", ["none", "asyncio", "trio"])
def test_confirmed_event_is_on_the_replica(
    primary: RedisServer, replica: RedisServer, confirm: Any, library: str
) -> None:
    async def publish() -> str | int:
        async with AsyncPublisher(primary.connection_url, confirm=confirm) as publisher:
            return await publisher.publish(DURABLE, id=f"{library}-{confirm}")

    def publish_sync() -> str | int:
        with Publisher(primary.connection_url, confirm=confirm) as publisher:
            return publisher.publish(DURABLE, id=f"{library}-{confirm}")

    ways: dict[str, Callable[[], str | int]] = {
        "none": publish_sync,
        "asyncio": lambda: asyncio.run(publish()),
        "trio": lambda: trio.run(publish),
    }
    assert isinstance(ways[library](), str)
    assert {**DURABLE, "id": f"{library}-{confirm}"} in published(replica)


def test_event_is_in_doubt_while_too_few_replicas_take_it_and_confirmed_afterwards(
    primary: RedisServer, replica: RedisServer
) -> None:
    with Publisher(primary.connection_url, confirm="all") as publisher:
        with (
            replica.frozen(),
            pytest.raises(InDoubt, match=r"0 of 1 replicas .* have the event after 1 s"),
        ):
            publisher.publish(DURABLE, id="late")
        publisher.publish(DURABLE, id="late")
    assert [event for event in published(replica) if event["id"] == "late"] == [
        {**DURABLE, "id": "late"}
    ] * 2


@pytest.mark.parametrize("confirm", [-1, True, "most", 1.5, None])
def test_other_values_are_refused(confirm: Any) -> None:
    with pytest.raises(ValueError, match="number of replicas"):
        Publisher("redis://localhost", confirm=confirm)


class Scripted:
    """Adds each event as ``1-1``; answers one WAIT after the other, and INFO, with its script."""

    def __init__(self, replies: Sequence[bytes | None], info: bytes = b"") -> None:
        self.adds = 0
        self._replies = iter(replies)
        self._info = info
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"redis://127.0.0.1:{self._listener.getsockname()[1]}"

    def serve(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                with client:
                    self._talk(client)

    def _talk(self, client: socket.socket) -> None:
        while data := client.recv(65536):
            answer = b"" if b"XADD" in data or b"WAIT" in data else b"+OK\r\n" * data.count(b"*")
            if b"XADD" in data:
                self.adds += 1
                answer += b"$3\r\n1-1\r\n"
            if b"\nINFO\r" in data:
                answer += b"$%d\r\n%b\r\n" % (len(self._info), self._info)
            if b"WAIT" in data:
                reply = next(self._replies)
                if reply is None:  # it breaks down
                    client.sendall(answer)
                    return
                answer += reply
            client.sendall(answer)

    def close(self) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


@contextmanager
def scripted(*replies: bytes | None, info: bytes = b"") -> Iterator[Scripted]:
    server = Scripted(replies, info)
    thread = threading.Thread(target=server.serve)
    thread.start()
    try:
        yield server
    finally:
        server.close()
        thread.join()


UNBLOCKED = b"-UNBLOCKED force unblock from blocking operation, instance state changed\r\n"
NOPERM = b"-NOPERM User backend has no permissions to run the 'wait' command\r\n"
REPLICA = b"-ERR WAIT cannot be used with replica instances.\r\n"


@pytest.mark.parametrize("reply", [None, UNBLOCKED], ids=["broken", "demoted"])
def test_failover_before_the_confirmation_is_in_doubt_without_an_id(reply: bytes | None) -> None:
    with scripted(reply) as server, Publisher(server.url, confirm=1) as publisher:
        with pytest.raises(InDoubt) as doubt:
            publisher.publish(DURABLE)
        assert (server.adds, doubt.value.entry) == (1, "1-1")


@pytest.mark.parametrize("reply", [None, UNBLOCKED], ids=["broken", "demoted"])
def test_event_with_an_id_is_published_again_after_such_a_failover(reply: bytes | None) -> None:
    with scripted(reply, b":1\r\n") as server, Publisher(server.url, confirm=1) as publisher:
        assert publisher.publish(DURABLE, id="a") == "1-1"
        assert server.adds == 2


@pytest.mark.parametrize("reply", [NOPERM, REPLICA, b":0\r\n", b"+OK\r\n"])
def test_event_without_a_confirmation_is_never_told_as_published_or_as_not_published(
    reply: bytes,
) -> None:
    with scripted(reply, reply) as server, Publisher(server.url, confirm=1) as publisher:
        with pytest.raises(InDoubt) as doubt:
            publisher.publish(DURABLE, id="a")
        assert server.adds >= 1
        assert doubt.value.entry == "1-1"


def test_all_are_those_that_are_connected_when_the_event_was_added() -> None:
    info = b"# Replication\r\nrole:master\r\nconnected_slaves:2\r\n"
    for count in (1, 2):
        with (
            scripted(b":%d\r\n" % count, info=info) as server,
            Publisher(server.url, confirm="all") as publisher,
        ):
            if count == 2:
                assert publisher.publish(DURABLE, id="a") == "1-1"
            else:
                with pytest.raises(InDoubt, match="1 of 2 replicas"):
                    publisher.publish(DURABLE, id="a")


def test_refused_event_is_not_in_doubt(primary: RedisServer) -> None:
    with (
        redis.Redis(port=primary.port) as store,
        Publisher(primary.connection_url, stream="text", confirm=1) as publisher,
    ):
        store.set("text", "no stream")
        with pytest.raises(PublishFailed, match="WRONGTYPE") as failed:
            publisher.publish(DURABLE, id="a")
        assert not failed.value.in_doubt
