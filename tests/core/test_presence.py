"""Presence as values: what several connections and processes make of one user or session."""

from dataclasses import replace
from functools import reduce
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trio_gateway.core.audiences import BranchId, Endpoint, SectorId, TableId, TenantId, UserId
from trio_gateway.core.presence import (
    Items,
    Present,
    SessionItem,
    UserItem,
    change,
    combine,
    item,
    items_of,
    key_of,
    merge,
    present,
    read_record,
    record_of,
    who_is,
    write_record,
)
from trio_gateway.testing import make_principal

ONE, TWO = BranchId(1), BranchId(2)
sectors = st.dictionaries(
    st.integers(1, 3).map(BranchId), st.frozensets(st.integers(1, 3).map(SectorId)), min_size=1
)


@st.composite
def presents(draw: st.DrawFn, user: int | None = None) -> Present:
    endpoint = draw(st.sampled_from(Endpoint)) if user is None else Endpoint.WAITER
    number = draw(st.integers(1, 3)) if user is None else user
    principal = make_principal(endpoint, user=number, session=number)
    table = TableId(10) if endpoint is Endpoint.DINER else None
    since = draw(st.integers(1, 9)) + 0.125
    return Present(who_is(principal), draw(sectors), table, draw(st.integers(1, 3)), since)


def user_item(**changes: object) -> UserItem:
    keys = {"user_id": "21", "endpoint": "waiter", "sector_ids": [], "connections": 1, "since": 5.0}
    return UserItem(**keys | changes)  # type: ignore[arg-type]


@given(presents())
def test_record_is_read_as_it_was_written(one: Present) -> None:
    assert read_record(write_record(one), one.connections, one.since) == one


@pytest.mark.parametrize(
    "text", ["", "{}", "{}\n{}", "x\n{}", '{"tenant_id":1,"branch_ids":[1],"endpoint":"bar"}\n{}']
)
def test_what_is_no_record_is_an_error(text: str) -> None:
    with pytest.raises(ValueError, match="no record"):
        read_record(text, 1, 0.0)


def test_record_begins_with_the_event_of_the_contract() -> None:
    waiter = present([make_principal(branches=[2, 1], sectors=[6, 5])], 0.0)
    assert write_record(waiter) == (
        '{"tenant_id":1,"branch_ids":[1,2],"user_id":"21","endpoint":"waiter"}\n'
        '{"1":[5,6],"2":[5,6]}'
    )
    strange = replace(make_principal(), user=UserId('"\n'))
    assert write_record(present([strange], 0.0)) == (
        '{"tenant_id":1,"branch_ids":[1],"user_id":"\\"\\n","endpoint":"waiter"}\n{}'
    )
    diner = present([make_principal(Endpoint.DINER, table=10)], 0.0)
    assert write_record(diner) == (
        '{"tenant_id":1,"branch_ids":[1],"session_id":456,"table_id":10,"endpoint":"diner"}\n{}'
    )


@pytest.mark.parametrize("keys", [{}, {"branches": [2, 1]}, {"sectors": [6, 5]}], ids=str)
@pytest.mark.parametrize("endpoint", [Endpoint.WAITER, Endpoint.DINER])
def test_record_of_a_connection_is_that_of_what_it_makes(
    endpoint: Endpoint, keys: dict[str, Any]
) -> None:
    one = make_principal(endpoint, **keys)
    assert record_of(one) == write_record(present([one], 0.0))


def test_connections_of_one_user_are_united() -> None:
    both = present(
        [make_principal(branches=[1], sectors=[5]), make_principal(branches=[1, 2], sectors=[6])],
        5.0,
    )
    assert item(both, ONE) == user_item(sector_ids=[5, 6], connections=2)
    assert item(both, TWO) == user_item(sector_ids=[6], connections=2)
    assert item(both) == user_item(sector_ids=[5, 6], connections=2)


@given(st.lists(presents(), max_size=6), st.randoms())
def test_answers_of_processes_are_merged_in_any_order(found: list[Present], random: object) -> None:
    answers = [items_of([each], None) for each in found]
    random.shuffle(shuffled := list(answers))  # type: ignore[attr-defined]
    merged = merge(answers)
    assert merged == merge(shuffled)
    assert len({(u.user_id, u.endpoint) for u in merged.users}) == len(merged.users)
    assert len({s.session_id for s in merged.sessions}) == len(merged.sessions)
    everybody: list[UserItem | SessionItem] = [*merged.users, *merged.sessions]
    assert sum(i.connections for i in everybody) == sum(p.connections for p in found)


@given(st.lists(presents(user=7), min_size=2, max_size=4))
def test_what_is_read_from_redis_is_what_the_processes_answer(found: list[Present]) -> None:
    for branch in (ONE, TWO, None):
        known = [each for each in found if branch is None or branch in each.sectors]
        if len(known) == len(found):
            both = items_of([reduce(combine, found)], branch)
            assert merge(items_of([each], branch) for each in found) == both


def test_users_are_in_the_order_of_their_numbers() -> None:
    found = Items([user_item(user_id=n) for n in ("10", "9", "100")])
    assert [user.user_id for user in merge([found]).users] == ["9", "10", "100"]


def test_what_watchers_of_a_branch_are_told() -> None:
    before = present([make_principal(branches=[1], sectors=[5])], 5.0)
    more = present([make_principal(branches=[1], sectors=[5])] * 2, 5.0)
    moved = present([make_principal(branches=[2], sectors=[5])], 5.0)
    other = present([make_principal(branches=[1], sectors=[6])], 5.0)
    here = user_item(sector_ids=[5])
    gone = user_item(sector_ids=[5], connections=0)
    assert change(None, before, ONE) == (here, None)
    assert change(before, None, ONE) == (None, gone)
    assert change(before, more, ONE) is None
    assert change(before, moved, ONE) == (None, gone)
    assert change(before, moved, TWO) == (here, None)
    assert change(before, other, ONE) == (user_item(sector_ids=[6]), None)
    assert change(before, other, TWO) is None
    assert change(None, None, ONE) is None


def test_tenants_of_one_user_have_different_keys() -> None:
    keys = {key_of(make_principal(tenant=tenant)) for tenant in (1, 2)}
    assert keys == {"1:waiter:21", "2:waiter:21"}
    assert who_is(make_principal()).tenant == TenantId(1)
