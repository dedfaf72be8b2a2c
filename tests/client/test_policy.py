import re
import time
from importlib.resources import files

import pytest

from trio_gateway.client.feed import REMEMBERED, Feed
from trio_gateway.client.policy import Next, after_close, expiry, life_left, retry_hint
from trio_gateway.core.closing import Close
from trio_gateway.testing import make_jwt, make_payload


def test_only_what_waiting_would_not_mend_is_the_end() -> None:
    stops = {close for close in Close if after_close(close) is Next.STOP}
    assert stops == {1002, 1003, 1007, 1008, 1009, 4003}
    assert after_close(4001) is Next.RENEW
    assert after_close(4029) is Next.COOL_DOWN
    assert after_close(4999) is Next.BACK_OFF


def test_what_is_done_is_what_the_contract_asks_for() -> None:
    asked = {
        "not retry": Next.STOP,
        "mend itself": Next.STOP,
        "not retry with the same token": Next.RENEW,
        "cool down": Next.COOL_DOWN,
        "reconnect": Next.BACK_OFF,
        "reconnect after that time": Next.BACK_OFF,
        "retry with back-off": Next.BACK_OFF,
    }
    for close in set(Close) - {Close.NORMAL}:
        if close.sent:
            assert after_close(close) is asked[close.then]


def test_both_clients_stop_at_the_same_codes() -> None:
    source = files("trio_gateway").joinpath("static", "client.js").read_text("utf-8")
    (stops,) = re.findall(r"^const STOP = new Set\(\[(.*)\]\);$", source, re.MULTILINE)
    assert {int(code) for code in stops.split(",")} == {
        close for close in Close if after_close(close) is Next.STOP
    }


@pytest.mark.parametrize(
    ("reason", "seconds"),
    [("retry in 3.2s", 3.2), ("busy, retry in 10s", 10), ("", None), ("retry in -1s", None)],
)
def test_a_hint_is_read_from_the_reason(reason: str, seconds: float | None) -> None:
    assert retry_hint(reason) == seconds


@pytest.mark.parametrize("token", ["", "opaque", "1:1:10:456:99:sig", "a.b.c", make_jwt("x" * 32)])
def test_a_tokens_expiry_is_known_only_if_it_says_so(token: str) -> None:
    assert (expiry(token) is not None) is token.startswith("ey")


def test_a_clock_that_is_ahead_leaves_a_token_its_whole_life() -> None:
    token = make_jwt("x" * 32, life=600)
    expires_at = expiry(token)
    assert expires_at is not None
    assert life_left(token, expires_at, expires_at - 7) == 7
    assert life_left(token, expires_at, expires_at + 10**6) == 600
    without = make_jwt("x" * 32, iat=..., exp=int(time.time()))
    assert life_left(without, 1.0, 2.0) == 300


def test_a_feed_remembers_a_thousand_events() -> None:
    feed = Feed("")
    texts = [make_payload(event_id=str(number)).decode() for number in range(REMEMBERED + 1)]
    assert all(feed.read(text) for text in texts)
    assert not any(feed.read(text) for text in texts[1:])
    assert feed.read(texts[0])
