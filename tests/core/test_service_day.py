"""The service day: its cut-off, its zones, the hours that clocks skip and repeat, the shifts."""

import sys
import zoneinfo
from datetime import date, datetime, time, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from trio_gateway.core.audiences import BranchId, TenantId
from trio_gateway.core.service_day import (
    Period,
    ServiceDays,
    holds,
    read_windows,
    read_zone,
    read_zones,
)

HERE = (TenantId(1), BranchId(1))
BERLIN = ZoneInfo("Europe/Berlin")
ZONES = (
    "UTC", "Europe/Berlin", "America/New_York", "America/Argentina/Buenos_Aires",
    "Asia/Kolkata", "Pacific/Auckland", "Australia/Lord_Howe", "America/Havana", "Asia/Beirut",
)  # fmt: skip
SHIFTS = read_windows(("MORNING=06:00-14:00", "AFTERNOON=14:00-22:00", "NIGHT=22:00-06:00"))


def at(text: str, zone: ZoneInfo = BERLIN, fold: int = 0) -> float:
    return datetime.fromisoformat(text).replace(tzinfo=zone, fold=fold).timestamp()


def day(days: ServiceDays, unix_time: float) -> date:
    return days.period(*HERE, unix_time).day


def on(days: ServiceDays, unix_time: float) -> set[str]:
    period = days.period(*HERE, unix_time)
    return {shift for shift in days.windows if holds(shift, period)}


# The cut-off


@pytest.mark.parametrize(
    ("local", "expected"),
    [
        ("2026-03-10 05:00:00", "2026-03-10"),
        ("2026-03-10 23:59:59", "2026-03-10"),
        ("2026-03-11 00:00:00", "2026-03-10"),  # a dinner past midnight
        ("2026-03-11 04:59:59.999", "2026-03-10"),
        ("2026-03-11 05:00:00", "2026-03-11"),
        ("2027-01-01 04:00:00", "2026-12-31"),
        ("2028-03-01 04:00:00", "2028-02-29"),
    ],
)
def test_day_begins_at_five_by_default(local: str, expected: str) -> None:
    assert day(ServiceDays(zone=BERLIN), at(local)) == date.fromisoformat(expected)


def test_with_a_cut_off_at_midnight_the_day_is_the_calendar_day() -> None:
    days = ServiceDays(zone=BERLIN, cut_off=time(0))

    assert day(days, at("2026-03-10 23:59:59")) == date(2026, 3, 10)
    assert day(days, at("2026-03-11 00:00:00")) == date(2026, 3, 11)


# Zones


def test_every_branch_has_the_day_of_its_own_zone() -> None:
    days = ServiceDays(zones=read_zones(("1:2=America/New_York", "2:1=Asia/Kolkata")))
    moment = at("2026-03-10 03:00", ZoneInfo("UTC"))

    def found(tenant: int, branch: int) -> date:
        return days.period(TenantId(tenant), BranchId(branch), moment).day

    assert found(1, 1) == date(2026, 3, 9)  # 03:00 in UTC, the default
    assert found(1, 2) == date(2026, 3, 9)  # 23:00 the evening before
    assert found(2, 1) == date(2026, 3, 10)  # 08:30
    assert found(2, 2) == date(2026, 3, 9)  # another tenant's branch of the same number


# Hours that clocks skip and repeat


def test_day_begins_at_the_local_hour_before_and_after_a_clock_change() -> None:
    days = ServiceDays(zone=BERLIN)
    for sunday in ("2026-03-29", "2026-10-25"):
        before = date.fromisoformat(sunday) - timedelta(days=1)
        assert day(days, at(f"{sunday} 04:59:59")) == before
        assert day(days, at(f"{sunday} 05:00")) == date.fromisoformat(sunday)


def test_cut_off_in_a_skipped_hour_takes_effect_at_the_skip() -> None:
    days = ServiceDays(zone=BERLIN, cut_off=time(2, 30))
    skipped = at("2026-03-29 03:00")

    assert day(days, skipped - 1) == date(2026, 3, 28)
    assert day(days, skipped) == date(2026, 3, 29)


def test_cut_off_in_a_repeated_hour_does_not_bring_the_old_day_back() -> None:
    days = ServiceDays(zone=BERLIN, cut_off=time(2, 30))

    assert day(days, at("2026-10-25 02:29:59")) == date(2026, 10, 24)
    assert day(days, at("2026-10-25 02:30")) == date(2026, 10, 25)
    assert day(days, at("2026-10-25 02:00", fold=1)) == date(2026, 10, 25)
    assert day(days, at("2026-10-25 02:30", fold=1)) == date(2026, 10, 25)


moments = st.floats(at("2020-01-01 00:00"), at("2035-01-01 00:00"))
times = st.times().map(lambda t: t.replace(microsecond=0))


@given(st.sampled_from(ZONES), times, moments, st.floats(0, 7200))
@example("Europe/Berlin", time(2, 30), at("2026-10-25 02:45"), 1800)
@example("Australia/Lord_Howe", time(1, 45), at("2026-04-04 14:50", ZoneInfo("UTC")), 900)
def test_day_never_goes_back(zone: str, cut_off: time, moment: float, later: float) -> None:
    days = ServiceDays(zone=ZoneInfo(zone), cut_off=cut_off)

    assert day(days, moment) <= day(days, moment + later)


