"""The API for backends over HTTP: keys, bounds, and answers that a program can rely on."""

import json
import random
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import redis
import trio
from structlog.testing import capture_logs

from tests.support.api_keys import bearer_of, call, publish, secret_of, write_keys
from tests.support.gateways import (
    Running,
    admitted,
    closed,
    http,
    make_settings,
    metrics,
    received_texts,
    running,
    serving,
    until,
)
from trio_gateway.core.event_ids import event_id, read_position, tag
from trio_gateway.web.api.calls import CALLS
from trio_gateway.web.api.publish import MAX_BYTES, MAX_EVENTS

READY = {"type": "ROUND_READY", "tenant_id": 1, "branch_id": 1}
CART = {"type": "CART_SYNC", "tenant_id": 1, "branch_id": 1, "session_id": 456}
STREAM = "events:critical"
KEYS: dict[str, dict[str, Any]] = {
    "all": {},
    "orders": {"scopes": ["publish"], "tenants": [1, 2]},
    "reader": {"scopes": ["read"], "tenants": [1]},
    "support": {"scopes": ["control"], "tenants": [1]},
    "slow": {"rate": 2},
}


@pytest.fixture
async def gateway(redis_url: str, backend: "redis.Redis", tmp_path: Path) -> AsyncIterator[Running]:
    async with serving(redis_url, "direct", ws_api_keys_file=write_keys(tmp_path, KEYS)) as found:
        yield found


def payloads(backend: "redis.Redis", stream: str = STREAM) -> list[str]:
    found: Any = backend.xrange(stream)
    return [fields[b"data"].decode() for _, fields in found]


# --- keys ---


async def test_without_a_file_of_keys_there_is_no_api(redis_url: str) -> None:
    async with serving(redis_url, "direct") as gateway:
        assert gateway.app.parts.api is None
        for each in CALLS:
            reply = await call(gateway.port, each.name, {} if each.method == "POST" else None)
            assert (reply.status, list(reply.json)) == (404, ["error"])
            for method in ("GET", "POST", "DELETE"):  # no 405, which would say that there is one
                reply = await http(gateway.port, each.path, method=method)
                assert (reply.status, list(reply.json)) == (404, ["error"])
        assert "wsgateway_api_requests_total{" not in (await http(gateway.port, "/ws/metrics")).text


async def test_each_call_needs_a_key_with_its_scope(gateway: Running) -> None:
    port = gateway.port
    allowed = {"publish": "orders", "read": "reader", "control": "support"}
    for each in CALLS:
        body: Any = {} if each.method == "POST" else None
        for header in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": secret_of("all")}):
            reply = await http(port, each.path, method=each.method, headers=header, json_body=body)
            assert reply.status == 401
            assert reply.headers["www-authenticate"] == "Bearer"
        for scope, key in allowed.items():
            reply = await call(port, each.name, body, key=key)
            assert (reply.status == 403) == (scope != each.scope)
            if reply.status == 403:
                assert reply.json == {"error": f"the key does not have the scope {each.scope}"}
        reply = await call(port, f"{each.name}?key={secret_of('all')}", body, key=None)
        assert reply.status == 401  # a secret is never in a URL


async def test_a_key_over_its_rate_is_told_when_to_try_again(gateway: Running) -> None:
    replies = [await call(gateway.port, "nodes", key="slow") for _ in range(4)]
    assert [each.status for each in replies] == [200, 200, 429, 429]
    assert replies[-1].headers["retry-after"] == "1"
    assert (await call(gateway.port, "nodes")).status == 200  # other keys are not concerned
    await until(lambda: _is_ok(gateway, "slow"))


@pytest.mark.parametrize(("rate", "seconds"), [(0.3, "4"), (0.5, "2"), (1, "1")])
async def test_a_key_with_a_low_rate_is_told_when_it_is_served_again(
    redis_url: str, tmp_path: Path, rate: float, seconds: str
) -> None:
    keys = write_keys(tmp_path, {"all": {"rate": rate}})
    async with serving(redis_url, "direct", ws_api_keys_file=keys) as gateway:
        served, refused = [await call(gateway.port, "nodes") for _ in range(2)]
    assert (served.status, refused.status) == (200, 429)
    assert refused.headers["retry-after"] == seconds


