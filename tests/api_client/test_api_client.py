"""The client of the HTTP API, with a real gateway."""

import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import redis
import trio

from tests.support.api_keys import secret_of, write_keys
from tests.support.gateways import (
    Running,
    admitted,
    closed,
    free_port,
    make_settings,
    receive_event,
    received,
    running,
    serving,
    until,
    valkey,
    with_certificate,
)
from trio_gateway.api_client import (
    ApiClient,
    AsyncApiClient,
    CallFailed,
    PathAudience,
    PathMoment,
    PresentSession,
    attempts,
)
from trio_gateway.publisher import InDoubt, InvalidEvent, PublishFailed

from .conftest import Use

READY = {"type": "ROUND_READY", "tenant_id": 1, "branch_id": 1}
CART = {"type": "CART_CLEARED", "tenant_id": 1, "branch_id": 1, "session_id": 456}
JSON = b' {"type": "ROUND_READY", "tenant_id":1,"branch_id":1, "n":2.50}'
KEYS: dict[str, dict[str, Any]] = {
    "all": {}, "orders": {"scopes": ["publish"], "tenants": [1]}, "slow": {"rate": 1},
}  # fmt: skip

# The forms differ in how they wait, so most tests use one.
ONE_FORM = pytest.mark.parametrize("use", ["trio"], indirect=True)


@pytest.fixture
async def gateway(redis_url: str, backend: "redis.Redis", tmp_path: Path) -> AsyncIterator[Running]:
    keys = write_keys(tmp_path, KEYS)
    async with serving(redis_url, "direct", ws_api_keys_file=keys) as found:
        yield found


def where(gateway: Running) -> str:
    return gateway.url.replace("ws://", "http://")


async def test_events_reach_clients_with_the_id_that_publishing_returns(
    gateway: Running, use: Use
) -> None:
    async with (
        admitted(gateway.staff_url("waiter")) as waiter,
        admitted(gateway.diner_url(session_id=456)) as diner,
    ):

        async def publish(api: Any) -> Any:
            return [
                await api.publish({**READY, "n": 1}, id="one"),
                await api.publish(CART),
                await api.publish(
                    b' {"type": "ROUND_READY", "tenant_id":1,"branch_id":1, "n":2.50}'
                ),
            ]

        one, none, two = await use(publish, where(gateway), secret_of("all"))
        assert none is None
        assert await receive_event(waiter) == {**READY, "n": 1, "id": "one", "event_id": one}
        with trio.fail_after(2):
            text = await waiter.get_message()
        assert text == (
            f'{{"type": "ROUND_READY", "tenant_id":1,"branch_id":1, "n":2.50,"event_id":"{two}"}}'
        )
        assert CART in await received(diner)


async def test_receipts_and_why_tell_who_has_an_event(
    redis_url: str, backend: "redis.Redis", tmp_path: Path, use: Use
) -> None:
    (tmp_path / "routes.toml").write_text("[routes.ROUND_READY]\nreceipt = true\n")
    settings = {
        "ws_api_keys_file": write_keys(tmp_path, KEYS), "ws_routes_file": tmp_path / "routes.toml"
    }  # fmt: skip
    async with (
        serving(redis_url, "direct", **settings) as gateway,
        admitted(gateway.staff_url("waiter", sub="21")) as waiter,
    ):
        backend.xadd("events:critical", {"data": json.dumps(READY)})
        event = await receive_event(waiter)

        async def ask(api: Any) -> Any:
            return await api.receipts(event["event_id"]), await api.why(event["event_id"])

        found, path = await use(ask, where(gateway), secret_of("all"))
        assert (found.written, found.delivered, found.steps) == (1, 0, ())
        (mine,) = found.by
        assert (mine.user_id, mine.endpoint, mine.state) == ("21", "waiter", "written")
        assert (path.type, path.branch_id, path.sector_id, path.receipts) == (
            "ROUND_READY", 1, None, True,
        )  # fmt: skip
        assert PathAudience("floor", 1, branch_id=1) in path.audiences
        (client,) = path.clients
        assert (client.user_id, client.state, client.delivered) == ("21", "written", None)
        assert path.timeline[0] == PathMoment(0.0, "entered Redis", lies_ahead=False)
        with pytest.raises(CallFailed) as failed:
            await use(lambda api: api.receipts("1-0-4723"), where(gateway), secret_of("all"))
        assert failed.value.status == 404


