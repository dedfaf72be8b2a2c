"""Duplicates: which events are copies of one another, and what remembering them costs."""

import json
import sys
import time
from itertools import accumulate, pairwise
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from trio_gateway.core import duplicates
from trio_gateway.core.duplicates import Duplicates
from trio_gateway.core.event_ids import Position, Stream
from trio_gateway.core.events import Event, parse_event
from trio_gateway.testing import make_event

STREAM, WAITERS, ADMIN = "events:critical", "channel:branch:1:waiters", "channel:branch:1:admin"


def are_new(*events: Event) -> list[bool]:
    """Which of the events are new."""
    seen = Duplicates()
    return [not seen.is_duplicate(event) for event in events]


def raw(text: str, channel: str, received_at: float = 0.0) -> Event:
    """An event whose other keys are JSON text."""
    whole = '{"type":"A","tenant_id":1,"branch_id":1,' + text + "}"
    return parse_event(whole.encode(), channel=channel, received_at=received_at)


def test_one_content_on_several_channels_is_one_event() -> None:
    copies = [make_event(channel=channel) for channel in (WAITERS, STREAM, ADMIN)]

    assert are_new(*copies) == [True, False, False]


def test_one_content_twice_on_one_channel_is_two_events() -> None:
    assert are_new(*[make_event(channel=WAITERS)] * 3) == [True, True, True]


def test_each_of_two_events_has_its_own_copies() -> None:
    copies = [make_event(channel=channel) for channel in (WAITERS, WAITERS, ADMIN, ADMIN, ADMIN)]

    assert are_new(*copies) == [True, True, False, False, True]


@pytest.mark.parametrize(("later", "new"), [(0, False), (4.9, False), (5.0, False), (5.01, True)])
def test_copies_are_recognised_within_5_seconds(later: float, new: bool) -> None:
    first = make_event(channel=WAITERS, received_at=1000.0)
    copy = make_event(channel=ADMIN, received_at=1000.0 + later)

    assert are_new(first, copy) == [True, new]


def test_copy_does_not_extend_the_5_seconds() -> None:
    times = {WAITERS: 0.0, ADMIN: 4.0, STREAM: 6.0}

    assert are_new(*(make_event(channel=c, received_at=t) for c, t in times.items())) == [
        True, False, True,
    ]  # fmt: skip


def test_copy_that_was_received_earlier_but_dispatched_later_is_a_copy() -> None:
    late, early = (
        make_event(channel=WAITERS, received_at=3.0),
        make_event(channel=ADMIN, received_at=1.0),
    )

    much_earlier = make_event(channel=STREAM, received_at=-2.5)
    assert are_new(late, early, much_earlier) == [True, False, True]


@pytest.mark.parametrize(
    "change", [{"type": "B"}, {"tenant_id": 2}, {"branch_id": 2}, {"data": 2}, {"more": 1}]
)
def test_another_content_is_another_event(change: dict[str, Any]) -> None:
    one = make_event("A", data=1, channel=WAITERS)
    keys: dict[str, Any] = {"type": "A", "data": 1} | change
    other = make_event(**keys, channel=ADMIN)

    assert are_new(one, other) == [True, True]


