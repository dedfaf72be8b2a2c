"""Isolation of two tenants with equal ids, and invalid payloads of every shape."""

import json
import random
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, Final

import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs
from trio_websocket import WebSocketConnection

from tests.support.gateways import (
    Running,
    Transport,
    admitted,
    make_settings,
    metrics,
    received,
    received_texts,
    running,
    settle,
)

STREAM = "events:critical"
MAX = 2**63 - 1
TENANTS = (1, 2)
SECRET = "payload-that-no-log-may-show"
# Channels of any tenant, branch, sector and session, and odd ones.
CHANNELS: Final[tuple[str | bytes, ...]] = (
    STREAM,
    "channel:branch:1:waiters",
    "channel:branch:2:admin",
    "channel:tenant:1:admin",
    "channel:tenant:2:admin",
    "channel:sector:1:5:waiters",
    "channel:session:456",
    "branch:1:kitchen",
    "sector:5:waiters",
    "sector:1:5:waiters",
    "tenant:2:admin",
    "tenant:*:admin",
    "session:",
    "session:456:457:[x]*?\\",
    "branch:\r\n:waiters",
    "branch:Ñ🙏:admin",
    b"session:\xff\xfe",
    b"session:\x00",
)


@asynccontextmanager
async def clients_of_both(
    gateway: Running,
) -> AsyncIterator[dict[tuple[int, str], WebSocketConnection]]:
    """One client of each kind per tenant, with the same users, branches, sectors and sessions."""
    async with AsyncExitStack() as stack:
        found = {}
        for tenant in TENANTS:
            staff: Mapping[str, Any] = {"tenant_id": tenant, "branch_ids": [1, 2]}
            urls = {
                "waiter": gateway.staff_url("waiter", sector_ids=[5, 6], **staff),
                "manager": gateway.staff_url("waiter", roles=["MANAGER"], **staff),
                "kitchen": gateway.staff_url("kitchen", **staff),
                "admin": gateway.staff_url("admin", **staff),
                "diner": gateway.diner_url(tenant_id=tenant),
            }
            for who, url in urls.items():
                found[tenant, who] = await stack.enter_async_context(admitted(url))
        yield found


def publish(backend: "redis.Redis", channel: str | bytes, payload: bytes) -> None:
    if channel == STREAM:
        backend.xadd(STREAM, {"data": payload})
    else:
        backend.publish(channel, payload)


def event(**changes: Any) -> dict[str, Any]:
    """A valid event for every client of a tenant's branch; a key set to ``...`` is left out."""
    found = {
        "type": "ROUND_READY",
        "tenant_id": 1,
        "branch_id": 1,
        "sector_id": 5,
        "session_id": 456,
        "entity": {"note": SECRET},
    } | changes
    return {key: value for key, value in found.items() if value is not ...}


def _json(**changes: Any) -> bytes:
    return json.dumps(event(**changes)).encode()


def _not_an_id(key: str, *, zero: bool = True, null: bool = True) -> list[tuple[str, bytes]]:
    """Invalid ids, each in an event that is otherwise valid."""
    values: list[Any] = [
        True, False, "1", "", 1.0, 1.5, -1, -MAX, MAX + 1, 2**64, 10**30, [1], {"id": 1}, [], {},
    ]  # fmt: skip
    values += ([0] if zero else []) + ([None] if null else [])
    found = [(key, _json(**{key: value})) for value in values]
    # json.dumps writes no such number; it must not be changed.
    raw = _json(**{key: "@"})
    return found + [(key, raw.replace(b'"@"', text)) for text in (b"1e0", b"1E0", b"0.1e1")]


