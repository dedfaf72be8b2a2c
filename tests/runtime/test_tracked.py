"""Tracked events: where in the stream the members of an audience were sent one."""

from trio_gateway.core.audiences import (
    Audience,
    BranchId,
    SectorId,
    TenantId,
    admins,
    floor,
    waiters,
)
from trio_gateway.core.event_ids import Position, tag
from trio_gateway.core.receipts import Place, TrackedEvent
from trio_gateway.runtime.tracked import Tracked

ONE, BRANCH = TenantId(1), BranchId(1)
FLOOR, ADMINS = floor(ONE, BRANCH), admins(ONE, BRANCH)
COVERING, OTHER = waiters(ONE, BRANCH, SectorId(5)), waiters(ONE, BRANCH, SectorId(6))
WAITER, COLLEAGUE = frozenset({FLOOR, COVERING}), frozenset({FLOOR, OTHER})
ORIGINAL, ESCALATED = Position((5, 0)), Position((9, 0))


def tracked() -> Tracked:
    steps: list[frozenset[Audience]] = [frozenset({COVERING}), frozenset({FLOOR})]
    about = TrackedEvent("SERVICE_CALL_CREATED", 1, 1, 5)
    return Tracked(Place(tag("s"), ORIGINAL), about, 99, {COVERING, ADMINS}, steps)


def test_members_of_the_first_audiences_were_sent_the_original() -> None:
    found = tracked()
    found.escalated[1] = ESCALATED
    assert found.sent_at(WAITER) == found.sent_at({ADMINS}) == ORIGINAL


def test_members_of_a_later_audience_were_sent_it_when_it_was_escalated() -> None:
    found = tracked()
    found.escalated[1] = ESCALATED
    assert found.sent_at(COLLEAGUE) == ESCALATED
    assert found.sent_at({OTHER}) is None


def test_all_waiters_may_have_stood_in_until_it_is_escalated() -> None:
    found = tracked()
    assert found.sent_at(COLLEAGUE) == ORIGINAL
    assert found.sent_at({OTHER, floor(ONE, BranchId(2)), floor(TenantId(2), BRANCH)}) is None


def test_who_stands_in_is_in_the_step_of_those_it_stands_in_for() -> None:
    found = tracked()
    assert found.steps_of(COLLEAGUE) == 0b10
    found.stand_in([COVERING, ADMINS])
    assert found.steps_of(COLLEAGUE) == 0b10
    found.stand_in([COVERING, ADMINS, FLOOR])
    assert found.steps_of(COLLEAGUE) == 0b11
    found.escalated[1] = ESCALATED
    assert found.sent_at(COLLEAGUE) == ORIGINAL