async def test_slo_has_the_delivery_times_of_one_tenant_or_of_all(
    gateway: Running, backend: "redis.Redis", use: Use
) -> None:
    async with admitted(gateway.staff_url("waiter")) as waiter:
        backend.xadd("events:critical", {"data": json.dumps(READY)})
        await receive_event(waiter)

        async def ask(api: Any) -> Any:
            return await api.slo(), await api.slo(1), await api.slo(2, limit=5)

        of_all, of_one, of_other = await use(ask, where(gateway), secret_of("all"))
    (one,) = of_one.tenants
    assert (one.tenant_id, one.last_hour.written.count) == (1, 1)
    assert one.last_5_minutes.written.p99 < 5
    assert (one.last_hour.delivered.p50, one.last_hour.delivered.unconfirmed) == (None, 0)
    assert of_all.tenants == of_one.tenants
    assert of_all.others.last_hour.written.count == 0
    assert (of_other.tenants, of_other.others, of_other.more) == ((), None, 0)
    assert (of_other.seconds, of_other.complete, of_other.missing) == (1.0, True, ())


@ONE_FORM
async def test_many_events_have_an_outcome_each(
    gateway: Running, backend: "redis.Redis", use: Use
) -> None:
    events: list[Any] = [{**READY, "n": n} for n in range(1500)]
    events[7] = {"type": "ROUND_READY", "tenant_id": 1}
    events[1200] = CART
    found = await use(lambda api: api.publish_many(events), where(gateway), secret_of("all"))
    assert len(found) == 1500
    assert isinstance(found[7].error, InvalidEvent)
    assert (found[1200].event_id, found[1200].error) == (None, None)
    stored: Any = backend.xrange("events:critical")
    assert [json.loads(fields[b"data"]) for _, fields in stored] == [
        each for n, each in enumerate(events) if n not in (7, 1200)
    ]
    ids = [each.event_id for n, each in enumerate(found) if n not in (7, 1200)]
    assert [each.rpartition("-")[0].encode() for each in ids] == [entry for entry, _ in stored]


@ONE_FORM
async def test_errors_of_publish_are_those_of_the_publisher(gateway: Running, use: Use) -> None:
    async def fails(api: Any, kind: type[Exception], *arguments: Any, **options: Any) -> Exception:
        with pytest.raises(kind) as raised:
            await api.publish(*arguments, **options)
        return raised.value

    async def try_all(api: Any) -> None:
        invalid: Any = await fails(api, InvalidEvent, {**READY, "tenant_id": 0})
        assert invalid.reason
        await fails(api, TypeError, b"{}", id="a")
        other = await fails(api, PublishFailed, {**READY, "tenant_id": 2})
        assert "HTTP 403: events[0].tenant_id" in str(other)
        assert not isinstance(other, InDoubt)

    await use(try_all, where(gateway), secret_of("orders"))

    async def confirm(api: Any) -> None:
        doubt: Any = await fails(api, InDoubt, READY)
        assert doubt.entry

    await use(confirm, where(gateway), secret_of("all"), confirm="all")  # without any replica


