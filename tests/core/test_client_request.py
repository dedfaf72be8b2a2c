import pytest

from trio_gateway.core.audiences import ENDPOINTS
from trio_gateway.core.client_request import ClientRequest, bearer
from trio_gateway.transports.handshake import read_query


def request(target: str = "/ws/waiter", **headers: str) -> ClientRequest:
    """A request for this target; an underscore in the name of a header stands for a hyphen."""
    path, _, query = target.partition("?")
    found = {name.replace("_", "-"): value for name, value in headers.items()}
    return ClientRequest(ENDPOINTS[path], read_query(query), found)


# The credential


def test_query_precedes_authorization_which_precedes_the_subprotocol() -> None:
    headers = {
        "authorization": "Bearer second",
        "sec_websocket_protocol": "gateway.v1, bearer.third",
    }

    assert request("/ws/waiter?token=first", **headers).credential == "first"
    assert request(**headers).credential == "second"
    assert request(sec_websocket_protocol=headers["sec_websocket_protocol"]).credential == "third"
    assert request().credential == ""


def test_empty_token_in_the_query_is_ignored() -> None:
    assert request("/ws/waiter?token=", authorization="Bearer real").credential == "real"


@pytest.mark.parametrize(
    ("target", "credential"),
    [
        ("/ws/diner?table_token=mine", "mine"),
        ("/ws/diner?token=mine", ""),
        ("/ws/waiter?table_token=mine", ""),
        ("/ws/waiter?token=a&token=b", "a"),
        ("/ws/waiter?TOKEN=a", ""),
        ("/ws/diner?table_token=1%3A2%3A3", "1:2:3"),
    ],
)
def test_query_parameter_of_the_token_depends_on_the_endpoint(target: str, credential: str) -> None:
    assert request(target).credential == credential


def test_ticket_is_in_the_query() -> None:
    assert request("/ws/diner?ticket=once").ticket == "once"
    assert request().ticket is None


@pytest.mark.parametrize(
    ("authorization", "token"),
    [
        ("Bearer abc", "abc"),
        ("bearer abc", "abc"),
        ("  BEARER   abc  ", "abc"),
        ("Bearer", None),
        ("Bearer ", None),
        ("Basic abc", None),
        ("Bearerabc", None),
        ("", None),
        (None, None),
    ],
)
def test_bearer_token(authorization: str | None, token: str | None) -> None:
    assert bearer(authorization) == token


# Where to resume


@pytest.mark.parametrize(
    ("target", "header", "last"),
    [
        ("/ws/waiter", None, None),
        ("/ws/waiter?last_event_id=7", None, "7"),
        ("/ws/waiter", "8", "8"),
        ("/ws/waiter?last_event_id=7", "8", "8"),
        ("/ws/waiter?last_event_id=", "8", "8"),
        ("/ws/waiter?last_event_id=7", "", "7"),
        ("/ws/waiter?last_event_id=7&lastEventId=9", None, "9"),
        ("/ws/waiter?last_event_id=", None, ""),
    ],
)
def test_last_event_id(target: str, header: str | None, last: str | None) -> None:
    headers = {} if header is None else {"last_event_id": header}

    assert request(target, **headers).last_event_id == last


def test_origin() -> None:
    assert request(origin="https://a.example").origin == "https://a.example"
    assert request().origin is None
