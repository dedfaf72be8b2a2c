"""The delivery times that a process counts: windows, places of tenants, and what is counted."""

import math
from collections.abc import Sequence
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from trio_gateway.core.delivery_times import DeliveryTimes, Owed, TenantFigures
from trio_gateway.core.event_ids import Position, tag
from trio_gateway.core.events import Event
from trio_gateway.core.receipts import Place, TrackedEvent
from trio_gateway.core.time_counts import summary
from trio_gateway.testing import make_event

STREAM, OTHER = tag("events:critical"), tag("events:other")
AHEAD = 1_000_000_000.0  # of Redis' clock
HOUR = 3600


def times_of(most: int = 1000) -> DeliveryTimes:
    times = DeliveryTimes(1.0, most=most)
    times.set_clock([STREAM], AHEAD)
    return times


def event_at(at: float, *, tenant: int = 1, **keys: Any) -> Event:
    """An event that entered Redis at this time of ours."""
    ms = round((at + AHEAD) * 1000)
    keys = {"stream": STREAM, "position": Position((ms, 0))} | keys
    return make_event(tenant_id=tenant, **keys)


def write(times: DeliveryTimes, now: float, seconds: float = 0.01, *, tenant: int = 1) -> None:
    """Count an event that was written ``now``, so many seconds after it had entered Redis."""
    write_all(times, now, [event_at(now - seconds, tenant=tenant)])


def write_all(times: DeliveryTimes, now: float, events: Sequence[Event], mask: int = -1) -> None:
    mask &= (1 << len(events)) - 1
    times.written([(each, None, None) for each in events], mask, now)


def written(figures: TenantFigures) -> tuple[int, int]:
    return figures.last_5_minutes.written.count, figures.last_hour.written.count


# Windows


@given(st.lists(st.integers(0, 2 * HOUR), min_size=1), st.integers(0, HOUR))
def test_windows_hold_the_last_minutes_and_forget_what_is_before(
    moments: list[int], later: int
) -> None:
    times = times_of()
    for now in sorted(moments):
        write(times, now)
    now = max(moments) + later
    five, hour = written(times.figures(1, now))

    def since(seconds: float) -> int:
        return sum(each > now - seconds for each in moments)

    assert since(300) <= five <= since(360)
    assert since(HOUR) <= hour <= since(65 * 60)


def test_memory_of_a_tenant_is_bounded() -> None:
    times = times_of()
    for now in range(0, 5 * HOUR, 20):
        write(times, now)
    of = times._tenants[1]
    assert len(of._single._by_number) <= 7
    assert len(of._blocks._by_number) <= 14


def test_a_clock_that_goes_back_keeps_what_was_counted() -> None:
    times = times_of()
    write(times, 120.0)
    write(times, 119.9)
    assert written(times.figures(1, 119.9)) == (2, 2)
    write(times, 0)  # minutes: what was counted later is from the future, and is forgotten
    assert written(times.figures(1, 0))[0] == 1


# What is counted


def test_times_are_by_the_clock_of_redis_and_never_negative() -> None:
    times = times_of()
    times.set_clock([OTHER], AHEAD - 500)
    write_all(
        times,
        100.0,
        [event_at(98.0), event_at(99.8 - 500, stream=OTHER), event_at(100.5)],
    )
    found = summary(times.figures(1, 100.0).last_hour).written
    assert (found.count, found.over) == (3, 1)
    assert found.p50 is not None
    assert 0.2 <= found.p50 <= 0.24
    assert found.p99 is not None
    assert 2.0 <= found.p99 <= 2.4


def test_an_event_that_is_written_to_nobody_or_is_from_pubsub_is_not_counted() -> None:
    times = times_of()
    pubsub = make_event(tenant_id=1)
    write_all(times, 100.0, [event_at(99), event_at(99), pubsub, event_at(99)], mask=0b1101)
    assert written(times.figures(1, 100.0)) == (2, 2)