async def test_control_and_reading(gateway: Running, use: Use) -> None:
    async def control(api: Any) -> Any:
        return (
            await api.disconnect(1, user_id=21, reason="signed out"),
            await api.disconnect(1, session_id=456),
            await api.disconnect(1, jti="none"),
            await api.refresh(1, "21"),
            await api.nodes(),
        )

    async with (
        admitted(gateway.staff_url("waiter", sub="21")) as waiter,
        admitted(gateway.diner_url(session_id=456)) as diner,
    ):
        user, session, token, refreshed, nodes = await use(
            control, where(gateway), secret_of("all")
        )
        assert await closed(waiter) == (4001, "signed out")
        assert (await closed(diner))[0] == 4001
    assert [each.closed for each in (user, session, token)] == [1, 1, 0]
    assert all(each.complete and each.missing == () for each in (user, refreshed))
    assert gateway.app.parts.cluster is not None
    assert [each.name for each in nodes] == [gateway.app.parts.cluster.registry.name]


async def test_presence_is_that_of_a_branch(redis_url: str, tmp_path: Path, use: Use) -> None:
    keys = write_keys(tmp_path, KEYS)
    async with (
        serving(redis_url, "direct", ws_api_keys_file=keys, ws_cluster=True) as gateway,
        admitted(gateway.staff_url("waiter", sub="21", branch_ids=[1], sector_ids=[5])),
        admitted(gateway.staff_url("waiter", sub="22", branch_ids=[2])),
        admitted(gateway.diner_url(session_id=456, table_id=10)),
    ):
        assert gateway.app.parts.cluster is not None
        registry = gateway.app.parts.cluster.registry
        node = registry.name
        await until(lambda: node in registry.nodes)  # before that, Redis is told of nobody
        found = await use(lambda api: api.presence(1, 1), where(gateway), secret_of("all"))
        one = await use(lambda api: api.presence(1, 1, node=node), where(gateway), secret_of("all"))
    assert one.users == found.users
    (user,) = found.users
    assert (user.user_id, user.endpoint, user.connections, user.sector_ids) == (
        "21", "waiter", 1, (5,),
    )  # fmt: skip
    assert abs(user.since - time.time()) < 60
    assert found.sessions == (PresentSession(456, 1, 10),)
    assert (found.complete, found.missing) == (True, ())


async def test_history_is_read_page_by_page(gateway: Running, use: Use) -> None:
    events = [{**READY, "n": n, "data": 20_000 * "x"} for n in range(120)]

    async def read(api: Any) -> Any:
        ids = [each.event_id for each in await api.publish_many(events)]
        pages = [page async for page in api.history(1, 1, 0)]
        rest = [page async for page in api.history(1, 1, ids[-2])]
        return ids, pages, rest

    ids, pages, rest = await use(read, where(gateway), secret_of("all"))
    assert len(pages) == 3
    found = [event for page in pages for event in page.events]
    assert found == [{**e, "event_id": i} for e, i in zip(events, ids, strict=True)]
    assert [event["n"] for page in rest for event in page.events] == [119]
    assert all(page.complete for page in rest)


@ONE_FORM
async def test_refusals_name_the_reason_and_no_secret(gateway: Running, use: Use) -> None:
    async def refused(api: Any) -> CallFailed:
        with pytest.raises(CallFailed) as raised:
            await api.nodes()
        return raised.value

    unknown = await use(refused, where(gateway), "hunter2-hunter2")
    assert unknown.status == 401
    scope = await use(refused, where(gateway), secret_of("orders"))
    assert scope.status == 403
    assert "scope read" in str(scope)
    elsewhere = await use(refused, where(gateway) + "/other", secret_of("all"))
    assert elsewhere.status == 404
    for failed in (unknown, scope, elsewhere):
        assert not failed.in_doubt
        assert str(failed).startswith(f"127.0.0.1:{gateway.port} /")
        assert "hunter2" not in repr(failed)
        assert secret_of("orders") not in repr(failed)


async def test_key_over_its_rate_waits_for_its_turn(gateway: Running) -> None:
    async with AsyncApiClient(where(gateway), secret_of("slow")) as api:
        await api.nodes()
        before = trio.current_time()
        await api.nodes()  # 429 at first
        assert trio.current_time() - before >= 0.9


