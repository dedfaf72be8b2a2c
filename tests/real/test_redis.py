"""Redis as a source: duplicates, connections and failures."""

import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import redis
import trio
import trustme
from click.testing import CliRunner
from structlog.testing import capture_logs

from tests.support.gateways import (
    Running,
    admitted,
    closed,
    connect,
    free_port,
    http,
    make_settings,
    metrics,
    receive_event,
    received,
    running,
    settle,
    until,
    valkey,
    with_waiter,
)
from tests.support.redis_server import RedisServer
from tests.support.redis_tls import tls_in_front_of
from tests.support.stopwatch import Stopwatch
from trio_gateway.cli import main
from trio_gateway.publisher import AsyncPublisher, PublishFailed

STREAM = "events:critical"
BREAKERS = ("pubsub", "stream", "commands")


def payload(marker: object = 0, **keys: Any) -> str:
    event = {"type": "ROUND_READY", "tenant_id": 1, "branch_id": 1, "entity": {"marker": marker}}
    return json.dumps(event | keys)


def markers(found: list[Any]) -> list[Any]:
    return [event["entity"]["marker"] for event in found]


# Duplicates


@pytest.mark.parametrize(
    "channel",
    ["sector:1:5:waiters", "branch:1:waiters", "channel:branch:1:admin", "tenant:1:admin"],
)
async def test_event_is_delivered_once_however_many_patterns_match_its_channel(
    backend: "redis.Redis", redis_url: str, channel: str
) -> None:
    patterns = ("sector:*:*:waiters", "sector:*:waiters", "*:waiters", "*", channel, "*:admin")
    async with (
        running(make_settings(redis_url, redis_channel_patterns=patterns)) as gateway,
        admitted(gateway.staff_url("waiter")) as waiter,
    ):
        for n in range(3):
            backend.publish(channel, payload(n))
        await settle(gateway)

        assert markers(await received(waiter)) == [0, 1, 2]
        assert (await metrics(gateway.port))["events_duplicate_total"] == 0


async def test_default_patterns_that_overlap_deliver_once(
    backend: "redis.Redis", redis_url: str
) -> None:
    async with with_waiter(redis_url) as (gateway, waiter):
        assert backend.publish("sector:1:5:waiters", payload()) == 2  # two patterns match
        await settle(gateway)

        assert markers(await received(waiter)) == [0]


async def test_same_content_twice_on_one_channel_is_two_events(
    backend: "redis.Redis", redis_url: str
) -> None:
    async with with_waiter(redis_url) as (gateway, waiter):
        for _ in range(2):
            backend.publish("branch:1:waiters", payload("pubsub", ts="now"))
            backend.xadd(STREAM, {"data": payload("stream", ts="now")})
        await settle(gateway)

        assert sorted(markers(await received(waiter))) == ["pubsub"] * 2 + ["stream"] * 2


async def test_copies_on_different_channels_are_one_event_when_only_ts_differs(
    backend: "redis.Redis", redis_url: str
) -> None:
    async with with_waiter(redis_url) as (gateway, waiter):
        backend.publish("branch:1:waiters", payload("one", ts=1))
        backend.publish("branch:1:admin", payload("one", ts=2))
        backend.publish("channel:branch:1:admin", payload("one", ts=3))
        backend.xadd(STREAM, {"data": payload("one", ts=4)})
        backend.publish("branch:1:waiters", payload("two", v=1, ts=1))
        backend.publish("branch:1:admin", payload("two", v=2, ts=1))  # more than ts differs
        await settle(gateway)

        assert sorted(markers(await received(waiter))) == ["one", "two", "two"]
        assert (await metrics(gateway.port))["events_duplicate_total"] == 3


async def test_copies_on_several_streams_are_one_event(
    backend: "redis.Redis", redis_url: str
) -> None:
    settings = make_settings(redis_url, redis_streams=("orders", "payments"))
    async with (
        running(settings) as gateway,
        admitted(gateway.staff_url("waiter")) as waiter,
    ):
        for stream in ("orders", "payments", "orders"):
            backend.xadd(stream, {"data": payload()})
        await settle(gateway)

        assert markers(await received(waiter)) == [0, 0]