SAME = {
    "a number": ('"ts":1', '"ts":2'),
    "of other length": ('"ts":1,"a":1', '"ts":12345.5,"a":1'),
    "a string": ('"ts":"2026-05-20T12:00:00"', '"ts":"2026-05-20T12:00:01.5"'),
    "a string with quotes": (r'"ts":"a\"b"', r'"ts":"\\\"c"'),
    "an object": ('"ts":{"at":[1]},"a":"}"', '"ts":{},"a":"}"'),
    "spaced": ('"ts" : 1 ,"a":1', '"ts" : 2 ,"a":1'),
    "first": ('"ts":1,"data":{"ts":9}', '"ts":2,"data":{"ts":9}'),
    "last": ('"data":{"ts":9},"ts":1', '"data":{"ts":9},"ts":2'),
    "like the nested": ('"data":{"ts":1},"ts":1', '"data":{"ts":1},"ts":2'),
    "in a list": ('"data":[{"ts":1}],"ts":1', '"data":[{"ts":1}],"ts":2'),
    "beside a value": ('"a":"ts","ts":1', '"a":"ts","ts":2'),
    "beside quotes": (r'"a":"\"ts\" {[","ts":1', r'"a":"\"ts\" {[","ts":2'),
    "behind an escaped quote": (r'"a":"\"{","ts":1,"b":"ts"', r'"a":"\"{","ts":2,"b":"ts"'),
    "null": ('"ts":null', '"ts":1'),
    "half an emoji elsewhere": (r'"a":"\ud83d","ts":1', r'"a":"\ud83d","ts":2'),
}
OTHER = {
    "nested": ('"ts":1,"data":{"ts":8}', '"ts":1,"data":{"ts":9}'),
    "nested only": ('"data":{"ts":8}', '"data":{"ts":9}'),
    "in a list": ('"data":[{"ts":8}],"ts":1', '"data":[{"ts":9}],"ts":1'),
    "a value": ('"a":"ts","b":1', '"a":"ts","b":2'),
    "another key": ('"ts":1,"TS":1', '"ts":1,"TS":2'),
    "one without": ('"ts":1', '"a":1'),
    "a key like it": ('"ts":1,"ts2":1', '"ts":1,"ts2":2'),
    "written with an escape, after a value": (
        r'"a":"ts","b":15,"\u0074s":5', r'"a":"ts","b":25,"\u0074s":5',
    ),
    "written with an escape, after a nested one": (
        r'"a":{"ts":8},"\u0074s":1', r'"a":{"ts":9},"\u0074s":1',
    ),
    "with another key beside a value": ('"a":"ts","b":8,"ts":8', '"a":"ts","b":9,"ts":9'),
}  # fmt: skip


@pytest.mark.parametrize("case", SAME)
def test_copies_differ_in_ts_alone(case: str) -> None:
    one, other = SAME[case]

    assert are_new(raw(one, WAITERS), raw(other, ADMIN)) == [True, False]


@pytest.mark.parametrize("case", OTHER)
def test_event_that_differs_in_more_than_ts_is_another_event(case: str) -> None:
    one, other = OTHER[case]

    assert are_new(raw(one, WAITERS), raw(other, ADMIN)) == [True, True]


@pytest.mark.parametrize("text", ['"ts":1,"ts":2', r'"\u0074s":1', '"ts":1,"a":{"ts":1},"ts":1'])
def test_equal_bytes_are_copies_however_ts_is_written(text: str) -> None:
    assert are_new(raw(text, WAITERS), raw(text, ADMIN)) == [True, False]


# --- the backend's own key ---


@pytest.mark.parametrize("start", [0.0, 10.0, 1e6])
@pytest.mark.parametrize(
    ("later", "new"), [(0, False), (299, False), (300, False), (300.5, True), (1000, True)]
)
def test_an_id_is_known_for_5_minutes(start: float, later: float, new: bool) -> None:
    first = make_event(id="x", received_at=start)

    assert are_new(first, make_event(id="x", received_at=start + later)) == [True, new]


@pytest.mark.parametrize("channel", [WAITERS, ADMIN, STREAM])
@pytest.mark.parametrize("data", [1, 2])
def test_id_is_known_whatever_its_source(channel: str, data: int) -> None:
    first = make_event(id="x", channel=WAITERS, data=1)

    assert are_new(first, make_event(id="x", channel=channel, data=data)) == [True, False]


def test_an_id_is_known_per_tenant() -> None:
    assert are_new(make_event(id="x"), make_event(id="x", tenant_id=2)) == [True, True]


def test_one_content_with_two_ids_is_two_events() -> None:
    one, other = make_event(id="x", channel=WAITERS), make_event(id="y", channel=ADMIN)

    assert are_new(one, other) == [True, True]


def test_id_received_again_after_5_minutes_is_known_for_5_more() -> None:
    times = [0.0, 200.0, 400.0, 650.0, 700.5]

    assert are_new(*(make_event(id="x", received_at=t) for t in times)) == [
        True, False, True, False, True,
    ]  # fmt: skip


@pytest.mark.parametrize(("one", "other"), [(1, 2**61), (7, 7 + 2**61 - 1), (2**62, 4)])
def test_tenants_with_equal_hashes_do_not_share_ids(one: int, other: int) -> None:
    events = [make_event(id="x", tenant_id=tenant) for tenant in (one, other, one, other)]

    assert are_new(*events) == [True, True, False, False]