_NO_TYPES: Final[list[Any]] = ["", None, 1, True, [], {}, ["ROUND_READY"], ...]
_NO_KEYS: Final[list[Any]] = [1, True, [], {}, 1.5]
JUNK: Final[list[tuple[str, bytes]]] = [
    *_not_an_id("tenant_id"),
    ("tenant_id", _json(tenant_id=...)),
    *_not_an_id("branch_id", zero=False),
    ("branch_id", _json(branch_id=...)),
    *_not_an_id("sector_id", null=False),
    *_not_an_id("session_id", null=False),
    *_not_an_id("table_id", null=False),
    *(("type", _json(type=kind)) for kind in _NO_TYPES),
    *(("id", _json(id=key)) for key in _NO_KEYS),
    # Of two equal keys the last one counts, as in a browser.
    ("tenant_id", b'{"tenant_id":1,"type":"ROUND_READY","branch_id":1,"tenant_id":"2"}'),
    ("tenant_id", b'{"type":"ROUND_READY","branch_id":1,"Tenant_id":1,"tenantId":1,"TENANT_ID":1}'),
    ("tenant_id", b'{"type":"ROUND_READY","branch_id":1,"data":{"tenant_id":1}}'),
    *(("not_object", text) for text in (b"[]", b"1", b'"text"', b"null", b"true", b"1.5")),
    ("not_object", b"[" + _json() + b"]"),
    ("not_object", json.dumps(_json().decode()).encode()),
    # The reason is the first error; the rest is not read.
    ("not_object", b"[" * 30000),
    ("sector_id", _json(sector_id="@").replace(b'"@"', b"0x5")),
    ("not_json", b""),
    ("not_json", b" "),
    ("not_json", b"{"),
    ("not_json", b"hello"),
    ("not_json", _json()[:-1]),
    ("not_json", _json() + b"}"),
    ("not_json", _json() + b"\n" + _json()),
    ("not_json", _json() + b"\x00"),
    ("not_json", b"\x00" + _json()),
    ("not_json", _json().replace(b'"', b"'")),
    ("not_json", _json().replace(b":", b"=")),
    ("not_json", _json()[:-1] + b",}"),
    ("not_json", _json(sector_id="@").replace(b'"@"', b"05")),
    ("not_json", _json(sector_id="@").replace(b'"@"', b"NaN")),
    ("not_json", _json(sector_id="@").replace(b'"@"', b"+5")),
    ("not_json", b"\xef\xbb\xbf" + _json()),
    ("not_json", b'{"type":"a\nb","tenant_id":1,"branch_id":1}'),
    ("too_deep", b'{"a":' * 5000),
    ("not_json", bytes(range(128))),
    ("not_utf8", bytes(range(256))),
    ("not_utf8", b"\xff\xfe" + _json()),
    ("not_utf8", _json().decode().encode("utf-16")),
    ("not_utf8", _json(type="@").replace(b"@", b"\xc3")),
    ("not_utf8", _json(type="@").replace(b"@", b"\xed\xa0\x80")),
    ("not_utf8", b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00}\x94\x8c\x04type\x94"),
    ("too_big", _json(data="x" * 65_536)),
    ("too_big", b"x" * 200_000),
    ("too_big", _json()[:-1] + b" " * 65_536 + b"}"),
]


@pytest.mark.parametrize("transport", ["direct", "asgi"])
async def test_invalid_payloads_reach_no_client_and_stop_nothing(
    backend: "redis.Redis", redis_url: str, transport: Transport
) -> None:
    dice = random.Random(7)
    junk = [(reason, payload) for reason, payload in JUNK for _ in range(2)]
    dice.shuffle(junk)
    sent: Counter[int] = Counter()
    with capture_logs() as logs:
        async with (
            running(make_settings(redis_url), transport=transport) as gateway,
            clients_of_both(gateway) as clients,
        ):
            for n, (_, payload) in enumerate(junk):
                publish(backend, CHANNELS[n % len(CHANNELS)], payload)
                if n % 4 == 0:  # valid events in between, which must arrive
                    tenant = dice.choice(TENANTS)
                    marker = event(tenant_id=tenant, entity={"marker": [tenant, sent[tenant]]})
                    publish(backend, dice.choice((STREAM, "branch:1:admin")), _to_json(marker))
                    sent[tenant] += 1
            await settle(gateway)
            received_by = {who: await received(client) for who, client in clients.items()}
            figures = await metrics(gateway.port)

    for (tenant, who), found in received_by.items():
        markers = [each["entity"]["marker"] for each in found]
        assert sorted(markers) == [[tenant, n] for n in range(sent[tenant])], who
    assert figures.by_label("events_invalid_total") == Counter(reason for reason, _ in junk)
    assert figures["events_processed_total"] == sent.total()
    warnings = [line for line in logs if line["event"] == "invalid event"]
    # At most one line a second for each reason, and at least one.
    assert {line["reason"] for line in warnings} == {reason for reason, _ in junk}
    assert SECRET not in repr(logs)
    assert not [line for line in logs if line["log_level"] in {"error", "critical"}]


def _to_json(found: dict[str, Any]) -> bytes:
    return json.dumps(found).encode()


async def test_invalid_stream_entries_are_counted_and_skipped(
    backend: "redis.Redis", redis_url: str
) -> None:
    entries: list[dict[Any, Any]] = [
        {"event": _json()},
        {"DATA": _json()},
        {"data ": _json()},
        {b"\xff": _json()},
        {"payload": _json(), "tenant_id": "1"},
    ]
    async with (
        running(make_settings(redis_url)) as gateway,
        admitted(gateway.staff_url("waiter", sector_ids=[5])) as waiter,
    ):
        for entry in entries:
            backend.xadd(STREAM, entry)
        backend.xadd(STREAM, {"data": _json(type="TABLE_CLEARED"), "trace": "of the backend's own"})
        await settle(gateway)

        assert [found["type"] for found in await received(waiter)] == ["TABLE_CLEARED"]
        figures = await metrics(gateway.port)
        assert figures.by_label("events_invalid_total") == {"no_data": len(entries)}
        assert figures["events_received_total{stream}"] == len(entries) + 1


async def test_channel_does_not_decide_who_receives_an_event(
    backend: "redis.Redis", redis_url: str
) -> None:
    """A body of tenant 2 on every channel, those of tenant 1 included."""
    async with (
        running(make_settings(redis_url)) as gateway,
        clients_of_both(gateway) as clients,
    ):
        for n, channel in enumerate(CHANNELS):
            publish(backend, channel, _json(tenant_id=2, entity={"marker": n}))
        await settle(gateway)

        for (tenant, who), client in clients.items():
            markers = sorted(found["entity"]["marker"] for found in await received(client))
            assert markers == (list(range(len(CHANNELS))) if tenant == 2 else []), who