def test_a_late_event_is_over_the_limit() -> None:
    times = times_of()
    for seconds in (0.999, 1.0, 1.001, 600.0):
        write(times, 1000.0, seconds)
    found = summary(times.figures(1, 1000.0).last_5_minutes).written
    assert (found.count, found.over) == (4, 2)
    assert found.p99 is not None
    assert math.isclose(found.p99, 262.144)


def tracked(at: float) -> tuple[Place, TrackedEvent]:
    ms = round((at + AHEAD) * 1000)
    return Place(STREAM, Position((ms, 0))), TrackedEvent("CHECK_PAID", 1, 1, ms)


def test_an_event_is_over_the_limit_once_however_many_of_its_clients_are_late() -> None:
    times = times_of()
    for at, seconds in ((100.0, 2), (100.0, 3), (100.0, 70), (200.0, 0.5), (200.0, 5)):
        times.sent(*tracked(at), at)
        times.confirmed(*tracked(at), at + seconds)
    delivered = summary(times.figures(1, 210.0).last_5_minutes).delivered
    assert (delivered.count, delivered.over) == (5, 2)


def test_clients_are_unconfirmed_until_they_confirm() -> None:
    times, event = times_of(), tracked(100.0)
    for _ in range(3):
        times.sent(*event, 100.1)
    times.confirmed(*event, 100.2)
    times.confirmed(*event, 590.0)  # in another minute, and another part
    figures = times.figures(1, 590.0)
    assert figures.last_5_minutes.unconfirmed == 0  # of those that entered Redis since then
    assert figures.last_hour.unconfirmed == 1
    recent, hour = summary(figures.last_5_minutes).delivered, summary(figures.last_hour).delivered
    assert (recent.count, recent.over) == (1, 1)
    assert (hour.count, hour.over) == (2, 1)


@given(st.lists(st.tuples(st.integers(0, 3 * HOUR), st.integers(0, 3 * HOUR)), min_size=1))
def test_who_has_confirmed_is_never_unconfirmed(spans: list[tuple[int, int]]) -> None:
    times = times_of()
    steps = [(at, True, at) for at, _ in spans] + [(at + d, False, at) for at, d in spans]
    for now, is_sent, at in sorted(steps, key=lambda each: (each[0], not each[1])):
        (times.sent if is_sent else times.confirmed)(*tracked(at), now)
    figures = times.figures(1, max(now for now, _, _ in steps))
    assert (figures.last_5_minutes.unconfirmed, figures.last_hour.unconfirmed) == (0, 0)


# Clients that are behind


def place_at(at: float) -> Place:
    return Place(STREAM, Position((round((at + AHEAD) * 1000), 0)))


def behind(times: DeliveryTimes, *moments: float) -> Owed:
    """Count events that entered Redis at these moments, and that one client has yet to take."""
    now = max(moments) + 0.01
    events = [event_at(at) for at in moments]
    times.written([(each, None, None) for each in events], -1, now, is_behind=True)
    return Owed(times, 1, [place_at(at) for at in moments])


def test_an_event_counts_with_the_time_of_its_last_write() -> None:
    times = times_of()
    owed = behind(times, 100.0, 100.5)
    for now in (100.6, 101.1, 230.0, 229.0):
        owed.written(now)
    figures = times.figures(1, 230.0)
    assert written(figures) == (2, 2)
    found = summary(figures.last_5_minutes).written
    assert found.over == 2
    assert found.p50 == found.p99
    assert found.p50 is not None
    assert 129 <= found.p50 <= 155
    assert written(times.figures(1, 100.0 + 360)) == (2, 2)  # by the minute of that write
    assert written(times.figures(1, 230.0 + 360)) == (0, 2)


@given(st.lists(st.integers(1, 3000), min_size=1))
def test_a_client_that_takes_an_event_too_late_is_noticed_to_the_millisecond(
    delays: list[int],
) -> None:
    times = times_of()
    owed = behind(times, 100.0)
    for ms in sorted(delays):
        owed.written(round(100 + ms / 1000, 3) + 0.0005)  # within that millisecond
    found = times.figures(1, 104.0).last_5_minutes.written
    assert (found.count, found.over) == (1, max(delays) > 1000)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2000), st.booleans())))