def test_different_long_ids_are_different() -> None:
    ids = ["x" * 5000 + end for end in "abab"]

    assert are_new(*(make_event(id=each) for each in ids)) == [True, True, False, False]


# --- one content again and again ---


def _cost(events: list[Event]) -> float:
    seen = Duplicates()
    began = time.thread_time()
    for event in events:
        seen.is_duplicate(event)
    return time.thread_time() - began


@pytest.mark.parametrize("way", ["on one channel", "on many channels", "on two in turn"])
def test_event_costs_no_more_when_its_content_was_received_often(way: str) -> None:
    def events(number: int) -> list[Event]:
        channels = {"on one channel": 1, "on many channels": number, "on two in turn": 2}[way]
        return [make_event(channel=str(i % channels), received_at=i / 5000) for i in range(number)]

    few, many = events(500), events(8000)
    assert min(_cost(many) for _ in range(3)) < 4 * 16 * min(_cost(few) for _ in range(5))


def test_repetitions_on_one_channel_are_joined_one_by_one_by_another() -> None:
    seen = Duplicates()
    first = [seen.find_or_add(make_event(channel=WAITERS), mark) for mark in range(3)]
    copies = [seen.find_or_add(make_event(channel=ADMIN), 9) for _ in range(4)]

    assert first == [None, None, None]
    assert [copy and copy.mark for copy in copies] == [0, 1, 2, None]


@pytest.mark.parametrize("keys", [{}, {"id": "x"}, {"data": {"ts": 1}, "ts": 2}])
def test_a_durable_copy_is_stored_once_whichever_copy_came_first(keys: dict[str, Any]) -> None:
    def entry(name: str) -> Event:
        at = Position((1, 0))
        return make_event(channel=name, stream=Stream("aaaa"), position=at, **keys)

    seen = Duplicates()
    assert seen.find_or_add(make_event(channel=ADMIN, **keys), 7) is None
    assert seen.find_or_add(make_event(channel=WAITERS, **keys)) == (7, False)
    assert seen.find_or_add(entry("s")) == (7, False)
    assert seen.find_or_add(entry("another stream")) == (7, True)

    seen = Duplicates()
    assert seen.find_or_add(entry("s"), 7) is None
    assert seen.find_or_add(entry("another stream")) == (7, True)
    assert seen.find_or_add(make_event(channel=ADMIN, **keys)) == (7, True)


# --- memory ---


def test_entries_outside_of_their_window_are_forgotten() -> None:
    seen = Duplicates()
    for i in range(100):
        seen.is_duplicate(make_event(data=i, received_at=i / 100))
        seen.is_duplicate(make_event(data=i % 5, channel=ADMIN, received_at=i / 100))
        seen.is_duplicate(make_event(id=str(i), received_at=i / 100))
    assert len(seen) == 200

    seen.is_duplicate(make_event(received_at=6.0))
    assert len(seen) == 101  # the ids, and this one

    seen.is_duplicate(make_event(received_at=301.5))
    assert len(seen) == 1

    seen.is_duplicate(make_event(id="last", received_at=400))
    assert len(seen) == 1


def test_forgetting_costs_no_more_when_much_is_remembered() -> None:
    def cost(remembered: int) -> float:
        """Of a few events, each of which makes an older one be forgotten; the fastest of many."""
        seen, apart, best = Duplicates(), 300 / remembered, float("inf")
        for n in range(0, remembered * 2, 200):
            events = [make_event(id=str(n + i), received_at=(n + i) * apart) for i in range(200)]
            began = time.thread_time()
            for event in events:
                seen.is_duplicate(event)
            if n > remembered * 1.5:
                best = min(best, time.thread_time() - began)
        return best

    assert cost(20_000) < 4 * cost(1000)


def test_memory_is_bounded_and_the_oldest_go_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "MOST_REMEMBERED", 10)
    seen = Duplicates()
    for i in range(50):
        assert not seen.is_duplicate(make_event(data=i))
        assert not seen.is_duplicate(make_event(id=str(i)))
        assert len(seen) <= 2 * (10 + 1)

    assert seen.is_duplicate(make_event(data=49, channel=ADMIN))
    assert seen.is_duplicate(make_event(id="49"))
    assert not seen.is_duplicate(make_event(data=0, channel=ADMIN))
    assert not seen.is_duplicate(make_event(id="0"))