async def test_same_id_is_the_same_event_whatever_its_source_but_only_within_its_tenant(
    backend: "redis.Redis", redis_url: str
) -> None:
    async with (
        running(make_settings(redis_url)) as gateway,
        admitted(gateway.staff_url("waiter")) as waiter,
        admitted(gateway.staff_url("waiter", tenant_id=2)) as other,
    ):
        backend.publish("branch:1:waiters", payload("first", id="a"))
        backend.publish("branch:1:waiters", payload("same channel", id="a"))
        backend.publish("branch:1:admin", payload("another channel", id="a", type="CHECK_PAID"))
        await settle(gateway)
        backend.xadd(STREAM, {"data": payload("stream", id="a")})
        backend.xadd(STREAM, {"data": payload("another id", id="b")})
        backend.xadd(STREAM, {"data": payload("another tenant", id="a", tenant_id=2)})
        await settle(gateway)

        assert markers(await received(waiter)) == ["first", "another id"]
        assert markers(await received(other)) == ["another tenant"]


async def test_stream_is_read_from_its_end(backend: "redis.Redis", redis_url: str) -> None:
    backend.xadd(STREAM, {"data": payload("before the start")})
    async with with_waiter(redis_url) as (gateway, waiter):
        backend.xadd(STREAM, {"data": payload("after it")})
        await settle(gateway)

        assert markers(await received(waiter)) == ["after it"]


async def test_every_gateway_reads_every_entry(backend: "redis.Redis", redis_url: str) -> None:
    async with (
        running(make_settings(redis_url)) as one,
        running(make_settings(redis_url)) as two,
        admitted(one.staff_url("waiter")) as waiter,
        admitted(two.staff_url("waiter")) as other,
    ):
        for n in range(20):
            backend.xadd(STREAM, {"data": payload(n)})
        await settle(one)
        await settle(two)

        assert markers(await received(waiter)) == markers(await received(other)) == [*range(20)]


async def test_event_arrives_at_once_with_no_polling_interval(
    backend: "redis.Redis", redis_url: str
) -> None:
    """The median latency of single events, each published after the previous one was received."""
    async with with_waiter(redis_url) as (_, waiter):
        for way in ("pubsub", "stream"):
            took = []
            for n in range(21):
                watch = Stopwatch()
                if way == "pubsub":
                    backend.publish("branch:1:waiters", payload(f"{way} {n}"))
                else:
                    backend.xadd(STREAM, {"data": payload(f"{way} {n}")})
                await receive_event(waiter)
                took.append(watch.net)
            assert sorted(took)[10] < 0.05, way


