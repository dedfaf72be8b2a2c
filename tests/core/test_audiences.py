import pytest
from hypothesis import given
from hypothesis import strategies as st

from trio_gateway.core.audiences import (
    ENDPOINTS,
    BranchId,
    Endpoint,
    Principal,
    SessionId,
    TenantId,
    admins,
    audiences_of,
    branch_diners,
    diners,
    floor,
    kitchen,
    tenant_admins,
    waiters,
)
from trio_gateway.core.audiences import SectorId as Sector
from trio_gateway.core.events import Event
from trio_gateway.core.routing import ROUTES
from trio_gateway.testing import make_event, make_principal

T, B1, B2 = TenantId(1), BranchId(1), BranchId(2)
BOTH = (1, 2)

MEMBERS = {
    "a waiter without sectors": (
        make_principal(Endpoint.WAITER, branches=BOTH),
        {floor(T, B1), floor(T, B2)},
    ),
    "a waiter": (
        make_principal(Endpoint.WAITER, sectors=(5, 6)),
        {floor(T, B1), waiters(T, B1, Sector(5)), waiters(T, B1, Sector(6))},
    ),
    "a manager on /ws/waiter is an admin too": (
        make_principal(Endpoint.WAITER, roles=["MANAGER"]),
        {floor(T, B1), admins(T, B1), tenant_admins(T)},
    ),
    "an admin on /ws/waiter is an admin too": (
        make_principal(Endpoint.WAITER, roles=["ADMIN"], sectors=(5,)),
        {floor(T, B1), waiters(T, B1, Sector(5)), admins(T, B1), tenant_admins(T)},
    ),
    "a cook": (make_principal(Endpoint.KITCHEN, branches=BOTH), {kitchen(T, B1), kitchen(T, B2)}),
    "an admin on /ws/kitchen is a cook": (
        make_principal(Endpoint.KITCHEN, roles=["ADMIN", "MANAGER", "WAITER"], sectors=(5,)),
        {kitchen(T, B1)},
    ),
    "an admin": (
        make_principal(Endpoint.ADMIN, branches=BOTH),
        {admins(T, B1), admins(T, B2), tenant_admins(T)},
    ),
    "a manager on /ws/admin is an admin, and no waiter": (
        make_principal(Endpoint.ADMIN, roles=["MANAGER", "WAITER"], sectors=(5,)),
        {admins(T, B1), tenant_admins(T)},
    ),
    "a diner": (
        make_principal(Endpoint.DINER, session=456),
        {diners(T, SessionId(456)), branch_diners(T, B1)},
    ),
}


@pytest.mark.parametrize("case", MEMBERS)
def test_endpoint_and_roles_decide_the_audiences(case: str) -> None:
    principal, expected = MEMBERS[case]

    assert audiences_of(principal) == expected


def test_the_same_sector_number_in_two_branches_is_two_audiences() -> None:
    assert waiters(T, B1, Sector(5)) != waiters(T, B2, Sector(5))


def test_no_two_kinds_of_audience_are_the_same_key() -> None:
    made = [
        waiters(T, B1, Sector(1)), floor(T, B1), kitchen(T, B1), admins(T, B1),
        tenant_admins(T), diners(T, SessionId(1)), branch_diners(T, B1),
    ]  # fmt: skip

    assert len(set(made)) == len(made)


def test_endpoints_are_found_by_path() -> None:
    assert {path: e.name for path, e in ENDPOINTS.items()} == {
        "/ws/waiter": "WAITER",
        "/ws/kitchen": "KITCHEN",
        "/ws/admin": "ADMIN",
        "/ws/diner": "DINER",
    }


def test_only_diners_are_not_staff() -> None:
    assert [e.name for e in Endpoint if not e.staff] == ["DINER"]


def test_limit_counts_by_tenant_and_user() -> None:
    one, same = make_principal(user=21), make_principal(Endpoint.KITCHEN, user=21)
    others = [make_principal(user=22), make_principal(user=21, tenant=2)]

    assert one.owner == same.owner
    assert one.owner not in {other.owner for other in others}


def test_limit_counts_diners_by_tenant_and_session() -> None:
    one = make_principal(Endpoint.DINER, session=21)
    same = make_principal(Endpoint.DINER, session=21, branches=[2])
    others = [
        make_principal(Endpoint.DINER, session=22),
        make_principal(Endpoint.DINER, session=21, tenant=2),
        make_principal(user=21),
    ]

    assert one.owner == same.owner
    assert one.owner not in {other.owner for other in others}


few = st.integers(1, 3)
some = st.none() | few
principals = st.builds(
    make_principal,
    st.sampled_from(Endpoint),
    tenant=few,
    user=few,
    branches=st.sets(few, min_size=1),
    sectors=st.sets(few),
    roles=st.sets(st.sampled_from(["WAITER", "KITCHEN", "MANAGER", "ADMIN"])),
    session=few,
)
events = st.builds(
    make_event,
    st.sampled_from([*ROUTES, "UNKNOWN"]),
    tenant_id=few,
    branch_id=st.integers(0, 3),
    sector_id=some,
    session_id=some,
    table_id=some,
)


@given(events, principals)
def test_no_event_crosses_a_tenant(event: Event, principal: Principal) -> None:
    meeting = set(ROUTES.audiences(event)) & audiences_of(principal)

    assert not meeting or event.tenant == principal.tenant


@given(events, principals)
def test_no_event_crosses_a_branch(event: Event, principal: Principal) -> None:
    elsewhere = event.branch not in principal.branches | {0}
    meeting = set(ROUTES.audiences(event)) & audiences_of(principal)

    # A session is keyed by tenant and session: its diners move from branch to branch with it.
    own = {diners(principal.tenant, principal.session)} if principal.session else set()
    assert not elsewhere or meeting <= own


@given(events, principals)
def test_every_audience_contains_its_tenant(event: Event, principal: Principal) -> None:
    assert {audience[1] for audience in ROUTES.audiences(event)} <= {event.tenant}
    assert {audience[1] for audience in audiences_of(principal)} == {principal.tenant}


@given(events)
def test_an_event_names_no_audience_twice(event: Event) -> None:
    found = ROUTES.audiences(event)

    assert len(set(found)) == len(found)
