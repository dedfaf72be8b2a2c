from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trio_gateway.core.audiences import Endpoint, Principal, audiences_of
from trio_gateway.core.events import Event
from trio_gateway.core.explanation import Fact, Reason, describe, judge, why_not
from trio_gateway.core.routes_file import read_routes
from trio_gateway.core.routing import ROUTES, Route, Routing, To
from trio_gateway.testing import make_event, make_principal

few = st.integers(1, 3)
some = st.none() | few
principals = st.builds(
    make_principal,
    st.sampled_from(Endpoint),
    tenant=few,
    branches=st.sets(few, min_size=1),
    sectors=st.sets(few),
    roles=st.sets(st.sampled_from(["WAITER", "KITCHEN", "MANAGER", "ADMIN"]), min_size=1),
    session=few,
)
events = st.builds(
    make_event,
    st.sampled_from(["CUSTOM", "UNKNOWN"]) | st.sampled_from([*ROUTES]),
    tenant_id=few,
    branch_id=st.integers(0, 3),
    sector_id=some,
    session_id=some,
)
tables = st.integers(0, (~To(0)).value).map(
    lambda to: Routing({**ROUTES, "CUSTOM": Route(To(to), True)})
)


def receives(event: Event, principal: Principal, routes: Routing) -> bool:
    return bool(set(routes.audiences(event)) & audiences_of(principal))


@given(events, principals, tables)
def test_event_that_is_not_delivered_has_a_reason_and_no_other_has(
    event: Event, principal: Principal, routes: Routing
) -> None:
    assert (why_not(event, principal, routes) is None) is receives(event, principal, routes)


def fixed(fact: Fact, event: Event, principal: Principal) -> tuple[Event, Principal]:
    """The same, without the obstacle of that one fact."""
    match fact:
        case Fact.TENANT:
            return event, replace(principal, tenant=event.tenant)
        case Fact.BRANCH:
            return event, replace(principal, branches=principal.branches | {event.branch})
        case Fact.ROLE:
            return event, replace(principal, roles=principal.roles | {"MANAGER"})
        case Fact.SECTOR:
            assert event.sector is not None
            return event, replace(principal, sectors={event.branch: frozenset({event.sector})})
        case Fact.SESSION if event.session is not None:
            return event, replace(principal, session=event.session)
        case Fact.SESSION:
            event.session = principal.session  # here the event must be fixed
            return event, principal
    raise AssertionError(fact)


@given(events, principals, tables)
def test_fixing_a_reason_shows_the_next_one_or_delivers_the_event(
    event: Event, principal: Principal, routes: Routing
) -> None:
    ranks = [
        {Fact.TENANT}, {Fact.BRANCH}, {Fact.ROLE, Fact.TYPE}, {Fact.SECTOR}, {Fact.SESSION}
    ]  # fmt: skip
    rank = -1
    while (reason := why_not(event, principal, routes)) is not None:
        before, rank = rank, next(i for i, facts in enumerate(ranks) if reason.fact in facts)
        assert rank > before
        if reason.fact is Fact.TYPE:
            return
        event, principal = fixed(reason.fact, event, principal)
    assert receives(event, principal, routes)


@given(events, principals, tables)
def test_type_is_the_reason_only_if_no_principal_of_the_tenant_receives_it_on_that_endpoint(
    event: Event, principal: Principal, routes: Routing
) -> None:
    reason = why_not(event, principal, routes)
    if reason is not None and reason.fact is Fact.TYPE:
        everything = make_principal(
            principal.endpoint,
            tenant=event.tenant,
            branches=range(1, 4),
            sectors=range(1, 4),
            roles=["WAITER", "KITCHEN", "MANAGER", "ADMIN"],
            session=event.session or 1,
        )
        assert not receives(event, everything, routes)


TEXTS = {
    "tenant": (make_event(tenant_id=2), make_principal(), "the token is of another tenant"),
    "branch": (
        make_event(branch_id=2),
        make_principal(branches=[3, 1]),
        "the event is for branch 2, the token for 1, 3",
    ),
    "sector": (
        make_event(sector_id=5),
        make_principal(sectors=[2, 1]),
        "the event is for sector 5 of branch 1, this waiter has 1, 2",
    ),
    "sector, of none": (
        make_event(sector_id=5),
        make_principal(),
        "the event is for sector 5 of branch 1, this waiter has none",
    ),
    "session": (
        make_event(session_id=1),
        make_principal(Endpoint.DINER),
        "the event is for session 1, the token for 456",
    ),
    "session, not named": (
        make_event("CART_SYNC"),
        make_principal(Endpoint.DINER),
        "CART_SYNC is for one session, but names no session",
    ),
    "role": (
        make_event("ENTITY_CREATED"),
        make_principal(),
        (
            "ENTITY_CREATED goes to admins, which on /ws/waiter are ADMIN and MANAGER;"
            " the token has WAITER"
        ),
    ),
    "type": (
        make_event("ROUND_SUBMITTED"),
        make_principal(Endpoint.KITCHEN),
        "ROUND_SUBMITTED goes to admins, waiters, diners, never to /ws/kitchen",
    ),
    "type, not known": (
        make_event("BREAD"),
        make_principal(Endpoint.KITCHEN),
        "BREAD is not a known type and goes to admins, never to /ws/kitchen",
    ),
    "type, of the whole tenant": (
        make_event("CART_SYNC", branch_id=0),
        make_principal(Endpoint.ADMIN),
        (
            "an event for the whole tenant (branch 0) goes to its admins only,"
            " and CART_SYNC never goes to them"
        ),
    ),
}