@ONE_FORM
async def test_gateway_that_is_away_is_a_failure_and_not_in_doubt(
    use: Use, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attempts, "_PAUSE", 0.01)

    async def publish(api: Any) -> tuple[PublishFailed, list[Any]]:
        with pytest.raises(PublishFailed, match=r"no answer from 127\.0.*/ws/api/publish") as one:
            await api.publish(READY)
        return one.value, await api.publish_many([READY] * 1001)

    failed, many = await use(publish, f"http://127.0.0.1:{free_port()}", "s")
    assert not failed.in_doubt
    assert not any(each.error.in_doubt for each in many)
    assert "not sent" in str(many[1000].error)


@ONE_FORM
async def test_redis_that_is_away_is_a_failure(
    tmp_path: Path, use: Use, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attempts, "_AGAIN", 0)

    async def fail(api: Any) -> tuple[PublishFailed, CallFailed]:
        with pytest.raises(PublishFailed) as publishing:
            await api.publish(READY, id="a")
        with pytest.raises(CallFailed) as reading:
            await api.nodes()
        return publishing.value, reading.value

    with valkey() as server:
        keys = write_keys(tmp_path, KEYS)
        async with serving(server.connection_url, "direct", ws_api_keys_file=keys) as gateway:
            server.kill()
            publishing, reading = await use(fail, where(gateway), secret_of("all"))
    assert "HTTP 503" in str(publishing)
    assert not publishing.in_doubt
    assert (reading.status, reading.in_doubt) == (503, False)
    assert reading.retry_after


@ONE_FORM
async def test_gateway_is_reached_over_tls(redis_url: str, tmp_path: Path, use: Use) -> None:
    from hypercorn.config import Config

    config = Config()
    trusting = with_certificate(config, tmp_path)
    settings = make_settings(redis_url, ws_api_keys_file=write_keys(tmp_path, KEYS))
    async with running(settings, config=config) as gateway:
        url = f"https://localhost:{gateway.port}"
        nodes = await use(lambda api: api.nodes(), url, secret_of("all"), ssl_context=trusting)
        assert len(nodes) == 1

        async def distrust(api: Any) -> None:
            with pytest.raises(CallFailed, match=r"(?i)certificate"):
                await api.nodes()

        await use(distrust, url, secret_of("all"))


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("redis://localhost", "that of a gateway"),
        ("localhost:8001", "that of a gateway"),
        ("https://user:hunter2@host", "no user"),
        ("https://host?secret=hunter2", "no user, query"),
        ("https://host:hunter2", "invalid"),
        ("http://hunter2 b", "invalid"),
        ("http://hunter2:99999", "invalid"),
        ("http://hunter2:0", "invalid"),
    ],
)
def test_url_that_can_not_be_right_is_refused_without_showing_it(url: str, problem: str) -> None:
    for kind in (ApiClient, AsyncApiClient):
        with pytest.raises(ValueError, match=problem) as refused:
            kind(url, "s")
        assert "hunter2" not in str(refused.value)


@pytest.mark.parametrize("secret", ["", "hunter2\r\nX: y", "hunter2 ", "hünter2"])
def test_secret_that_no_header_can_have_is_refused_without_showing_it(secret: str) -> None:
    with pytest.raises(ValueError, match="printable ASCII") as refused:
        ApiClient("https://host", secret)
    assert "nter2" not in str(refused.value)


def test_no_representation_has_the_secret() -> None:
    with ApiClient("https://host", "hunter2") as api:
        held = [api, api._http, *vars(api).values(), *vars(api._http).values()]
        assert not any("hunter2" in f"{each!r} {each}" for each in held)


def test_arguments_that_exclude_each_other_are_refused() -> None:
    with ApiClient("https://host", "s") as api:
        for whose in ({}, {"user_id": 1, "jti": "a"}):
            with pytest.raises(ValueError, match="one of user_id, session_id and jti"):
                api.disconnect(1, **whose)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="confirm"):
        ApiClient("https://host", "s", confirm="most")  # type: ignore[arg-type]