def test_what_is_dropped_is_freed_soon_and_little_by_little() -> None:
    seen = Duplicates()
    events = [make_event(data=n, branch_id=1 + n % 100) for n in range(2000)]
    payloads = [event.payload for event in events]
    seen.find_or_add_all(events, 0, [event.payload for event in events])
    del events

    def references() -> int:
        return sum(sys.getrefcount(payload) for payload in payloads)

    all_held = references()
    left = [2000]
    for n in range(12):
        assert not seen.is_duplicate(make_event(received_at=12.0 + n))
        left.append(2000 - (all_held - references()))
    assert left[-1] == 0
    assert max(before - after for before, after in pairwise(left)) < 400


def test_payloads_that_are_not_compared_yet_are_bounded_and_the_oldest_go_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    events = [make_event(data=i) for i in range(50)]
    monkeypatch.setattr(duplicates, "MOST_WAITING_BYTES", 10 * len(events[-1].payload))
    seen = Duplicates()
    for event in events:
        assert not seen.is_duplicate(event)
        assert len(seen) <= 11

    assert seen.is_duplicate(make_event(data=49, channel=ADMIN))
    assert not seen.is_duplicate(make_event(data=0, channel=ADMIN))


@pytest.mark.parametrize(
    "end",
    [
        "",
        '"ts":1}',
        '"event_id":"a"} \n',
        '"x":"\\",\\"event_id\\":\\"b"}\n',
        f'"x":"{"x" * 300}"}}',
    ],
)
@pytest.mark.parametrize("size", [0, 200, 65_000])
def test_event_of_which_the_frame_is_held_has_its_copies(end: str, size: int) -> None:
    text = f' {{"type":"ROUND_READY","tenant_id":1,"branch_id":1,"y":"{"y" * size}"'
    payload = f"{text},{end}" if end else f"{text} }}"
    durable, copy = (
        parse_event(
            payload.encode(), channel=channel, received_at=0.0, stream=Stream(STREAM),
            position=Position((1, 1)), durable_types=["ROUND_READY"],
        )
        for channel in (STREAM, WAITERS)
    )  # fmt: skip
    seen = Duplicates()

    assert seen.find_or_add(durable, held=durable.frame) is None
    assert seen.find_or_add(copy) is not None


def test_memory_for_the_channels_of_one_content_is_bounded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(duplicates, "MOST_REMEMBERED", 50)
    seen = Duplicates()
    for i in range(500):
        seen.is_duplicate(make_event(channel=str(i)))
        assert len(seen) + seen._extra <= 52
    for i in range(500):
        seen.is_duplicate(make_event(channel=str(i % 2)))
        assert len(seen) + seen._extra <= 52


def test_content_that_is_always_repeated_does_not_collect_channels() -> None:
    seen = Duplicates()
    for i in range(2000):  # the channels of a session each
        seen.is_duplicate(make_event(channel=str(i), received_at=i / 10))
        assert len(seen) + seen._extra < 200


# --- against a model that remembers every event ---


class Model:
    def __init__(self) -> None:
        self.ids: list[tuple[float, int, str]] = []
        self.contents: list[tuple[float, str, set[str]]] = []

    def is_duplicate(self, event: Event) -> bool:
        now = event.received_at
        if event.id is not None:
            if any((event.tenant, event.id) == (t, i) and now - at <= 300 for at, t, i in self.ids):
                return True
            self.ids.append((now, event.tenant, event.id))
            return False
        whole = json.loads(event.payload)
        # An event with a ``ts`` is never a copy of one without.
        content = json.dumps({key: key == "ts" or value for key, value in whole.items()})
        for at, known, channels in self.contents:
            if known == content and abs(now - at) <= 5 and event.channel not in channels:
                channels.add(event.channel)
                return True
        self.contents.append((now, content, {event.channel}))
        return False


channels = st.sampled_from([STREAM, WAITERS, ADMIN])
gaps = st.sampled_from([0.0, 0.0, 0.5, 1.0, 2.5, 5.0, 5.5, 60.0, 150.0, 300.0, 300.5])
few = st.sampled_from([1, 2, "ts"])
bodies = st.fixed_dictionaries(
    {"tenant_id": st.integers(1, 2)},
    optional={
        "ts": few,
        "id": st.sampled_from("xy"),
        "data": few | st.fixed_dictionaries({"ts": few}) | st.lists(few, max_size=1),
    },
)


