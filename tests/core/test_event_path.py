"""The path of an event, from what Redis knows of it, and in words."""

from dataclasses import replace
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trio_gateway.core.audiences import BranchId
from trio_gateway.core.event_ids import Position, Stream, event_id
from trio_gateway.core.event_path import EventPath, Known, trace
from trio_gateway.core.events import Event, parse_event
from trio_gateway.core.path_words import tell, why_unknown
from trio_gateway.core.receipts import Place, Receipt, Receipts, Recipient, State, TrackedEvent
from trio_gateway.core.routes_file import read_routes
from trio_gateway.core.routing import ROUTES, Routing
from trio_gateway.testing import make_payload

REACHING = read_routes(
    '[routes.SERVICE_CALL_CREATED]\nmust_reach = "waiters"\nwithin = 10\n'
    'then = [{to = "floor", within = 5}, {to = "admins", within = 20}]\n'
)
TRACKED = read_routes("[routes.SERVICE_CALL_CREATED]\nreceipt = true\n")
TTL = 3600
AT = 1_790_000_000_000
PLACE = Place(Stream("4723"), Position((AT, 0)))
CALL = "SERVICE_CALL_CREATED"
TO_FLOOR = "EVENT_UNHEARD tells the admins, and the event goes to floor"
ANA, BEN, EVE = Recipient("waiter", "21"), Recipient("waiter", "22"), Recipient("admin", "9")


def event(type_: str = CALL, **keys: Any) -> Event:
    payload = make_payload(type_, **{"sector_id": 5} | keys)
    return parse_event(
        payload, channel="", received_at=0.0, stream=PLACE.stream, position=PLACE.position
    )


def receipt(steps: int = 0, *times: float | None) -> Receipt:
    """The times are those of sent, written, delivered and seen, in seconds."""
    moments = [None if time is None else AT + int(time * 1000) for time in times]
    sent, written, delivered, seen, *_ = (*moments, None, None, None, None)
    return Receipt(steps, sent, written, delivered, seen)


def known(
    after: float,
    by: dict[Recipient, Receipt] | None = None,
    confirmed: dict[int, float] | None = None,
    over: dict[int, float] | None = None,
    type_: str = CALL,
) -> Known:
    """What is known of an event after so many seconds."""

    def moments(given: dict[int, float] | None) -> dict[int, int]:
        return {step: AT + int(time * 1000) for step, time in (given or {}).items()}

    about = TrackedEvent(type_, 1, 1, AT)
    receipts = Receipts(about, by or {}, moments(confirmed), moments(over))
    is_there = by is not None or over is not None
    return Known(PLACE, AT + int(after * 1000), event(type_), receipts if is_there else None)


def path_of(known: Known, routes: Routing, *arguments: Any, **options: Any) -> EventPath:
    return tell(trace(known, routes, TTL, *arguments, **options), known, routes, TTL)


def steps_of(path: EventPath) -> list[tuple[str, str, float | None]]:
    return [(step.to, step.state, step.ended) for step in path.steps]


def timeline(path: EventPath) -> list[tuple[float, str]]:
    return [(moment.after, moment.text) for moment in path.timeline]


def test_confirmed_event_goes_no_further() -> None:
    by = {ANA: receipt(0b11, 0.01, 0.01, 0.3), EVE: receipt(0b100, 0.02, 0.02)}
    path = path_of(known(42, by, confirmed={0: 0.3, 1: 0.3}), REACHING)
    assert (path.event_id, path.at, path.now) == (event_id(*PLACE), AT / 1000, 42.0)
    assert [each["audience"] for each in path.audiences] == ["admins", "waiters"]
    assert steps_of(path) == [
        ("waiters", "confirmed", 0.3), ("floor", "not_begun", None), ("admins", "not_begun", None)
    ]  # fmt: skip
    assert path.summary == [
        "Sent to 2: written to 2, delivered to 1, seen by 0.",
        "Written, not confirmed: user 9 (admin).",
        "waiters: confirmed after 0.30 s, 9.70 s before the deadline.",
    ]
    assert timeline(path) == [
        (0.0, "entered Redis"),
        (0.01, "written to user 21 (waiter), user 9 (admin)"),
        (0.3, "delivered to user 21 (waiter)"),
        (0.3, "waiters: confirmed, so no step follows"),
    ]
    assert [(each.name, each.state, each.must_reach) for each in path.clients] == [
        ("user 9 (admin)", "written", ["admins"]),
        ("user 21 (waiter)", "delivered", ["waiters", "floor"]),
    ]