@pytest.mark.parametrize("path", ["receipts?event_id=1-0-4723", "why?event_id=1-0-4723", "slo"])
async def test_a_key_asks_all_processes_only_a_few_times_at_once(
    gateway: Running, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateway.app.parts.catch_ups, "_most", 0)
    monkeypatch.setattr(gateway.app.parts.catch_ups, "_patience", 0.05)
    reply = await call(gateway.port, path)
    assert (reply.status, reply.headers["retry-after"]) == (429, "1")


async def _is_ok(gateway: Running, key: str) -> bool:
    return (await call(gateway.port, "nodes", key=key)).status == 200


async def test_wrong_keys_count_as_failed_logins_and_valid_ones_are_served_all_the_same(
    redis_url: str, tmp_path: Path
) -> None:
    changes = {"ws_api_keys_file": write_keys(tmp_path), "ws_max_failed_logins": 3}
    async with serving(redis_url, "direct", **changes) as gateway:
        wrong = [await call(gateway.port, "nodes", key="wrong") for _ in range(5)]
        assert [each.status for each in wrong] == [401, 401, 401, 429, 429]
        assert (await call(gateway.port, "nodes")).status == 200


async def test_a_body_is_not_read_before_the_key_is_known(gateway: Running) -> None:
    head = f"POST /ws/api/publish HTTP/1.1\r\nHost: x\r\nContent-Length: {MAX_BYTES}\r\n"
    async with await trio.open_tcp_stream("127.0.0.1", gateway.port) as stream:
        await stream.send_all(f"{head}Authorization: Bearer wrong\r\n\r\n".encode())
        with trio.fail_after(5):  # it waits for no body
            assert (await stream.receive_some()).startswith(b"HTTP/1.1 401")


async def test_unknown_calls_and_methods_are_answered_in_json(gateway: Running) -> None:
    for path, status in {"publish": 405, "nodes": 405, "other": 404, "": 404}.items():
        reply = await http(
            gateway.port, f"/ws/api/{path}", method="DELETE", headers=bearer_of("all")
        )
        assert (reply.status, list(reply.json)) == (status, ["error"])
        assert ("allow" in reply.headers) == (status == 405)


async def test_requests_are_counted_by_call_and_status(gateway: Running) -> None:
    await call(gateway.port, "nodes")
    await call(gateway.port, "nodes", key=None)
    await publish(gateway.port, [READY, CART, {}])
    text = (await http(gateway.port, "/ws/metrics")).text
    for line in (
        'requests_total{call="nodes",status="200"} 1.0',
        'requests_total{call="nodes",status="401"} 1.0',
        'requests_total{call="publish",status="200"} 1.0',
        'events_total{outcome="published"} 2.0',
        'events_total{outcome="invalid"} 1.0',
    ):
        assert f"wsgateway_api_{line}\n" in text


# --- publish ---


async def test_events_are_published_byte_for_byte_and_clients_get_the_same_ids(
    gateway: Running, backend: "redis.Redis"
) -> None:
    durable = '{ "branch_id":1,"type" : "ROUND_READY","tenant_id":1, "x":1.50, "y":"Ñ\\u00d1 🙏" }'
    other = '{"type":"CART_SYNC","tenant_id":1 ,"branch_id":1,"session_id":456,"n":1e3}'
    async with (
        admitted(gateway.staff_url("admin")) as admin,
        admitted(gateway.diner_url(session_id=456)) as diner,
    ):
        first, second = await publish(gateway.port, [durable, other])
        await until(lambda: gateway.app.parts.dispatch.broadcasts == 2)
        (heard,), (also,) = await received_texts(admin), await received_texts(diner)
    assert payloads(backend) == [durable]
    assert second == {"event_id": None}
    assert also == other
    assert heard == f'{durable[:-1]},"event_id":"{first["event_id"]}"}}'
    last: Any = backend.xrevrange(STREAM, count=1)
    position = read_position(last[0][0].decode())
    assert first == {"event_id": event_id(tag(STREAM), position)}