@given(st.lists(st.tuples(gaps, channels, bodies), max_size=40), st.sampled_from([0.0, 1e6]))
def test_result_agrees_with_a_model_that_never_forgets(
    steps: list[tuple[float, str, dict[str, object]]], start: float
) -> None:
    seen, model = Duplicates(), Model()
    times = list(accumulate((gap for gap, _, _ in steps), initial=start))[1:]
    for now, (_, channel, body) in zip(times, steps, strict=True):
        whole = {"type": "A", "branch_id": 1} | body
        event = parse_event(json.dumps(whole).encode(), channel=channel, received_at=now)
        assert seen.is_duplicate(event) == model.is_duplicate(event)


@given(
    st.lists(st.tuples(gaps, channels, st.integers(1, 2)), max_size=60),
    st.fixed_dictionaries({c: st.sampled_from([0.0, 2.0, 6.0, 20.0]) for c in (STREAM, WAITERS)}),
)
def test_source_that_lags_behind_another_does_not_change_the_result(
    steps: list[tuple[float, str, int]], lags: dict[str, float]
) -> None:
    seen, model, now = Duplicates(), Model(), 0.0
    for gap, channel, data in steps:
        now += gap
        seen.oldest_pending = now - 20
        event = make_event(data=data, channel=channel, received_at=now - lags.get(channel, 0.0))
        assert seen.is_duplicate(event) == model.is_duplicate(event)


class Comparing(Duplicates):
    """Compares each event with all others at once."""

    def _open_lane(self, branch: tuple[int, int], channel: str) -> Any:
        lane = super()._open_lane(branch, channel)
        lane.several = lane.compares = True
        return lane


@given(
    st.lists(
        st.tuples(
            st.sampled_from([0.0, 0.0, 0.5, 2.5, 5.0, 6.0]),
            st.sampled_from([STREAM] * 5 + [WAITERS] * 2 + [ADMIN]),
            st.integers(1, 2),
            st.integers(1, 3),
        ),
        max_size=60,
    ),
    st.sampled_from([0.0, 2.0, 6.0]),
)
@example([(0.0, STREAM, 1, 1), (2.5, STREAM, 1, 1), (2.5, WAITERS, 1, 1), (0.0, WAITERS, 1, 1)], 0)
@example([(n, c, 1, 1) for n, c in [(0.0, STREAM), (6.0, STREAM), (5.0, STREAM), (2.5, ADMIN)]], 0)
def test_what_is_known_of_an_event_does_not_depend_on_when_it_is_compared(
    steps: list[tuple[float, str, int, int]], lag: float
) -> None:
    seen, comparing, now = Duplicates(), Comparing(), 0.0
    for number, (gap, channel, branch, data) in enumerate(steps):
        now += gap
        seen.oldest_pending = comparing.oldest_pending = now - lag
        event = make_event(
            data=data, branch_id=branch, channel=channel,
            received_at=now - lag * (channel == STREAM),
            stream=Stream("aaaa") if channel == STREAM else None,
            position=Position((number, 0)) if channel == STREAM else None,
        )  # fmt: skip
        assert seen.find_or_add(event, number) == comparing.find_or_add(event, number)


values = st.recursive(
    st.sampled_from([None, 1, 15, "ts", '"ts"', '"ts":1', "\\", "}", "ñ", "😀"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["ts", "a", '"ts"', "\\", "{"]), inner, max_size=3)
    ),
    max_leaves=6,
)


@given(st.dictionaries(st.sampled_from(["a", "ts", "z", "\\ts"]), values), values, st.booleans())
@example({"a": {"ts": 1}, "ts": 1}, 15, False)
def test_ts_is_ignored_wherever_it_is(keys: dict[str, object], ts: object, spaced: bool) -> None:
    separators = (" , ", "\t: ") if spaced else (",", ":")

    def event(channel: str, ts: object) -> Event:
        whole = {"type": "A", "tenant_id": 1, "branch_id": 1} | keys | {"ts": ts}
        payload = json.dumps(whole, separators=separators).encode()
        return parse_event(payload, channel=channel, received_at=0.0)

    assert are_new(event(WAITERS, 0), event(ADMIN, ts)) == [True, False]
