"""The publisher, on a real Valkey: what Redis holds afterwards is the claim."""

import asyncio
import json
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import pytest
import redis
import trio

from tests.support import gateways as harness
from tests.support.redis_server import RedisServer
from trio_gateway.core.events import parse_event
from trio_gateway.core.routing import Route, To, channel_for
from trio_gateway.core.shards import shard_of
from trio_gateway.publisher import (
    AsyncPublisher,
    InvalidEvent,
    Publisher,
    PublishFailed,
)

DURABLE = {"type": "ROUND_READY", "tenant_id": 1, "branch_id": 1}
CART = {"type": "CART_CLEARED", "tenant_id": 1, "branch_id": 1, "session_id": 456}


def entries(backend: "redis.Redis", stream: str = "events:critical") -> list[bytes]:
    """What the stream holds, each entry's one field."""
    found: Any = backend.xrange(stream)
    assert all(list(fields) == [b"data"] for _, fields in found)
    return [fields[b"data"] for _, fields in found]


@contextmanager
def subscribed(backend: "redis.Redis") -> Iterator[Callable[[], tuple[str, bytes]]]:
    """The next message on any channel."""
    pubsub: Any
    with backend.pubsub() as pubsub:  # type: ignore[no-untyped-call]
        pubsub.psubscribe("*")
        assert pubsub.get_message(timeout=2)["type"] == "psubscribe"

        def following() -> tuple[str, bytes]:
            message = pubsub.get_message(timeout=2)
            assert message is not None
            return message["channel"].decode(), message["data"]

        yield following


def test_durable_event_is_added_to_the_stream(redis_url: str, backend: "redis.Redis") -> None:
    with Publisher(redis_url) as publisher:
        entry = publisher.publish(DURABLE)
    assert json.loads(entries(backend)[0]) == DURABLE
    last: Any = backend.xrevrange("events:critical", count=1)
    assert last[0][0].decode() == entry


def test_other_event_is_published_and_the_listeners_are_counted(
    redis_url: str, backend: "redis.Redis"
) -> None:
    with Publisher(redis_url) as publisher:
        assert publisher.publish(CART) == 0
        with subscribed(backend) as following:
            assert publisher.publish(CART) == 1
            assert following() == (
                "channel:session:456",
                json.dumps(CART).replace(" ", "").encode(),
            )
    assert not backend.exists("events:critical")


@pytest.mark.parametrize(
    ("event", "channel"),
    [
        (CART, "channel:session:456"),
        ({**CART, "session_id": None}, "channel:branch:1:admin"),
        ({**CART, "type": "BREAD_BAKED"}, "channel:branch:1:admin"),
        ({**CART, "type": "BREAD_BAKED", "branch_id": 0}, "channel:tenant:1:admin"),
    ],
)
def test_channel_matches_the_audience(event: dict[str, Any], channel: str) -> None:
    parsed = parse_event(json.dumps(event).encode(), channel="", received_at=0)
    assert channel_for(parsed) == channel


@pytest.mark.parametrize("as_text", [False, True])
def test_json_is_published_byte_for_byte(
    redis_url: str, backend: "redis.Redis", as_text: bool
) -> None:
    payload = '{ "branch_id":1,"type" : "ROUND_READY","tenant_id":1, "x":1.50, "y":"Ñ\\u00d1" }'
    with Publisher(redis_url) as publisher:
        publisher.publish(payload if as_text else payload.encode())
    assert entries(backend) == [payload.encode()]


def test_dict_is_encoded_as_utf8(redis_url: str, backend: "redis.Redis") -> None:
    with Publisher(redis_url) as publisher:
        publisher.publish({**DURABLE, "entity": {"name": "Ñoquis 🙏"}})
    assert "Ñoquis 🙏".encode() in entries(backend)[0]


def test_id_is_added_unless_the_event_has_one(redis_url: str, backend: "redis.Redis") -> None:
    event = dict(DURABLE)
    with Publisher(redis_url) as publisher:
        publisher.publish(event, id="a")
        publisher.publish({**DURABLE, "id": "b"}, id="a")
        with pytest.raises(TypeError, match="be added to JSON"):
            publisher.publish(b"{}", id="a")
    assert [json.loads(entry)["id"] for entry in entries(backend)] == ["a", "b"]
    assert "id" not in event


