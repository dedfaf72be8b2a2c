"""Parsing a request head: an upgrade, a refusal, or a request for Hypercorn."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.sockets import ACCEPT, HEADS, KEY, HeadCase, make_head
from trio_gateway.core.audiences import Endpoint
from trio_gateway.core.client_request import ClientRequest
from trio_gateway.transports.handshake import (
    MAX_HEADERS,
    Refusal,
    acceptance,
    join_headers,
    parse_head,
    read_query,
    refusal_response,
)


def parse(*more: str, **changes: Any) -> ClientRequest:
    handshake = parse_head(make_head(*more, **changes))
    assert isinstance(handshake, ClientRequest)
    return handshake


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_head_is_upgraded_refused_or_passed_to_hypercorn(head: HeadCase) -> None:
    match parse_head(head.data):
        case None:
            assert head.by == "hypercorn"
        case Refusal(status, reason):
            assert (head.by, head.status) == ("direct", status)
            assert reason.isascii()
        case ClientRequest(endpoint, key=key):
            assert (head.by, head.status) == ("direct", 101)
            assert (endpoint, key) == (Endpoint.WAITER, KEY)


def test_http2_that_was_not_negotiated_is_refused() -> None:
    assert parse_head(b"PRI * HTTP/2.0\r\n\r\n") == Refusal(400, "HTTP/2 was not negotiated")


def test_maximum_number_of_headers_is_accepted() -> None:
    assert parse(*["X-More: y"] * (MAX_HEADERS - 5)).headers["x-more"].startswith("y, y")


@pytest.mark.parametrize("endpoint", Endpoint)
def test_each_endpoint_has_its_path(endpoint: Endpoint) -> None:
    assert parse(request=f"GET {endpoint.path}?token=a HTTP/1.1").endpoint is endpoint


@given(st.binary(max_size=300))
def test_arbitrary_bytes_never_raise(data: bytes) -> None:
    assert not isinstance(parse_head(data + b"\r\n\r\n"), ClientRequest)


@given(st.data())
def test_head_with_any_byte_inserted_never_raises(data: st.DataObject) -> None:
    head = bytearray(make_head("Origin: http://a.example", "Sec-WebSocket-Protocol: gateway.v1"))
    at = data.draw(st.integers(0, len(head) - 5))
    head[at : at + data.draw(st.integers(0, 1))] = data.draw(st.binary(min_size=1, max_size=2))
    match parse_head(bytes(head)):
        case ClientRequest() as handshake:
            assert acceptance(handshake).startswith(b"HTTP/1.1 101 ")
        case Refusal() as refusal:
            assert refusal_response(refusal).startswith(b"HTTP/1.1 4")


# The responses


def test_accept_key_is_that_of_the_rfc_example() -> None:
    assert acceptance(parse()) == (
        b"HTTP/1.1 101 Switching Protocols\r\n"
        b"Upgrade: websocket\r\n"
        b"Connection: Upgrade\r\n"
        b"Sec-WebSocket-Accept: " + ACCEPT.encode() + b"\r\n\r\n"
    )


def test_no_extension_is_accepted() -> None:
    handshake = parse("Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits")

    assert b"extension" not in acceptance(handshake).lower()


@pytest.mark.parametrize("status", [400, 404, 408, 426, 431, 503])
def test_refusal_closes_the_connection_and_gives_the_reason(status: int) -> None:
    head, _, body = refusal_response(Refusal(status, "because")).partition(b"\r\n\r\n")

    assert head.startswith(b"HTTP/1.1 %d " % status)
    assert b"\r\nConnection: close" in head
    assert b"\r\nContent-Length: %d" % len(body) in head
    assert body == b"because\n"


def test_426_names_the_upgrade_and_its_version() -> None:
    refusal = parse_head(make_head(sec_websocket_version="8"))
    assert isinstance(refusal, Refusal)

    response = refusal_response(refusal)

    assert b"\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n" in response


# The subprotocol


@pytest.mark.parametrize(
    ("offered", "answered", "credential"),
    [
        ("gateway.v1, bearer.abc.def.ghi", "gateway.v1", "abc.def.ghi"),
        ("bearer.abc,gateway.v1", "gateway.v1", "abc"),
        ("gateway.v1", "gateway.v1", ""),
        ("bearer.abc", None, "abc"),
        ("gateway.v2, graphql-ws", None, ""),
        ("GATEWAY.V1", None, ""),
        ("", None, ""),
    ],
)
def test_subprotocol_pair_carries_the_token(
    offered: str, answered: str | None, credential: str
) -> None:
    handshake = parse(f"Sec-WebSocket-Protocol: {offered}")

    assert (handshake.subprotocol, handshake.credential) == (answered, credential)
    expected = f"\r\nSec-WebSocket-Protocol: {answered}\r\n".encode() if answered else b""
    assert expected in acceptance(handshake)
    assert b"bearer" not in acceptance(handshake)


def test_subprotocols_may_be_in_two_headers() -> None:
    handshake = parse("Sec-WebSocket-Protocol: gateway.v1", "Sec-WebSocket-Protocol: bearer.abc")

    assert (handshake.subprotocol, handshake.credential) == ("gateway.v1", "abc")


# Query and headers


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ("", {}),
        ("a=1&b=2&a=3", {"a": "1", "b": "2"}),
        ("a", {"a": ""}),
        ("a=%FF", {"a": "�"}),
        ("a=1;b=2", {"a": "1;b=2"}),
    ],
)
def test_query_parameters_are_decoded(query: str, found: dict[str, str]) -> None:
    assert read_query(query) == found


def test_headers_with_one_name_are_joined_in_any_case() -> None:
    headers = [(b"Accept", b" a "), (b"X", b"\xe9"), (b"ACCEPT", b"b")]

    assert join_headers(headers) == {"accept": "a, b", "x": "\xe9"}