async def test_each_event_has_its_own_answer_in_order(
    gateway: Running, backend: "redis.Redis"
) -> None:
    invalid = {
        "tenant_id": READY | {"tenant_id": 0},
        "type": READY | {"type": 5},
        "branch_id": {"type": "X", "tenant_id": 1},
        "over 65536 bytes": READY | {"x": "x" * 65_536},
        "object": "[1]",
        "event": '"text"',
    }
    events: list[Any] = []
    for n, event in enumerate(invalid.values()):
        events += [event, READY | {"n": n}]
    found = await publish(gateway.port, events)
    assert [json.loads(each)["n"] for each in payloads(backend)] == list(range(len(invalid)))
    for answer, name in zip(found[::2], invalid, strict=True):
        assert list(answer) == ["error"]
        assert answer["error"].startswith("invalid: ")
        if name not in ("object", "event"):
            assert name in answer["error"]
    assert all(list(answer) == ["event_id"] for answer in found[1::2])


async def test_no_event_and_a_thousand_are_fine_and_one_more_is_refused(
    gateway: Running, backend: "redis.Redis"
) -> None:
    assert await publish(gateway.port, []) == []
    found = await publish(gateway.port, [READY] * MAX_EVENTS)
    assert len({each["event_id"] for each in found}) == MAX_EVENTS
    body = {"events": [READY] * (MAX_EVENTS + 1)}
    reply = await call(gateway.port, "publish", body)
    assert (reply.status, "$.events" in reply.json["error"]) == (422, True)
    assert len(payloads(backend)) == MAX_EVENTS


async def test_an_event_that_cannot_be_decoded_costs_no_other(
    gateway: Running, backend: "redis.Redis"
) -> None:
    deep = '{"type":"ROUND_READY","tenant_id":1,"branch_id":1,"x":%s}' % ("[" * 5000 + "]" * 5000)
    cut = '{ "x":"a, ]} \\"\\ud83c","type":"ROUND_READY" ,"tenant_id":1,"branch_id":1}'
    first, second, third, fourth = await publish(gateway.port, [cut, deep, READY, "[[],{}]"])
    assert payloads(backend) == [cut, json.dumps(READY)]
    assert list(first) == list(third) == ["event_id"]
    assert second == {"error": "invalid: event is nested too deeply"}
    assert fourth["error"].startswith("invalid: ")


async def test_an_invalid_event_of_another_tenant_is_refused_and_nothing_is_published(
    gateway: Running, backend: "redis.Redis"
) -> None:
    invalid = READY | {"tenant_id": 3, "type": ""}
    reply = await call(gateway.port, "publish", {"events": [READY, invalid]}, key="orders")
    assert reply.status == 403
    assert reply.json == {"error": "events[1].tenant_id: tenant 3 is not one of this key's"}
    assert payloads(backend) == []


async def test_unknown_and_repeated_parameters_are_refused(
    gateway: Running, backend: "redis.Redis"
) -> None:
    for each in CALLS:
        body: Any = None if each.body is None else {}
        reply = await call(gateway.port, f"{each.name}?confrim=1", body)
        assert (reply.status, "confrim" in reply.json["error"]) == (422, True)
    reply = await call(gateway.port, "publish?confirm=1&confirm=0", {"events": [READY]})
    assert (reply.status, "confirm" in reply.json["error"]) == (422, True)
    assert payloads(backend) == []


@pytest.mark.parametrize("foreign", [0, 1, 2])
async def test_an_event_of_another_tenant_is_refused_and_nothing_is_published(
    gateway: Running, backend: "redis.Redis", foreign: int
) -> None:
    events = [READY, CART, READY | {"tenant_id": 2}]
    events[foreign] = READY | {"tenant_id": 3}
    reply = await call(gateway.port, "publish", {"events": events}, key="orders")
    assert reply.status == 403
    assert reply.json == {
        "error": f"events[{foreign}].tenant_id: tenant 3 is not one of this key's"
    }
    assert payloads(backend) == []
    assert len(await publish(gateway.port, events[:foreign], key="orders")) == foreign