def test_client_whose_connection_takes_nothing_is_named_and_the_deadline_is_told() -> None:
    by = {ANA: receipt(0b11, 0.01), EVE: receipt(0b100, 0.02, 0.02, 0.05, 0.9)}
    path = path_of(known(4, by, confirmed={2: 0.05}), REACHING)
    # Who is in a later audience alone does not confirm for this one.
    assert steps_of(path)[0] == ("waiters", "running", None)
    assert path.summary == [
        "Sent to 2: written to 1, delivered to 1, seen by 1.",
        "Sent, not taken by its connection: user 21 (waiter).",
        f"waiters: nobody has confirmed yet; in 6.00 s {TO_FLOOR}.",
    ]
    assert timeline(path)[1] == (
        0.01, "sent to user 21 (waiter), whose connection did not take it at once"
    )  # fmt: skip
    assert path.timeline[-1].lies_ahead
    assert path.timeline[-1].after == 10.0


def test_each_step_that_followed_is_told_with_its_own_deadline() -> None:
    by = {ANA: receipt(0b11, 0.01, 0.01), BEN: receipt(0b10, 10.6, 10.6)}
    path = path_of(known(12, by, over={0: 10.5}), REACHING)
    assert steps_of(path) == [
        ("waiters", "unheard", 10.5), ("floor", "running", None), ("admins", "not_begun", None)
    ]  # fmt: skip
    assert [step.deadline for step in path.steps] == [10.0, 15.5, None]
    assert [(step.sent, step.written) for step in path.steps] == [(1, 1), (2, 2), (0, 0)]
    assert path.summary[2] == "waiters: nobody had confirmed within 10 s."
    assert path.summary[3].startswith("floor: nobody has confirmed yet; in 3.50 s EVENT_UNHEARD")
    assert (10.5, f"nobody in waiters had confirmed: {TO_FLOOR}") in timeline(path)


def test_confirmation_that_comes_after_a_step_ends_the_next_one() -> None:
    by = {ANA: receipt(0b11, 0.01, 0.01, 12.0)}
    path = path_of(known(60, by, confirmed={0: 12.0, 1: 12.0}, over={0: 10.5}), REACHING)
    assert steps_of(path)[:2] == [("waiters", "unheard", 10.5), ("floor", "confirmed", 12.0)]
    assert path.summary[-1] == "floor: confirmed after 12.0 s, 3.50 s before the deadline."


@pytest.mark.parametrize(
    ("by", "confirmed", "words"),
    [
        ({}, {}, "Nobody has confirmed, and no step is left."),
        (
            {ANA: receipt(0b11, 0.01, 0.01, 50.0)},
            {0: 50.0},
            "Somebody confirmed after 50.0 s, but no step was left.",
        ),
    ],
)
def test_last_step_leaves_none(
    by: dict[Recipient, Receipt], confirmed: dict[int, float], words: str
) -> None:
    over = {0: 10.5, 1: 16.0, 2: 36.5}
    path = path_of(known(99, by, confirmed, over), REACHING)
    assert {step.state for step in path.steps} == {"unheard"}
    assert path.summary[-1] == words
    assert (
        36.5, "nobody in admins had confirmed: EVENT_UNHEARD tells the admins"
    ) in timeline(path)  # fmt: skip


def test_nobody_who_was_connected_is_told_as_such() -> None:
    path = path_of(known(99, {}, over={0: 10.5}), REACHING)
    assert path.summary == [
        "It was sent to nobody: no client of its audiences was connected.",
        "waiters: nobody was connected for 10 s.",
        (
            "floor: nobody has confirmed, and the time was over 83.5 s ago, but no step followed:"
            " does a gateway run, and can it read Redis and write to it?"
        ),
    ]


@pytest.mark.parametrize(
    ("after", "words"), [(10.3, "; now EVENT_UNHEARD"), (20, "does a gateway run")]
)
def test_step_that_is_due_and_has_not_followed_is_told(after: float, words: str) -> None:
    path = path_of(known(after, {ANA: receipt(0b11, 0.01, 0.01)}), REACHING)
    assert steps_of(path)[0] == ("waiters", "overdue", None)
    assert words in path.summary[-1]


def test_copy_of_an_earlier_event_which_nobody_is_sent_is_told_as_such() -> None:
    path = path_of(known(20), REACHING)
    assert "or it is a copy of an earlier event" in path.summary[0]
    assert "is it a copy of an earlier event" in path.summary[1]


@pytest.mark.parametrize(
    ("routes", "type_", "after", "words"),
    [
        (ROUTES, CALL, 5, "set receipt = true for this type in WS_ROUTES_FILE"),
        (ROUTES, "CART_SYNC", 5, "CART_SYNC is not a durable type"),
        (REACHING, CALL, TTL + 36, "Receipts are kept for 3600 s (WS_RECEIPT_TTL): those"),
    ],
)
def test_without_receipts_the_reason_and_the_audiences_are_told(
    routes: Any, type_: str, after: float, words: str
) -> None:
    path = path_of(known(after, type_=type_), routes)
    assert len(path.summary) == 1
    assert words in path.summary[0]
    assert (path.receipts, path.clients, path.steps) == (False, [], [])
    assert len(path.audiences) == (0 if type_ == "CART_SYNC" else 2)
    assert timeline(path) == [(0.0, "entered Redis")]