@pytest.mark.parametrize(
    ("event", "reason"),
    [
        ({**DURABLE, "tenant_id": 0}, "tenant_id"),
        ({**DURABLE, "branch_id": True}, "branch_id"),
        ({"tenant_id": 1, "branch_id": 1}, "type"),
        ({**DURABLE, "x": object()}, "not_json"),
        ({**DURABLE, "x": "\ud800"}, "not_utf8"),
        ({**DURABLE, "x": "x" * 65_536}, "too_big"),
        (b"[]", "not_object"),
        (b"{", "not_json"),
        (b'{"type":"\xff"}', "not_utf8"),
        ('"\ud800"', "not_utf8"),
    ],
)
def test_invalid_event_is_refused_before_it_is_sent(
    redis_url: str, backend: "redis.Redis", event: Any, reason: str
) -> None:
    with Publisher(redis_url) as publisher, pytest.raises(InvalidEvent) as refused:
        publisher.publish(event)
    assert refused.value.reason == reason
    assert not backend.keys()


def test_stream_or_channel_can_be_named(redis_url: str, backend: "redis.Redis") -> None:
    with Publisher(redis_url, stream="first") as publisher, subscribed(backend) as following:
        publisher.publish(DURABLE)
        publisher.publish(CART, stream="second")
        publisher.publish(DURABLE, channel="branch:1:waiters")
        assert following()[0] == "branch:1:waiters"
        with pytest.raises(ValueError, match="not both"):
            publisher.publish(CART, stream="a", channel="b")
    assert (len(entries(backend, "first")), len(entries(backend, "second"))) == (1, 1)


def test_stream_is_trimmed_to_about_its_length(redis_url: str, backend: "redis.Redis") -> None:
    with Publisher(redis_url, max_length=100) as publisher:
        for _ in range(500):
            publisher.publish(DURABLE)
    assert 100 <= int(backend.xlen("events:critical")) < 300


def test_event_goes_to_the_shard_of_its_tenant(redis_url: str, backend: "redis.Redis") -> None:
    with Publisher(redis_url, shards=64) as publisher:
        publisher.publish({**DURABLE, "tenant_id": 1})
        publisher.publish({**DURABLE, "tenant_id": 2})
        publisher.publish({**CART, "tenant_id": 2}, stream="events:critical")
        publisher.publish({**DURABLE, "tenant_id": 2}, stream="audit")
    keys: Any = backend.keys("*")
    lengths = {key.decode(): backend.xlen(key) for key in keys}
    assert lengths == {"events:critical:{50}": 1, "events:critical:{17}": 2, "audit": 1}


@pytest.mark.parametrize("shards", [0, 257])
def test_impossible_number_of_shards_is_refused(shards: int) -> None:
    with pytest.raises(ValueError, match="shards must be from 1 to 256"):
        Publisher("redis://localhost", shards=shards)


def test_shard_is_by_the_checksum_that_redis_uses_for_its_slots() -> None:
    with (
        harness.valkey(**{"cluster-enabled": "yes", "cluster-port": harness.free_port()}) as server,
        redis.Redis(port=server.port) as client,
    ):
        for tenant in (1, 2, 7, 10, 4242, 10**12, 2**63 - 1):
            assert shard_of(tenant, 16384) == client.execute_command("CLUSTER KEYSLOT", str(tenant))


def test_own_routes_decide_what_is_durable(redis_url: str, backend: "redis.Redis") -> None:
    with Publisher(redis_url, routes={"CART_CLEARED": Route(To.DINERS, True)}) as publisher:
        assert isinstance(publisher.publish(CART), str)


def test_redis_down_is_a_failure_that_names_it_and_no_password() -> None:
    port = harness.free_port()
    with Publisher(f"redis://:hunter2@127.0.0.1:{port}") as publisher:
        for event in (DURABLE, CART):
            with pytest.raises(PublishFailed, match=f"127.0.0.1:{port}.*refused") as failed:
                publisher.publish(event, id="a")
            assert "hunter2" not in str(failed.value)
            assert not failed.value.in_doubt


def test_invalid_url_is_refused_without_showing_it() -> None:
    for url in ("http://:hunter2@host", "redis://:hunter2@host:port"):
        with pytest.raises(ValueError, match="not a Redis URL") as refused:
            Publisher(url)
        assert "hunter2" not in str(refused.value)


def test_wrong_password_is_a_failure_that_does_not_show_it(
    redis_url: str, backend: "redis.Redis"
) -> None:
    backend.config_set("requirepass", "secret")
    try:
        with Publisher(redis_url.replace("//", "//:hunter2@")) as publisher:
            with pytest.raises(PublishFailed, match="refuses the credentials") as failed:
                publisher.publish(DURABLE)
            assert "hunter2" not in str(failed.value)
    finally:
        backend.config_set("requirepass", "")