async def test_an_invalid_body_names_the_field(gateway: Running) -> None:
    bodies = {
        b"{}": "events",
        b'{"events":{}}': "events",
        b'{"events":[],"confirm":1}': "confirm",
        b"[]": "object",
        b"nonsense": "not JSON",
        b'{"events":["\xff"': "not JSON",
        b'{"events":' + b"[" * 100_000: "not JSON",
        b'{"events":[{"x":"\\ud83c"},]}': "not JSON",
        b'{"events":[{"x":"\\ud83c"}}': "not JSON",
        b'{"events":[{"x":"\\ud83c"}]}]': "not JSON",
        b'{"events":["\\ud83c", nonsense]}': "not JSON",
        b'{"events":["\\ud83c"%b]}' % (b",1" * MAX_EVENTS): "$.events",
    }
    for body, named in bodies.items():
        reply = await call(gateway.port, "publish", body)
        assert (reply.status, named in reply.json["error"]) == (422, True), body[:50]


async def test_confirm_is_a_number_of_replicas_or_all(gateway: Running) -> None:
    for confirm in ("-1", "1.5", "most", "", "1000000"):
        reply = await call(gateway.port, f"publish?confirm={confirm}", {"events": []})
        assert (reply.status, reply.json["error"].partition(" ")[0]) == (422, "confirm")


async def test_since_is_not_negative(gateway: Running) -> None:
    for since, status in (("-1", 422), ("%20-1e300", 422), ("0", 200)):
        reply = await call(gateway.port, f"history?tenant_id=1&branch_id=1&since={since}")
        assert (reply.status, "since" in reply.text) == (status, status == 422)


@pytest.mark.parametrize("confirm", ["1", "all"])
async def test_an_event_without_confirmation_is_in_doubt_and_has_its_id(
    gateway: Running, backend: "redis.Redis", confirm: str
) -> None:
    first, second, third = await publish(gateway.port, [READY, CART, {}], f"?confirm={confirm}")
    assert (first["error"], second) == ("in_doubt", {"event_id": None})
    assert first["event_id"].endswith(tag(STREAM))
    assert third["error"].startswith("invalid: ")
    assert payloads(backend) == [json.dumps(READY)]


async def test_a_body_over_the_bound_is_refused(gateway: Running) -> None:
    most = {"publish": MAX_BYTES, "disconnect": 16_384}
    for name, size in most.items():
        for chunked in (False, True):
            for length, status in ((size, 422), (size + 1, 413)):
                found = await post(gateway.port, name, b"x" * length, chunked=chunked)
                assert found == status, (name, length)


async def post(port: int, name: str, body: bytes, *, chunked: bool) -> int:
    """Send a body and return the status; the answer may come before all of it is sent."""
    lines = [f"POST /ws/api/{name} HTTP/1.1", "Host: x", "Connection: close"]
    lines += [f"{name}: {value}" for name, value in bearer_of("all").items()]
    lines.append("Transfer-Encoding: chunked" if chunked else f"Content-Length: {len(body)}")
    data = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body) if chunked else body
    status = b""
    async with await trio.open_tcp_stream("127.0.0.1", port) as stream:

        async def send() -> None:
            with suppress(trio.BrokenResourceError):
                await stream.send_all("\r\n".join([*lines, "", ""]).encode() + data)

        with trio.fail_after(20):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(send)
                while b"\r\n" not in status:
                    more = await stream.receive_some()
                    assert more
                    status += more
                nursery.cancel_scope.cancel()
    return int(status.split(b" ")[1])


async def test_events_go_to_the_shard_of_their_tenant(
    redis_url: str, backend: "redis.Redis", tmp_path: Path
) -> None:
    changes = {"ws_api_keys_file": write_keys(tmp_path), "redis_stream_shards": 64}
    async with serving(redis_url, "direct", **changes) as gateway:
        found = await publish(gateway.port, [READY, READY | {"tenant_id": 2}])
    for answer, shard in zip(found, (50, 17), strict=True):
        stream = f"{STREAM}:{{{shard}}}"
        assert len(payloads(backend, stream)) == 1
        assert answer["event_id"].endswith(tag(stream))


async def test_own_routes_decide_what_is_durable(
    redis_url: str, backend: "redis.Redis", tmp_path: Path
) -> None:
    (tmp_path / "routes.toml").write_text('[routes.BREAD_BAKED]\nto=["kitchen"]\ndurable=true\n')
    changes = {
        "ws_api_keys_file": write_keys(tmp_path), "ws_routes_file": tmp_path / "routes.toml",
    }  # fmt: skip
    async with serving(redis_url, "direct", **changes) as gateway:
        (found,) = await publish(gateway.port, [READY | {"type": "BREAD_BAKED"}])
    assert found["event_id"] is not None
    assert len(payloads(backend)) == 1