def test_an_event_is_counted_once_whichever_clients_take_it_when(
    takes: list[tuple[int, int, bool]],
) -> None:
    times, now = times_of(), 200.0
    moments = (150.0, 150.1, 170.0, 199.9)
    shared = behind(times, *moments)
    for number, pause, is_alone in takes:
        now += pause / 10
        taken = Owed(times, 1, [place_at(moments[number])]) if is_alone else shared
        taken.written(now)
        assert times.figures(1, now).last_hour.written.count == 4 or now > HOUR


def test_an_event_that_is_not_remembered_is_counted_anew() -> None:
    """As if it had been written to nobody yet."""
    times = times_of()
    Owed(times, 1, [place_at(100.0)]).written(103.0)
    assert written(times.figures(1, 103.0)) == (1, 1)


def test_a_tenant_that_joined_the_others_has_no_negative_count() -> None:
    times = times_of(most=1)
    owed = behind(times, 100.0)
    write(times, 200.0, tenant=2, seconds=2)
    assert sorted(times.tenants) == [2]
    owed.written(200.0)
    for tenant in (1, 2, None):
        counts = times.figures(tenant, 200.0).last_hour.written.counts
        assert all(count > 0 for count in counts.values())


# Places


def test_the_others_are_counted_together_and_no_event_is_lost() -> None:
    times = times_of(most=3)
    for tenant in range(1, 11):
        for _ in range(tenant):
            write(times, 100.0, tenant=tenant)
    assert sorted(times.tenants) == [1, 2, 3]
    assert [written(times.figures(each, 100.0)) for each in (1, 2, 3)] == [(1, 1), (2, 2), (3, 3)]
    assert written(times.figures(None, 100.0)) == (49, 49)
    assert times.figures(4, 100.0).is_empty


def test_a_flood_of_others_takes_no_place_from_a_tenant() -> None:
    times = times_of(most=3)
    for tenant in (1, 2, 3):
        write(times, 100.0, tenant=tenant)
    for tenant in range(4, 1000):
        write(times, 160.0, tenant=tenant)
    assert sorted(times.tenants) == [1, 2, 3]


def test_a_slow_tenant_takes_the_place_of_the_quietest_punctual_one() -> None:
    times = times_of(most=3)
    write(times, 0, tenant=1, seconds=2)
    write(times, 60, tenant=2)
    write(times, 120, tenant=3)
    write(times, 180, tenant=4)
    assert sorted(times.tenants) == [1, 2, 3]
    write(times, 190, tenant=4, seconds=2)
    assert sorted(times.tenants) == [1, 3, 4]
    assert written(times.figures(None, 190)) == (2, 2)  # with the figures of tenant 2
    for tenant in range(5, 100):
        write(times, 240, tenant=tenant, seconds=2)
    assert sorted(times.tenants) == [1, 4, 5]  # each has been late in the last hour


def test_a_tenant_gives_its_place_up_when_it_was_quiet_for_an_hour() -> None:
    times = times_of(most=2)
    write(times, 0, tenant=1)
    write(times, HOUR, tenant=2)
    write(times, HOUR, tenant=3)
    assert sorted(times.tenants) == [1, 2]
    write(times, 66 * 60, tenant=3)
    assert sorted(times.tenants) == [2, 3]


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(0, 40), st.booleans())))
def test_no_event_is_lost_whoever_takes_whose_place(
    events: list[tuple[int, int, bool]],
) -> None:
    times, now = times_of(most=2), 0
    for tenant, pause, is_late in events:
        now += pause
        write(times, now, 2.0 if is_late else 0.01, tenant=tenant)
    total = times.figures(None, now)
    for tenant in times.tenants:
        total.merge(times.figures(tenant, now))
    assert len(times.tenants) <= 2
    assert written(total)[1] == len(events)