# Connections


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A Valkey with passwords and a unix socket."""
    path = tmp_path_factory.mktemp("s") / "redis.sock"
    with valkey(unix_socket_path=path) as server:
        with redis.Redis(port=server.port) as admin:
            admin.execute_command("ACL SETUSER alice on >pass/w@rd:% ~* &* +@all")
            admin.execute_command("ACL SETUSER open on nopass ~* &* +@all")
            admin.execute_command("ACL SETUSER unsubscribable on >secret ~* resetchannels +@all")
            admin.config_set("requirepass", "default password")
        yield server


def _url(template: str, server: RedisServer) -> str:
    return template.format(
        tcp=f"127.0.0.1:{server.port}",
        alice="alice:" + quote("pass/w@rd:%", safe=""),
        default=quote("default password"),
        path=server.unix_socket_path,
    )


async def works(gateway: Running, url: str, **options: Any) -> None:
    """Both sources and the commands work over this URL."""
    assert (await http(gateway.port, "/ws/health/ready")).status == 200
    async with admitted(gateway.staff_url("waiter")) as waiter:  # asks Redis for revocations
        with redis.Redis.from_url(url, **options) as backend:
            backend.publish("branch:1:waiters", payload("pubsub"))
            backend.xadd(STREAM, {"data": payload("stream")})
        await settle(gateway)
        assert sorted(markers(await received(waiter))) == ["pubsub", "stream"]


@pytest.mark.parametrize(
    "template",
    [
        "redis://:{default}@{tcp}",
        "redis://default:{default}@{tcp}/0",
        "redis://{alice}@{tcp}",
        "redis://open@{tcp}",
        "redis://{alice}@{tcp}/3",
        "redis://{alice}@{tcp}?db=4",
        "unix://{path}?db=2&password={default}",
        "unix://{alice}@{path}",
    ],
)
async def test_every_kind_of_redis_url_works(guarded: RedisServer, template: str) -> None:
    url = _url(template, guarded)
    async with running(make_settings(url)) as gateway:
        await works(gateway, url)


@pytest.mark.parametrize(
    ("template", "error"),
    [
        ("redis://:wrong-password@{tcp}", "AUTH failed: WRONGPASS"),
        ("redis://nobody:wrong-password@{tcp}", "AUTH failed: WRONGPASS"),
        ("redis://{tcp}", "NOAUTH"),
        ("redis://{alice}@{tcp}/99", "SELECT failed: ERR"),
        ("redis://unsubscribable:secret@{tcp}", "Redis says NOPERM"),
    ],
)
async def test_rejected_redis_credentials_are_logged_without_the_password(
    guarded: RedisServer, template: str, error: str
) -> None:
    with capture_logs() as logs:
        async with running(make_settings(_url(template, guarded)), wait_ready=False) as gateway:
            await until(lambda: any(error in str(line.get("error")) for line in logs))
            assert (await http(gateway.port, "/ws/health/ready")).status == 503
            health = await http(gateway.port, "/ws/health")
            assert (health.status, health.json["status"]) == (200, "degraded")
    shown = repr(logs)
    assert "wrong-password" not in shown
    assert "pass/w@rd" not in shown
    assert quote("pass/w@rd:%", safe="") not in shown


async def test_redis_is_reached_over_tls(
    guarded: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    async with tls_in_front_of(guarded.port, authority.issue_cert("localhost")) as port:
        url = _url("rediss://{alice}@localhost:", guarded) + f"{port}/1"
        async with running(make_settings(url)) as gateway:
            plain = _url(
                "redis://{alice}@{tcp}/1", guarded
            )  # a blocking client would block the loop that it waits for
            assert gateway.app.settings.redis_url == url
            assert (await http(gateway.port, "/ws/health/ready")).status == 200
            async with admitted(gateway.staff_url("waiter")) as waiter:
                with redis.Redis.from_url(plain) as backend:
                    backend.publish("branch:1:waiters", payload("pubsub"))
                    assert markers([await receive_event(waiter)]) == ["pubsub"]
                    backend.xadd(STREAM, {"data": payload("stream")})
                    assert markers([await receive_event(waiter)]) == ["stream"]


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> tuple[trustme.CA, Path]:
    """An authority that only the URL names, and a folder with its and a client's certificate."""
    authority, folder = trustme.CA(), tmp_path_factory.mktemp("tls")
    authority.cert_pem.write_to_path(folder / "ca.pem")
    client = authority.issue_cert("gateway")
    client.cert_chain_pems[0].write_to_path(folder / "cert.pem")
    client.private_key_pem.write_to_path(folder / "key.pem")
    return authority, folder


@pytest.mark.parametrize(
    ("host", "mutual", "options"),
    [
        ("localhost", False, "ssl_ca_certs={folder}/ca.pem"),
        ("localhost", True,
         "ssl_ca_certs={folder}/ca.pem&ssl_certfile={folder}/cert.pem&ssl_keyfile={folder}/key.pem"),
        ("example.org", False, "ssl_ca_certs={folder}/ca.pem&ssl_check_hostname=false"),
        ("example.org", False, "ssl_cert_reqs=none"),
    ],
    ids=["authority", "client certificate", "any host", "any certificate"],
)  # fmt: skip
async def test_tls_options_of_the_url_hold_for_every_connection(
    guarded: RedisServer,
    authority: tuple[trustme.CA, Path],
    host: str,
    mutual: bool,
    options: str,
) -> None:
    ca, folder = authority
    certificate = ca.issue_cert(host)
    async with tls_in_front_of(guarded.port, certificate, ca if mutual else None) as port:
        url = _url("rediss://{alice}@localhost:", guarded) + f"{port}?"
        url += options.format(folder=folder)
        async with (
            running(make_settings(url)) as gateway,  # both of our own readers are connected
            admitted(gateway.staff_url("waiter")) as waiter,  # and the commands
            AsyncPublisher(url) as publisher,
        ):
            assert (await http(gateway.port, "/ws/health/ready")).status == 200
            await publisher.publish(payload("published"))
            assert markers([await receive_event(waiter)]) == ["published"]
        checked = await trio.to_thread.run_sync(
            lambda: CliRunner().invoke(main, ["check"], env={"REDIS_URL": url})
        )
        assert f"Redis at localhost:{port}: connected" in checked.output


async def test_missing_client_certificate_is_refused(
    guarded: RedisServer, authority: tuple[trustme.CA, Path]
) -> None:
    ca, folder = authority
    async with tls_in_front_of(guarded.port, ca.issue_cert("localhost"), ca) as port:
        url = _url("rediss://{alice}@localhost:", guarded) + f"{port}"
        url += f"?ssl_ca_certs={folder}/ca.pem"
        async with running(make_settings(url), wait_ready=False) as gateway:
            await until(lambda: gateway.app.parts.breakers["stream"].failures)
            assert (await http(gateway.port, "/ws/health/ready")).status == 503
        with pytest.raises(PublishFailed) as failed:
            async with AsyncPublisher(url) as publisher:
                await publisher.publish(payload())
        assert "pass/w@rd" not in str(failed.value)


