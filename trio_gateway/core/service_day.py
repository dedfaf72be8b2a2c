"""The service day: the day and the shifts whose assignments are in force at a branch."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time, timedelta, tzinfo
from typing import Final
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError, available_timezones

from .audiences import BranchId, TenantId

_WINDOW: Final = re.compile(r"([A-Z_]+)=(\d\d:\d\d)-(\d\d:\d\d)")
_ZONE: Final = re.compile(r"(\d+):(\d+)=(.+)")


@dataclass(frozen=True, slots=True)
class Period:
    """A service day and the shifts that are off at the moment."""

    day: date
    off: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class ServiceDays:
    """The service days of all branches.

    A branch's day begins at the cut-off in its time zone, so that a dinner past midnight belongs
    to the day before. ``windows`` are the shifts' hours; a shift without hours is on all day.
    """

    zone: tzinfo = UTC
    zones: Mapping[tuple[TenantId, BranchId], tzinfo] = field(default_factory=dict)
    cut_off: time = time(5)
    windows: Mapping[str, tuple[time, time]] = field(default_factory=dict)

    def period(self, tenant: TenantId, branch: BranchId, unix_time: float) -> Period:
        """Return the branch's period at a time in unix seconds."""
        zone = self.zones.get((tenant, branch), self.zone)
        local = datetime.fromtimestamp(unix_time, zone)
        day, now = local.date(), local.time()
        # Compare instants, too: the hour repeated in autumn must not bring the old day back.
        begins = datetime.combine(day, self.cut_off, zone).timestamp()
        if now < self.cut_off and unix_time < begins:
            day -= timedelta(days=1)
        off = (shift for shift, window in self.windows.items() if not _in(now, window))
        return Period(day, frozenset(off))


def _in(now: time, window: tuple[time, time]) -> bool:
    begin, end = window
    return begin <= now < end if begin < end else now >= begin or now < end


def holds(shift: str | None, period: Period) -> bool:
    """Whether an assignment for this shift (None: all day) is in force in this period."""
    return shift not in period.off


def read_zone(text: str) -> tzinfo:
    """Return a zone of the tz database. Raises :exc:`ValueError`. UTC needs no database."""
    if text == "UTC":
        return UTC
    try:
        return ZoneInfo(text)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        hint = "" if available_timezones() else " (no time zone data here: pip install tzdata)"
        raise ValueError(f"unknown time zone {text}{hint}") from None


def read_zones(items: tuple[str, ...]) -> Mapping[tuple[TenantId, BranchId], tzinfo]:
    """Read items of the form ``tenant:branch=Zone``. Raises :exc:`ValueError`."""
    found = {}
    for item in items:
        if (match := _ZONE.fullmatch(item)) is None:
            raise ValueError(f"{item} is not tenant:branch=Zone")
        found[TenantId(int(match[1])), BranchId(int(match[2]))] = read_zone(match[3])
    return found


def read_windows(items: tuple[str, ...]) -> Mapping[str, tuple[time, time]]:
    """Read items of the form ``SHIFT=HH:MM-HH:MM``; hours may pass midnight.

    Raises :exc:`ValueError`.
    """
    found = {}
    for item in items:
        try:
            match = _WINDOW.fullmatch(item)
            if match is None or match[2] == match[3]:
                raise ValueError
            found[match[1]] = (time.fromisoformat(match[2]), time.fromisoformat(match[3]))
        except ValueError:
            raise ValueError(f"{item} is not SHIFT=HH:MM-HH:MM") from None
    return found