def test_refusal_is_a_failure(redis_url: str, backend: "redis.Redis") -> None:
    backend.set("events:critical", "no stream")
    with (
        Publisher(redis_url) as publisher,
        pytest.raises(PublishFailed, match="WRONGTYPE") as failed,
    ):
        publisher.publish(DURABLE, id="a")
    assert not failed.value.in_doubt


class Deaf:
    """Takes commands; hangs up on the first ``silences`` XADDs, answers the rest, or does ``then``:
    says something else, or (``b""``) listens no more.
    """

    def __init__(self, silences: int, then: bytes = b"$3\r\n1-1\r\n") -> None:
        self.adds = self.connections = 0
        self._silences = silences
        self._then = then
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"redis://127.0.0.1:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._serve)

    def __enter__(self) -> "Deaf":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            with client:
                while data := client.recv(65536):
                    if b"XADD" in data:
                        self.adds += 1
                        if self.adds <= self._silences:
                            if not self._then:
                                self._listener.close()
                            break
                        client.sendall(self._then)
                    else:
                        client.sendall(b"+OK\r\n" * data.count(b"*"))


def test_event_with_an_id_is_sent_again_after_a_lost_reply() -> None:
    with Deaf(silences=1) as server, Publisher(server.url) as publisher:
        assert publisher.publish(DURABLE, id="a") == "1-1"
        assert server.adds == 2


def test_lost_reply_leaves_an_event_without_id_in_doubt() -> None:
    with Deaf(silences=1) as server, Publisher(server.url) as publisher:
        with pytest.raises(PublishFailed, match="closed the connection") as failed:
            publisher.publish(DURABLE)
        assert failed.value.in_doubt
        assert server.adds == 1


def test_event_is_not_sent_a_third_time() -> None:
    with Deaf(silences=9) as server, Publisher(server.url) as publisher:
        with pytest.raises(PublishFailed):
            publisher.publish(DURABLE, id="a")
        assert server.adds == 2


AFTERWARDS = {
    "gone": b"",
    "a replica": b"-READONLY You can't write against a read only replica.\r\n",
    "full": b"-OOM command not allowed\r\n",
    "no rights": b"-NOPERM no\r\n",
    "nonsense": b"*1\r\n:1\r\n",
}


@pytest.mark.parametrize("then", AFTERWARDS)
@pytest.mark.parametrize("library", ["none", "asyncio", "trio"])
def test_event_stays_in_doubt_if_the_first_try_may_have_added_it(library: str, then: str) -> None:
    async def publish(redis_url: str) -> None:
        async with AsyncPublisher(redis_url) as publisher:
            await publisher.publish(DURABLE, id="a")

    def publish_sync(redis_url: str) -> None:
        with Publisher(redis_url) as publisher:
            publisher.publish(DURABLE, id="a")

    ways: dict[str, Callable[[str], None]] = {
        "none": publish_sync,
        "asyncio": lambda redis_url: asyncio.run(publish(redis_url)),
        "trio": lambda redis_url: trio.run(publish, redis_url),
    }
    with Deaf(1, AFTERWARDS[then]) as server, pytest.raises(PublishFailed) as failed:
        ways[library](server.url)
    assert failed.value.in_doubt


@pytest.mark.parametrize(
    ("reply", "tries"),
    [
        ("READONLY You can't write against a read only replica.", 2),
        ("ERR Error running script (call to f_1): @user_script:1: -READONLY You can't write", 2),
        (
            "READONLY You can't write against a read only replica. script: f_1, on @user_script:1.",
            2,
        ),
        ("LOADING Redis is loading the dataset in memory", 2),
        ("MASTERDOWN Link with MASTER is down", 2),
        ("NOREPLICAS Not enough good replicas to write.", 2),
        ("NOAUTH Authentication required.", 2),
        ("CLUSTERDOWN The cluster is down", 2),
        ("MOVED 3999 127.0.0.1:6381", 2),
        ("OOM command not allowed when used memory > 'maxmemory'.", 1),
        ("MISCONF Redis is configured to save RDB snapshots", 1),
        ("NOPERM User has no permissions to run the 'xadd' command", 1),
        ("WRONGTYPE Operation against a key", 1),
    ],
)
def test_refused_event_is_not_in_doubt_and_is_sent_to_the_new_primary(
    reply: str, tries: int
) -> None:
    with Deaf(0, f"-{reply}\r\n".encode()) as server, Publisher(server.url) as publisher:
        with pytest.raises(PublishFailed) as failed:
            publisher.publish(DURABLE, id="a")
        assert not failed.value.in_doubt
        assert (server.adds, server.connections) == (tries, tries)