async def test_while_redis_is_away_nothing_is_published_and_the_answer_says_so(
    tmp_path: Path,
) -> None:
    settings = make_settings(
        "redis://127.0.0.1:1", ws_api_keys_file=write_keys(tmp_path, KEYS), ws_cluster=True
    )
    async with running(settings, wait_ready=False) as gateway:
        for path, body in (
            ("publish", {"events": [READY, {}]}),
            ("disconnect", {"tenant_id": 1, "user_id": "21"}),
            ("refresh", {"tenant_id": 1, "waiter_id": "21"}),
            ("nodes", None),
            ("presence?tenant_id=1&branch_id=1", None),
            ("history?tenant_id=1&branch_id=1&since=0", None),
        ):
            reply = await call(gateway.port, path, body)
            assert (reply.status, "retry-after" in reply.headers) == (503, True), path
        # What is wrong with a request is told nevertheless.
        reply = await call(gateway.port, "publish", {"events": [{}]})
        assert reply.status == 200
        foreign = {"events": [READY | {"tenant_id": 9}]}
        assert (await call(gateway.port, "publish", foreign, key="orders")).status == 403


async def test_a_redis_that_refuses_all_events_is_named_and_one_that_refuses_some_is_not_hidden(
    gateway: Running, backend: "redis.Redis"
) -> None:
    backend.set(STREAM, "no stream")
    reply = await call(gateway.port, "publish", {"events": [READY, READY]})
    assert reply.status == 503
    assert "WRONGTYPE" in reply.json["error"]
    first, second = await publish(gateway.port, [READY, CART])
    assert first == {"error": "refused: WRONGTYPE"}
    assert second == {"event_id": None}


async def test_a_redis_that_refuses_an_order_is_named_and_logged(
    gateway: Running, backend: "redis.Redis"
) -> None:
    backend.set("{gateway}:orders", "no stream")
    with capture_logs() as logs:
        for name, field in (("disconnect", "user_id"), ("refresh", "waiter_id")) * 3:
            reply = await call(gateway.port, name, {"tenant_id": 1, field: "21"})
            assert reply.status == 503
            assert reply.json["error"].startswith("Redis refuses (")  # also while a breaker is open
    assert "Redis refuses a command" in [each["event"] for each in logs]


# --- disconnect, refresh, nodes ---


async def test_disconnect_closes_the_connections_of_a_user_a_session_or_a_token(
    gateway: Running,
) -> None:
    async with (
        admitted(gateway.staff_url("admin", sub="21")) as first,
        admitted(gateway.staff_url("waiter", sub="21")) as second,
        admitted(gateway.staff_url("admin", sub="22", jti="abc")) as third,
        admitted(gateway.diner_url(session_id=456)) as diner,
        admitted(gateway.staff_url("admin", sub="23", tenant_id=2)) as other,
    ):
        for body, clients in (
            ({"user_id": "21", "reason": "left the company"}, [first, second]),
            ({"user_id": "0", "reason": "cut inside an emoji: \ud83c"}, []),
            ({"user_id": 21}, []),
            ({"jti": "abc"}, [third]),
            ({"session_id": 456}, [diner]),
            ({"user_id": "23"}, []),
        ):
            reply = await call(gateway.port, "disconnect", {"tenant_id": 1} | body)
            assert reply.json == {"closed": len(clients), "complete": True, "missing": []}
            for client in clients:
                code, reason = await closed(client)
                assert code == 4001
                assert reason == body.get("reason", reason)
        assert await received_texts(other) == []