@given(st.sampled_from(ZONES), times, moments)
def test_day_is_that_of_the_calendar_or_the_one_before(
    zone: str, cut_off: time, moment: float
) -> None:
    local = datetime.fromtimestamp(moment, ZoneInfo(zone))
    found = day(ServiceDays(zone=ZoneInfo(zone), cut_off=cut_off), moment)

    assert local.date() - found in {timedelta(0), timedelta(days=1)}
    if local.time() >= cut_off:
        assert found == local.date()


# Shifts


def test_without_windows_every_shift_holds_all_day() -> None:
    period = ServiceDays().period(*HERE, 0.0)

    assert period == Period(date(1969, 12, 31))
    assert all(holds(shift, period) for shift in (None, "MORNING", "AFTERNOON", "NIGHT", "?"))


@pytest.mark.parametrize(
    ("local", "shift"),
    [
        ("2026-03-10 05:59:59", "NIGHT"),
        ("2026-03-10 06:00:00", "MORNING"),
        ("2026-03-10 13:59:59", "MORNING"),
        ("2026-03-10 14:00:00", "AFTERNOON"),
        ("2026-03-10 21:59:59", "AFTERNOON"),
        ("2026-03-10 22:00:00", "NIGHT"),
        ("2026-03-11 00:00:00", "NIGHT"),
    ],
)
def test_shift_holds_within_its_window_which_may_pass_midnight(local: str, shift: str) -> None:
    assert on(ServiceDays(zone=BERLIN, windows=SHIFTS), at(local)) == {shift}


def test_assignment_without_a_shift_holds_all_day() -> None:
    days = ServiceDays(zone=BERLIN, windows=SHIFTS)

    assert all(
        holds(None, days.period(*HERE, at(f"2026-03-10 {hour:02}:00"))) for hour in range(24)
    )


def test_shift_without_a_window_of_its_own_holds_all_day() -> None:
    days = ServiceDays(zone=BERLIN, windows=read_windows(("MORNING=06:00-14:00",)))
    evening = days.period(*HERE, at("2026-03-10 20:00"))

    assert holds("NIGHT", evening)
    assert not holds("MORNING", evening)


def test_windows_may_overlap() -> None:
    windows = read_windows(("MORNING=06:00-15:00", "AFTERNOON=14:00-22:00"))

    assert on(ServiceDays(zone=BERLIN, windows=windows), at("2026-03-10 14:30")) == set(windows)


@given(st.sampled_from(ZONES), times, times, moments)
def test_a_window_and_the_rest_of_the_day_never_hold_together(
    zone: str, begin: time, end: time, moment: float
) -> None:
    if begin == end:
        return
    windows = {"NIGHT": (begin, end), "MORNING": (end, begin)}
    days = ServiceDays(zone=ZoneInfo(zone), windows=windows)

    assert len(on(days, moment)) == 1


# Readers


@pytest.mark.parametrize("text", ["", "Mars/Olympus", "../etc/passwd", "/etc/passwd", "Europe"])
def test_unknown_zone_is_named(text: str) -> None:
    with pytest.raises(ValueError, match=rf"^unknown time zone {text}$"):
        read_zone(text)


@pytest.mark.parametrize(
    "item",
    ["Europe/Berlin", "1=Europe/Berlin", "1:=UTC", "1:2:3=UTC", "a:b=UTC", "1:2=", "-1:2=UTC"],
)
def test_zone_without_a_branch_is_named(item: str) -> None:
    with pytest.raises(ValueError, match=f"^{item} is not tenant:branch=Zone$"):
        read_zones((item,))


def test_branch_with_an_unknown_zone_is_named() -> None:
    with pytest.raises(ValueError, match=r"^unknown time zone Mars/Olympus$"):
        read_zones(("1:1=UTC", "1:2=Mars/Olympus"))


@pytest.mark.parametrize(
    "item",
    [
        "MORNING", "MORNING=6-14", "MORNING=06:00", "MORNING=06:00-24:00", "MORNING=06:60-14:00",
        "morning=06:00-14:00", "MORNING=06:00-06:00", "=06:00-14:00", "MORNING=06:00-14:00Z",
    ],
)  # fmt: skip
def test_invalid_window_is_named(item: str) -> None:
    with pytest.raises(ValueError, match=f"^{item} is not SHIFT=HH:MM-HH:MM$"):
        read_windows((item,))


def test_windows_are_read() -> None:
    assert SHIFTS["NIGHT"] == (time(22), time(6))


def test_without_time_zone_data_utc_works_and_others_name_the_package(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for package in ("tzdata", "tzdata.zoneinfo.Europe"):
        monkeypatch.setitem(sys.modules, package, None)
    zoneinfo.reset_tzpath([])
    ZoneInfo.clear_cache()
    try:
        assert ServiceDays(read_zone("UTC")) == ServiceDays()
        assert ServiceDays().period(*HERE, 0.0).day == date(1969, 12, 31)
        with pytest.raises(ValueError, match=r"unknown time zone Europe/Berlin \(.*tzdata\)"):
            read_zone("Europe/Berlin")
    finally:
        zoneinfo.reset_tzpath()