async def test_last_of_two_equal_keys_counts_as_in_a_browser(
    backend: "redis.Redis", redis_url: str
) -> None:
    twice = b'{"type":"ROUND_READY","tenant_id":1,"branch_id":1,"tenant_id":2,"sector_id":5}'
    escaped = b'{"type":"ROUND_READY","tenant_id":1,"branch_id":1,"tenant\\u005fid":2}'
    async with (
        running(make_settings(redis_url)) as gateway,
        clients_of_both(gateway) as clients,
    ):
        publish(backend, "branch:1:waiters", twice)
        publish(backend, STREAM, escaped)
        await settle(gateway)

        for (tenant, who), client in clients.items():
            found = await received(client)
            assert all(each["tenant_id"] == tenant for each in found), (tenant, who)
            assert len(found) == (0 if tenant == 1 or who == "diner" else 2), (tenant, who)


_IDS = st.sampled_from([1, 2, 5, 6, 456, 457])
_SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=10),
    _IDS,
    _IDS.map(str),
)
_JSON = st.recursive(
    _SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)


def _mostly(right: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """The valid strategy in three cases of four, otherwise anything."""
    return st.one_of(right, right, right, _JSON)


_EVENTS = st.fixed_dictionaries(
    {
        "type": _mostly(
            st.sampled_from(
                ["ROUND_READY", "ROUND_PENDING", "CART_SYNC", "ENTITY_CREATED", "WHATEVER",
                 "PRODUCT_AVAILABILITY_CHANGED"]
            )
        ),
        "tenant_id": _mostly(st.sampled_from(TENANTS)),
        "branch_id": _mostly(st.sampled_from([0, 1, 2, 3])),
    },
    optional={
        "sector_id": _mostly(_IDS),
        "session_id": _mostly(_IDS),
        "table_id": _mostly(_IDS),
        "id": _mostly(st.text(max_size=3)),
        "tenant": _JSON,
        "entity": _JSON,
        "ts": _JSON,
    },
)  # fmt: skip


def _damaged(payload: bytes, damage: tuple[int, bytes]) -> bytes:
    """The payload with a few bytes replaced."""
    at = damage[0] % (len(payload) + 1)
    return payload[:at] + damage[1] + payload[at + len(damage[1]) :]


def _text(found: Any) -> bytes:
    return json.dumps(found).encode()


_PAYLOADS: st.SearchStrategy[bytes] = st.one_of(
    _EVENTS.map(_text),
    _EVENTS.map(_text),
    _JSON.map(_text),
    st.binary(max_size=50),
    st.builds(
        _damaged,
        _EVENTS.map(_text),
        st.tuples(st.integers(0, 500), st.binary(min_size=1, max_size=3)),
    ),
)


def _content(payload: bytes) -> str:
    """The content without spaces and without the key that the gateway adds; empty if no object."""
    try:
        found = json.loads(payload)
    except (ValueError, RecursionError):
        return ""
    return json.dumps(found | {"event_id": 0}) if isinstance(found, dict) else ""


@given(
    published=st.lists(st.tuples(st.sampled_from(CHANNELS), _PAYLOADS), min_size=40, max_size=120)
)
@settings(
    max_examples=4,
    suppress_health_check=[
        HealthCheck.function_scoped_fixture,  # the gateway is new in every example
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
        HealthCheck.large_base_example,
    ],
)
async def test_no_payload_reaches_a_client_of_another_tenant(
    backend: "redis.Redis", redis_url: str, published: list[tuple[str | bytes, bytes]]
) -> None:
    async with (
        running(make_settings(redis_url)) as gateway,
        clients_of_both(gateway) as clients,
    ):
        for channel, payload in published:
            publish(backend, channel, payload)
        markers = [_json(tenant_id=tenant, entity={"last": True}) for tenant in TENANTS]
        for marker in markers:
            publish(backend, STREAM, marker)
            publish(backend, "branch:1:admin", marker.replace(b"last", b"too"))
        await settle(gateway)
        received_by = {who: await received_texts(client) for who, client in clients.items()}
        figures = await metrics(gateway.port)

    contents = {content for _, payload in published if (content := _content(payload))}
    for (tenant, who), found in received_by.items():
        for text in found:
            # As a browser reads it, it is of this tenant and was published.
            assert json.loads(text)["tenant_id"] == tenant, who
            assert _content(text.encode()) in contents or '"last"' in text or '"too"' in text
        assert sum('"last"' in text for text in found) >= 1, who
        assert sum('"too"' in text for text in found) >= 1, who
    invalid = sum(figures.by_label("events_invalid_total").values())
    handled = figures["events_processed_total"] + figures["events_duplicate_total"]
    assert invalid + handled == len(published) + 2 * len(markers)