@pytest.mark.parametrize("fault", ["of an untrusted authority", "of another host"])
async def test_untrusted_tls_certificate_is_refused(
    guarded: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    authority = trustme.CA()
    if fault == "of another host":
        authority.cert_pem.write_to_path(tmp_path / "ca.pem")
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    name = "example.org" if fault == "of another host" else "localhost"
    with capture_logs() as logs:
        async with tls_in_front_of(guarded.port, authority.issue_cert(name)) as port:
            url = _url("rediss://{alice}@localhost:", guarded) + str(port)
            async with running(make_settings(url), wait_ready=False) as gateway:
                await until(lambda: any("CERTIFICATE" in str(line.get("error")) for line in logs))
                assert (await http(gateway.port, "/ws/health/ready")).status == 503


# Failures


@asynccontextmanager
async def own_redis(**config: Any) -> AsyncIterator[RedisServer]:
    """A Redis for one test, with its data on disk."""
    with valkey(appendonly="yes", appendfsync="always", **config) as server:
        yield server


async def start_again(server: RedisServer) -> None:
    server.start_again()
    await until(server.is_running)


async def breaker_states(gateway: Running) -> dict[str, float]:
    found = (await metrics(gateway.port)).by_label("circuit_breaker_state")
    return {name: found[name] for name in BREAKERS}


async def test_killed_and_restarted_redis_loses_no_client_and_no_stream_entry() -> None:
    changes = {"circuit_failure_threshold": 2, "circuit_recovery_timeout": 0.2}
    async with (
        own_redis() as server,
        running(make_settings(server.connection_url, **changes)) as gateway,
        admitted(gateway.staff_url("waiter")) as waiter,
        admitted(gateway.diner_url()) as diner,
    ):
        assert await breaker_states(gateway) == dict.fromkeys(BREAKERS, 0)
        with redis.Redis.from_url(server.connection_url) as backend:
            backend.xadd(STREAM, {"data": payload("before", session_id=456)})
        await settle(gateway)

        server.kill()
        with trio.fail_after(5):
            while (await http(gateway.port, "/ws/health/ready")).status != 503:
                await trio.sleep(0.01)
        health = await http(gateway.port, "/ws/health")
        assert (health.status, health.json["status"]) == (200, "degraded")
        detailed = await http(gateway.port, "/ws/health/detailed")
        assert detailed.status == 503
        assert detailed.json["redis_async"]["status"] == "disconnected"
        assert detailed.json["redis_sync"]["status"] == "disconnected"
        assert detailed.json["connections"]["total"] == 2
        for client in (waiter, diner):  # live clients stay connected and are answered
            assert markers(await received(client)) == ["before"]
        for _ in range(3):  # the revocation of this token is unknown
            async with connect(gateway.staff_url("waiter")) as refused:
                assert (await closed(refused))[0] == 1013

        async def all_open() -> bool:
            return all((await breaker_states(gateway)).values())

        await until(all_open)

        await start_again(server)
        with redis.Redis.from_url(server.connection_url) as backend:
            for n in range(3):  # each reader continues at its cursor
                backend.xadd(STREAM, {"data": payload(f"after {n}", session_id=456)})

        async def ready() -> bool:
            return (await http(gateway.port, "/ws/health/ready")).status == 200

        await until(ready, 15)
        with redis.Redis.from_url(server.connection_url) as backend:
            backend.publish("branch:1:waiters", payload("again", session_id=456))
            backend.xadd(STREAM, {"data": payload("at last", session_id=456)})
        await settle(gateway)

        for client in (waiter, diner):
            found = markers(await received(client))
            assert [m for m in found if m != "again"] == [
                "after 0",
                "after 1",
                "after 2",
                "at last",
            ]
            assert "again" in found
        async with admitted(gateway.staff_url("waiter")):
            pass
        assert await breaker_states(gateway) == dict.fromkeys(BREAKERS, 0)


async def test_hung_redis_is_detected_within_five_seconds_and_used_again_when_it_answers() -> None:
    """SIGSTOP simulates a half-open link: connected, without any answer."""
    async with (
        own_redis() as server,
        running(make_settings(server.connection_url)) as gateway,
        admitted(gateway.staff_url("waiter")) as waiter,
    ):
        app = gateway.app
        assert app.parts.pubsub is not None
        assert app.parts.streams is not None
        assert (await http(gateway.port, "/ws/health/ready")).status == 200
        with server.frozen():
            # A Redis that is slow for a moment stays ready, however many requests ask.
            began = trio.current_time()
            while trio.current_time() < began + 1:
                async with trio.open_nursery() as nursery:
                    for _ in range(7):
                        nursery.start_soon(http, gateway.port, "/ws/health/ready")
                assert (await http(gateway.port, "/ws/health/ready")).status == 200
            with trio.fail_after(3):  # a command has a shorter deadline than a silent link
                while (await http(gateway.port, "/ws/health/ready")).status != 503:
                    await trio.sleep(0.05)
            assert (
                app.parts.breakers["commands"].failures
                == app.parts.breakers["writes"].failures
                == 0
            )
            with trio.fail_after(5):
                while app.parts.pubsub.connected or app.parts.streams.connected:
                    await trio.sleep(0.01)
            assert await received(waiter) == []
        await until(lambda: app.ready, 15)
        with redis.Redis.from_url(server.connection_url) as backend:
            backend.publish("branch:1:waiters", payload("pubsub"))
            backend.xadd(STREAM, {"data": payload("stream")})
        await settle(gateway)
        assert sorted(markers(await received(waiter))) == ["pubsub", "stream"]


async def test_gateway_starts_without_redis_and_works_once_redis_is_up() -> None:
    port = free_port()
    async with running(
        make_settings(f"redis://127.0.0.1:{port}", circuit_recovery_timeout=0.2), wait_ready=False
    ) as gateway:
        assert (await http(gateway.port, "/ws/health")).status == 200
        assert (await http(gateway.port, "/ws/health/ready")).status == 503
        async with connect(gateway.staff_url("waiter")) as refused:
            assert (await closed(refused))[0] == 1013
        with valkey(port=port) as server:
            await until(lambda: gateway.app.ready, 15)
            await works(gateway, server.connection_url)


@pytest.mark.parametrize("kind", ["pubsub", "normal"])
async def test_connection_dropped_by_redis_is_reopened(
    backend: "redis.Redis", redis_url: str, kind: str
) -> None:
    source = "pubsub" if kind == "pubsub" else "stream"
    with capture_logs() as logs:

        def times_lost() -> int:
            return sum(line["event"] == "source lost" and line["source"] == source for line in logs)

        async with (
            running(make_settings(redis_url)) as gateway,
            admitted(gateway.staff_url("waiter")) as waiter,
        ):
            for n in range(3):
                backend.client_kill_filter(_type=kind, skipme=True)
                await until(lambda: times_lost() == n + 1)  # noqa: B023 - asked at once
                backend.xadd(STREAM, {"data": payload(f"stream {n}")})
                await until(lambda: gateway.app.ready)
                backend.publish("branch:1:waiters", payload(f"pubsub {n}"))
                await settle(gateway)
                assert sorted(markers(await received(waiter))) == [f"pubsub {n}", f"stream {n}"]
            assert (await http(gateway.port, "/ws/health/ready")).status == 200


async def test_deleted_and_recreated_stream_is_read(backend: "redis.Redis", redis_url: str) -> None:
    """After ``XTRIM``, ``DEL`` and ``FLUSHALL`` later entries are beyond the old cursor."""
    async with with_waiter(redis_url) as (gateway, waiter):
        backend.xadd(STREAM, {"data": payload("one")})
        await settle(gateway)
        backend.delete(STREAM)
        backend.xadd(STREAM, {"data": payload("two")})
        await settle(gateway)
        backend.xtrim(STREAM, maxlen=0)
        backend.xadd(STREAM, {"data": payload("three")})
        await settle(gateway)
        assert markers(await received(waiter)) == ["one", "two", "three"]


async def test_key_that_is_not_a_stream_is_a_lost_source_and_ends_no_process(
    backend: "redis.Redis", redis_url: str
) -> None:
    backend.set(STREAM, "a string")
    with capture_logs() as logs:
        async with running(make_settings(redis_url), wait_ready=False) as gateway:
            await until(lambda: any("WRONGTYPE" in str(line.get("error")) for line in logs))
            assert (await http(gateway.port, "/ws/health/ready")).status == 503
            backend.delete(STREAM)
            await until(lambda: gateway.app.ready, 10)
