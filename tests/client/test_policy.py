import re
from importlib.resources import files
from typing import Any

import pytest

from trio_gateway.client.feed import REMEMBERED, Feed, Repeated
from trio_gateway.client.lifetime import RENEW_AT, Lifetime, expiry
from trio_gateway.client.policy import Next, after_close, after_status, retry_after
from trio_gateway.client.values import Event
from trio_gateway.core.close_codes import Close
from trio_gateway.testing import make_jwt, make_payload


def test_only_codes_that_a_retry_cannot_fix_are_final() -> None:
    stops = {close for close in Close if after_close(close) is Next.STOP}
    assert stops == {1002, 1003, 1007, 1008, 1009, 4003}
    assert after_close(4001) is Next.RENEW
    assert after_close(4029) is Next.COOL_DOWN
    assert after_close(4999) is Next.BACK_OFF


def test_reaction_to_each_code_is_that_of_the_contract() -> None:
    reactions = {
        "not retry": Next.STOP,
        "fix its code": Next.STOP,
        "not retry with the same token": Next.RENEW,
        "wait before it reconnects": Next.COOL_DOWN,
        "reconnect": Next.BACK_OFF,
        "reconnect and resume": Next.BACK_OFF,
        "reconnect after that time": Next.BACK_OFF,
        "retry with back-off": Next.BACK_OFF,
    }
    for close in set(Close) - {Close.NORMAL}:
        if close.sent:
            assert after_close(close) is reactions[close.then]


def test_both_clients_stop_at_the_same_codes() -> None:
    source = files("trio_gateway").joinpath("static", "client.js").read_text("utf-8")
    (stops,) = re.findall(r"^const STOP = new Set\(\[(.*)\]\);$", source, re.MULTILINE)
    assert {int(code) for code in stops.split(",")} == {
        close for close in Close if after_close(close) is Next.STOP
    }


@pytest.mark.parametrize("token", ["", "opaque", "1:1:10:456:99:sig", "a.b.c", make_jwt("x" * 32)])
def test_expiry_is_known_only_from_the_token(token: str) -> None:
    assert (expiry(token) is not None) is token.startswith("ey")


def life(*, left: float, of: float | None, behind: float = 0) -> float:
    """The estimated remaining lifetime of a token, by a clock that is ``behind``."""
    now = 1_790_000_000
    issued_at: Any = ... if of is None else int(now + left - of)
    token = make_jwt("x" * 32, iat=issued_at, exp=int(now + left))
    return Lifetime().left(token, now + left, now - behind)


@pytest.mark.parametrize("behind", [-600, -30, 0, 30, 600])
@pytest.mark.parametrize("whole", [120, 900, 7200])
def test_remaining_lifetime_is_bounded_whatever_the_clock(whole: float, behind: float) -> None:
    assert 0 < life(left=whole, of=whole, behind=behind) <= whole


@pytest.mark.parametrize("behind", [-600, -30, 0, 30, 600])
@pytest.mark.parametrize("whole", [900, 7200])
def test_token_without_iat_is_renewed_in_time_by_a_clock_that_is_minutes_behind(
    whole: float, behind: float
) -> None:
    assert 0 < RENEW_AT * life(left=whole, of=None, behind=behind) <= whole


def test_correct_clock_gives_a_cached_token_its_remaining_lifetime() -> None:
    assert life(left=100, of=900) == 100
    assert life(left=100, of=None) == 100


def test_clock_that_is_ahead_gives_a_token_its_whole_lifetime() -> None:
    assert life(left=100, of=600, behind=-(10**6)) == 600
    assert life(left=100, of=None, behind=-(10**6)) == 75


@pytest.mark.parametrize("behind", [-500, 500])
def test_expiry_shows_the_error_of_the_clock(behind: float) -> None:
    now, lifetime = 1_790_000_000, Lifetime()
    lifetime.expired(now, now - behind)
    token = make_jwt("x" * 32, iat=..., exp=now + 600)
    assert lifetime.left(token, now + 600, now - behind) == 600


def test_401_concerns_the_token() -> None:
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


def test_feed_remembers_a_thousand_events() -> None:
    feed = Feed("")
    texts = [make_payload(event_id=str(number)).decode() for number in range(REMEMBERED + 1)]
    assert all(isinstance(feed.read(text)[0], Event) for text in texts)
    assert all(isinstance(feed.read(text)[0], Repeated) for text in texts[1:])
    assert isinstance(feed.read(texts[0])[0], Event)