def test_settings_that_differ_from_the_gateways_are_told() -> None:
    path = path_of(known(5, {ANA: receipt(0b1, 0.01, 0.01)}), ROUTES)
    assert "is WS_ROUTES_FILE that of the gateways?" in path.summary[-1]
    assert path.clients[0].must_reach == []


def test_clients_of_other_branches_are_counted_and_not_named() -> None:
    by = {ANA: receipt(0, 0.01, 0.01), EVE: receipt(0, 0.01, 0.01)}
    by[EVE].branches = frozenset({BranchId(2)})
    path = path_of(known(5, by), TRACKED, may_name=lambda receipt: not receipt.branches)
    assert (path.sent, path.written) == (2, 2)
    assert path.summary[:2] == [
        "Sent to 2: written to 2, delivered to 0, seen by 0.",
        "1 of them are of other branches, and not named.",
    ]
    assert b"user 9" not in msgspec.json.encode(path)


def test_event_whose_entry_was_trimmed_is_told_by_its_receipts() -> None:
    found = replace(known(5, {ANA: receipt(0, 0.01, 0.01)}), event=None)
    path = path_of(found, TRACKED, ["gw-2"])
    assert (path.type, path.audiences) == (CALL, [])
    assert "not in the stream any more" in path.summary[0]
    assert (path.complete, path.missing) == (False, ["gw-2"])
    assert "gw-2" in path.summary[-1]


def test_clock_of_a_process_that_is_behind_puts_nothing_before_the_entry() -> None:
    path = path_of(known(5, {ANA: receipt(0, -2.0, -2.0, -1.9)}), TRACKED)
    assert {after for after, _ in timeline(path)} == {0.0}


def test_many_clients_make_few_moments_of_few_names() -> None:
    by = {
        Recipient("waiter", str(n)): receipt(0, 0.01 + n / 1e5, 0.01 + n / 1e5) for n in range(400)
    }
    path = path_of(known(5, by), TRACKED)
    assert len(path.timeline) == 2
    assert path.timeline[1].text.endswith(" and 390 others")
    assert len(path.clients) == 400


def test_reason_why_nothing_is_known_depends_on_the_id_alone() -> None:
    assert "no such entry" in why_unknown(Known(PLACE, AT + 5))
    assert "older than all" in why_unknown(Known(PLACE, AT + 5, is_trimmed=True))
    assert "of the future" in why_unknown(Known(PLACE, AT - 100_000))
    foreign = replace(known(5, {ANA: receipt(0, 0.01)}), is_trimmed=True)
    assert why_unknown(foreign) == why_unknown(Known(PLACE, AT + 5, is_trimmed=True))


@st.composite
def receipts_of_some(draw: st.DrawFn) -> Known:
    """What is known of an event that some clients have, and of some of its steps."""
    by = {}
    for number in draw(st.lists(st.integers(1, 6), max_size=4)):
        found = receipt(draw(st.integers(0, 7)))
        for state in draw(st.lists(st.sampled_from(State), min_size=1, max_size=4)):
            found.reach(state, AT + 1000 * draw(st.integers(-5, 60)))
        by[Recipient(draw(st.sampled_from(["waiter", "admin", "diner"])), str(number))] = found
    confirmed = draw(st.dictionaries(st.integers(0, 3), st.integers(0, 60), max_size=3))
    over = {n: float(10 * n + 11) for n in range(draw(st.integers(0, 4)))}
    return known(draw(st.integers(0, 99)), by, dict(confirmed), over)


@given(receipts_of_some(), st.sampled_from([REACHING, TRACKED, ROUTES]))
def test_path_is_consistent_whatever_is_known(found: Known, routes: Routing) -> None:
    path = path_of(found, routes)
    assert path.sent >= path.written >= path.delivered >= path.seen
    moments = [moment.after for moment in path.timeline]
    assert moments == sorted(moments)
    assert moments[0] == 0.0
    assert all(not each.lies_ahead or each.after > path.now for each in path.timeline)
    states = [step.state for step in path.steps]
    order = ["unheard", "confirmed", "running", "overdue", "not_begun"]
    assert states == sorted(states, key=order.index)
    assert sum(state not in ("unheard", "not_begun") for state in states) <= 1
    assert msgspec.json.decode(msgspec.json.encode(path), type=EventPath) == path