@pytest.mark.parametrize("case", TEXTS)
def test_reason_is_given_as_a_sentence(case: str) -> None:
    event, principal, text = TEXTS[case]
    assert why_not(event, principal) == Reason(Fact(case.split(",")[0]), text)


def test_uncovered_sector_is_not_a_reason_for_waiters_that_receive_its_events_instead() -> None:
    event, principal = make_event(sector_id=5), make_principal()
    fallen_back = [*ROUTES.audiences(event), *ROUTES.audiences(make_event())]
    assert why_not(event, principal, audiences=fallen_back) is None


def test_verdict_names_each_endpoint() -> None:
    roles = ["WAITER", "ADMIN"]
    found = judge(
        make_event("ENTITY_CREATED"),
        [make_principal(endpoint, roles=roles) for endpoint in Endpoint if endpoint.staff],
    )
    assert found.as_json() == {
        "receives": True,
        "endpoints": ["waiter", "admin"],
        "reasons": {"kitchen": "type: ENTITY_CREATED goes to admins, never to /ws/kitchen"},
    }


def test_endpoint_that_does_not_admit_the_role_has_that_reason() -> None:
    found = judge(make_event(), [make_principal()])
    assert found.as_json() == {
        "receives": True,
        "endpoints": ["waiter"],
        "reasons": {
            "kitchen": "role: /ws/kitchen admits ADMIN, KITCHEN, MANAGER; the token has WAITER",
            "admin": "role: /ws/admin admits ADMIN, MANAGER; the token has WAITER",
        },
    }


@given(events, principals)
def test_token_of_another_tenant_has_no_other_reason(event: Event, principal: Principal) -> None:
    if event.tenant != principal.tenant:
        assert judge(event, [principal]).as_json() == {
            "receives": False,
            "endpoints": [],
            "reasons": {"token": "tenant: the token is of another tenant"},
        }


def test_description_of_an_audience_has_its_ids() -> None:
    event = make_event("ROUND_READY", tenant_id=9, branch_id=2, sector_id=3, session_id=4)
    every_audience = Routing({"CUSTOM": Route(~(To.WAITERS | To.DINERS), True)})
    assert [describe(each) for each in ROUTES.audiences(event)] == [
        {"audience": "admins", "tenant_id": 9, "branch_id": 2},
        {"audience": "waiters", "tenant_id": 9, "branch_id": 2, "sector_id": 3},
        {"audience": "kitchen", "tenant_id": 9, "branch_id": 2},
        {"audience": "diners", "tenant_id": 9, "session_id": 4},
    ]
    custom = make_event("CUSTOM", branch_id=2)
    assert [describe(each)["audience"] for each in every_audience.audiences(custom)] == [
        "admins", "floor", "kitchen", "branch_diners"
    ]  # fmt: skip
    (whole,) = ROUTES.audiences(make_event(branch_id=0))
    assert describe(whole) == {"audience": "tenant_admins", "tenant_id": 1}


def test_step_that_brings_an_event_to_somebody_later_is_told() -> None:
    routes = read_routes(
        '[routes.SERVICE_CALL_CREATED]\nto = ["waiters"]\nmust_reach = "waiters"\nwithin = 10\n'
        'then = [{to = "floor", within = 5}, {to = "admins", within = 20}]\n'
    )
    call = make_event("SERVICE_CALL_CREATED", sector_id=5)

    def later(*principals: Principal) -> Any:
        return judge(call, principals, routes).as_json().get("later")

    mine = make_principal(Endpoint.WAITER, sectors=[5])
    colleague = make_principal(Endpoint.WAITER, sectors=[6])
    manager = make_principal(Endpoint.ADMIN, roles=["MANAGER"])
    elsewhere = make_principal(Endpoint.WAITER, sectors=[5], branches=[2])
    assert later(mine) is None
    assert later(colleague) == {"waiter": {"to": "floor", "after": 10.0}}
    assert later(manager) == {"admin": {"to": "admins", "after": 15.0}}
    assert later(elsewhere) is None
