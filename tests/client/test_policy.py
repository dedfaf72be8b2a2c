import re
from importlib.resources import files
from typing import Any

import pytest

from trio_gateway.client.feed import REMEMBERED, Feed
from trio_gateway.client.lifetime import RENEW_AT, Lifetime, expiry
from trio_gateway.client.policy import Next, after_close, after_status, retry_after
from trio_gateway.core.close_codes import Close
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
        "fix its code": Next.STOP,
        "not retry with the same token": Next.RENEW,
        "wait before it reconnects": Next.COOL_DOWN,
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


@pytest.mark.parametrize("token", ["", "opaque", "1:1:10:456:99:sig", "a.b.c", make_jwt("x" * 32)])
def test_a_tokens_expiry_is_known_only_if_it_says_so(token: str) -> None:
    assert (expiry(token) is not None) is token.startswith("ey")


def life(*, left: float, of: float | None, behind: float = 0) -> float:
    """What is thought to be left of a token of such a life, by a clock that is behind."""
    now = 1_790_000_000
    issued_at: Any = ... if of is None else int(now + left - of)
    token = make_jwt("x" * 32, iat=issued_at, exp=int(now + left))
    return Lifetime().left(token, now + left, now - behind)


@pytest.mark.parametrize("behind", [-600, -30, 0, 30, 600])
@pytest.mark.parametrize("whole", [120, 900, 7200])
def test_a_new_token_has_no_more_than_its_life_left_whatever_the_clock_says(
    whole: float, behind: float
) -> None:
    assert 0 < life(left=whole, of=whole, behind=behind) <= whole


@pytest.mark.parametrize("behind", [-600, -30, 0, 30, 600])
@pytest.mark.parametrize("whole", [900, 7200])
def test_a_token_without_iat_is_renewed_in_time_by_a_clock_that_is_minutes_off(
    whole: float, behind: float
) -> None:
    assert 0 < RENEW_AT * life(left=whole, of=None, behind=behind) <= whole


def test_a_clock_that_is_right_leaves_a_kept_token_what_it_has() -> None:
    assert life(left=100, of=900) == 100
    assert life(left=100, of=None) == 100


def test_a_clock_that_is_ahead_leaves_a_token_its_whole_life() -> None:
    assert life(left=100, of=600, behind=-(10**6)) == 600
    assert life(left=100, of=None, behind=-(10**6)) == 75


@pytest.mark.parametrize("behind", [-500, 500])
def test_an_expiry_tells_how_far_off_the_clock_is(behind: float) -> None:
    now, lifetime = 1_790_000_000, Lifetime()
    lifetime.expired(now, now - behind)
    token = make_jwt("x" * 32, iat=..., exp=now + 600)
    assert lifetime.left(token, now + 600, now - behind) == 600


def test_a_401_is_about_the_token() -> None:
    assert after_status(401) is Next.RENEW


@pytest.mark.parametrize(
    ("value", "date", "seconds"),
    [
        ("7", "", 7),
        ("0", "", 0),
        ("9" * 400, "", 3600),
        ("", "", None),
        ("-1", "", None),
        ("\xb2", "", None),
        ("soon", "", None),
        ("Sun, 06 Nov 1994 08:49:37 GMT", "Sun, 06 Nov 1994 08:49:00 GMT", 37),
        ("Sun, 06 Nov 1994 08:49:37 GMT", "Sun, 06 Nov 1994 08:50:00 GMT", 0),
        ("Sun, 06 Nov 1994 08:49:37 GMT", "", None),
        ("Sun, 06 Nov 1994 08:49:37", "Sun, 06 Nov 1994 08:49:00 GMT", None),
        ("Sun, 99 Nov 1994 08:49:37 GMT", "Sun, 06 Nov 1994 08:49:00 GMT", None),
    ],
)
def test_retry_after_is_seconds_or_a_date(value: str, date: str, seconds: float | None) -> None:
    assert retry_after(value, date) == seconds


def test_a_feed_remembers_a_thousand_events() -> None:
    feed = Feed("")
    texts = [make_payload(event_id=str(number)).decode() for number in range(REMEMBERED + 1)]
    assert all(feed.read(text) for text in texts)
    assert not any(feed.read(text) for text in texts[1:])
    assert feed.read(texts[0])