def test_invalid_reply_leaves_the_event_in_doubt() -> None:
    with Deaf(0, AFTERWARDS["nonsense"]) as server, Publisher(server.url) as publisher:
        with pytest.raises(PublishFailed, match="invalid reply") as failed:
            publisher.publish(DURABLE)
        assert failed.value.in_doubt


def test_restarted_redis_is_used_again() -> None:
    port = harness.free_port()
    with Publisher(f"redis://127.0.0.1:{port}") as publisher:
        for _ in range(2):
            server = RedisServer(port=port, save="")
            server.start()
            try:
                assert isinstance(publisher.publish(DURABLE), str)
            finally:
                server.stop()
                server._cleanup()


def test_threads_can_share_a_publisher(redis_url: str, backend: "redis.Redis") -> None:
    with Publisher(redis_url) as publisher, ThreadPoolExecutor(8) as threads:
        publish = partial(publisher.publish, DURABLE)
        found = set(threads.map(lambda n: publish(id=f"event-{n}"), range(200)))
    assert len(found) == 200
    assert {json.loads(entry)["id"] for entry in entries(backend)} == {
        f"event-{n}" for n in range(200)
    }


FORK = """
import os, sys
from trio_gateway.publisher import Publisher
event = {"type": "ROUND_READY", "tenant_id": 1, "branch_id": 1}
with Publisher(sys.argv[1]) as publisher:
    publisher.publish(event, id="before")
    child = os.fork()
    for n in range(50):
        publisher.publish(event, id=f"{'parent' if child else 'child'}-{n}")
    if child:
        os.waitpid(child, 0)
    publisher.publish(event, id="after")
"""


def test_process_after_a_fork_has_connections_of_its_own(
    redis_url: str, backend: "redis.Redis"
) -> None:
    subprocess.run([sys.executable, "-c", FORK, redis_url], check=True)
    found = [json.loads(entry)["id"] for entry in entries(backend)]
    wanted = [f"{process}-{n}" for process in ("parent", "child") for n in range(50)]
    assert sorted(found) == sorted(["before", *wanted, "after", "after"])


async def publish_several(redis_url: str) -> list[str | int]:
    async with AsyncPublisher(redis_url) as publisher:
        found = [await publisher.publish(DURABLE, id="a"), await publisher.publish(CART)]
        with pytest.raises(InvalidEvent):
            await publisher.publish({**DURABLE, "tenant_id": "1"})
    return found


def test_asyncio_can_publish(redis_url: str, backend: "redis.Redis") -> None:
    entry, number = asyncio.run(publish_several(redis_url))
    assert isinstance(entry, str)
    assert number == 0
    assert json.loads(entries(backend)[0]) == {**DURABLE, "id": "a"}


async def test_trio_can_publish(redis_url: str, backend: "redis.Redis") -> None:
    entry, number = await publish_several(redis_url)
    assert isinstance(entry, str)
    assert number == 0
    assert json.loads(entries(backend)[0]) == {**DURABLE, "id": "a"}


async def test_events_are_published_in_the_order_of_the_calls(
    redis_url: str, backend: "redis.Redis"
) -> None:
    async with AsyncPublisher(redis_url) as publisher, trio.open_nursery() as nursery:
        for i in range(20):
            nursery.start_soon(publisher.publish, {**DURABLE, "data": i})
            await trio.testing.wait_all_tasks_blocked()
    assert [json.loads(entry)["data"] for entry in entries(backend)] == list(range(20))


async def test_publishing_does_not_block_the_loop() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"redis://127.0.0.1:{silent.getsockname()[1]}"
        async with AsyncPublisher(url) as publisher, trio.open_nursery() as nursery:

            async def publish() -> None:
                with pytest.raises(PublishFailed, match="in 2 s"):
                    await publisher.publish(CART)
                nursery.cancel_scope.cancel()

            nursery.start_soon(publish)
            for _ in range(50):
                with trio.fail_after(0.5):
                    await trio.sleep(0.01)
            await trio.sleep_forever()


async def test_async_publisher_must_be_entered() -> None:
    with pytest.raises(RuntimeError, match="not entered"):
        await AsyncPublisher("redis://localhost").publish(CART)