async def test_an_invalid_order_names_the_field(gateway: Running) -> None:
    orders: list[tuple[str, Any, str]] = [
        ("disconnect", {"tenant_id": 1}, "exactly one of user_id, session_id and jti"),
        ("disconnect", {"tenant_id": 1, "user_id": "2", "jti": "a"}, "exactly one of"),
        ("disconnect", {"user_id": "2"}, "tenant_id"),
        ("disconnect", {"tenant_id": "1", "user_id": "2"}, "$.tenant_id"),
        ("disconnect", {"tenant_id": True, "user_id": "2"}, "$.tenant_id"),
        ("disconnect", {"tenant_id": 1, "user_id": "a"}, "user_id must be a decimal"),
        ("disconnect", {"tenant_id": 1, "user_id": "2\n"}, "user_id must be"),
        ("disconnect", {"tenant_id": 1, "user": "2"}, "`user`"),
        ("disconnect", {"tenant_id": 1, "session_id": 2**63}, "$.session_id"),
        ("disconnect", {"tenant_id": 1, "jti": ""}, "$.jti"),
        ("disconnect", {"tenant_id": 1, "user_id": "2", "reason": "x" * 101}, "$.reason"),
        ("refresh", {"tenant_id": 1}, "waiter_id"),
        ("refresh", {"tenant_id": 1, "waiter_id": "a"}, "waiter_id must be a decimal string"),
        ("refresh", {"tenant_id": 0, "waiter_id": "2"}, "$.tenant_id"),
        ("refresh", {"tenant_id": 1, "waiter_id": None}, "$.waiter_id"),
        ("refresh", [], "object"),
    ]
    for path, body, named in orders:
        reply = await call(gateway.port, path, body)
        assert (reply.status, named in reply.json["error"]) == (422, True), body


async def test_nodes_are_the_processes_of_the_service(
    gateway: Running, redis_url: str, tmp_path: Path
) -> None:
    async with (
        serving(redis_url, "direct", ws_cluster=True) as other,
        admitted(other.staff_url("admin")),
    ):
        names = set[str]()
        await until(lambda: _sees(gateway, names, 2))
        reply = await call(gateway.port, "nodes")
        for node in reply.json["nodes"]:
            assert set(node) == {
                "name", "version", "started_at", "draining", "connections", "lag", "shards",
            }  # fmt: skip
    await until(lambda: _sees(gateway, set(), 1))


async def _sees(gateway: Running, names: set[str], number: int) -> bool:
    found = (await call(gateway.port, "nodes")).json["nodes"]
    names |= {each["name"] for each in found}
    return len(found) == number


# --- whatever comes ---


async def test_random_bodies_and_queries_never_cause_an_error_of_ours(gateway: Running) -> None:
    chooser = random.Random(7)
    parts: list[Any] = [
        None, True, 0, 1, -1, 2**63, 2**70, 1.5, 1e400, "", "1", "21", "\ud800", "x" * 300, [], {},
        READY, CART, READY | {"tenant_id": "1"}, [READY], "?&=%", "\x00",
    ]  # fmt: skip
    names = ["events", "tenant_id", "user_id", "session_id", "jti", "reason", "waiter_id", "x"]

    def value(depth: int = 0) -> Any:
        if depth < 3 and chooser.random() < 0.4:
            if chooser.random() < 0.5:
                return [value(depth + 1) for _ in range(chooser.randrange(4))]
            return {chooser.choice(names): value(depth + 1) for _ in range(chooser.randrange(5))}
        return chooser.choice(parts)

    statuses = set()
    for _ in range(150):
        body = json.dumps({chooser.choice(names): value() for _ in range(chooser.randrange(4))})
        data = body.encode()
        for _ in range(chooser.choice([0, 0, 1, 5])):  # broken bytes
            at = chooser.randrange(len(data))
            data = data[:at] + bytes([chooser.randrange(256)]) + data[at + 1 :]
        each = chooser.choice(CALLS)
        query = "&".join(
            f"{chooser.choice(['tenant_id', 'branch_id', 'since', 'confirm'])}="
            + chooser.choice(["", "1", "0", "-1", "1e9", "99999999999999999999", "a", "%00", "%FF"])
            for _ in range(chooser.randrange(5))
        )
        reply = await call(
            gateway.port, f"{each.name}?{query}", data if each.method == "POST" else None
        )
        assert reply.status in (200, 403, 404, 422), (each.name, query, data, reply.text)
        assert isinstance(reply.json, dict)
        statuses.add(reply.status)
    assert {200, 422} <= statuses
    counted = (await metrics(gateway.port)).families["wsgateway_api_requests"].samples
    assert not any(each.labels["status"].startswith("5") for each in counted)
