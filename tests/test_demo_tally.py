"""The demo counts as missing only what was confirmed, should have arrived, and has not for 5 s."""

from trio_gateway.cli.demo_tally import Tally
from trio_gateway.testing import make_payload

READY = make_payload("ROUND_READY", id="a", sector_id=5, session_id=456)


def test_an_event_is_missing_for_each_role_that_should_have_it() -> None:
    now = 0.0
    tally = Tally(lambda: now)
    tally.publish(READY)
    now = 10.0
    assert tally.missing == 0  # it is not confirmed
    tally.confirm(READY)
    now = 14.0
    assert tally.missing == 0
    now = 16.0
    assert tally.missing == 4
    tally.receive("waiter", "a")
    tally.receive("waiter", "a")
    assert tally.missing == 3
    for role in ("kitchen", "admin", "diner"):
        tally.receive(role, "a")
    assert tally.missing == 0
    assert tally.counters == "published 1, confirmed 1, delivered 5, missing 0, gaps 0"


def test_events_of_others_are_never_missing() -> None:
    now = 0.0
    tally = Tally(lambda: now)
    for number, keys in enumerate(({"tenant_id": 2}, {"branch_id": 7})):
        payload = make_payload("ROUND_READY", id=str(number), **keys)
        tally.publish(payload)
        tally.confirm(payload)
    now = 100.0
    assert (tally.confirmed, tally.missing) == (2, 0)


def test_a_copy_that_came_first_counts() -> None:
    now = 0.0
    tally = Tally(lambda: now)
    tally.publish(READY)  # on a channel
    for role in ("waiter", "kitchen", "admin", "diner"):
        tally.receive(role, "a")
    tally.publish(READY)  # in the stream
    tally.confirm(READY)
    now = 100.0
    assert tally.missing == 0


def test_events_that_may_get_lost_are_forgotten_and_missing_ones_are_not() -> None:
    now = 0.0
    tally = Tally(lambda: now)
    tally.publish(READY)
    tally.confirm(READY)
    for number in range(3000):
        tally.publish(make_payload("ROUND_READY", id=str(number)))
    now = 100.0
    assert tally.missing == 4
    assert len(tally._expected) <= 1001
