import pytest

from trio_gateway.core.audiences import (
    BranchId,
    Endpoint,
    Principal,
    TenantId,
    audiences_of,
    floor,
)
from trio_gateway.core.events import Event
from trio_gateway.core.routes_file import InvalidRoutes, read_routes
from trio_gateway.core.routing import ROUTES, UNKNOWN, Route, Step, To
from trio_gateway.testing import make_event, make_principal

# The contract's table, section 2. W waiters of the event's sector, F every waiter of the branch,
# K kitchen, A admins, D diners of the session, B every diner of the branch.
TABLE = """
ROUND_PENDING                FAD   durable
ROUND_CONFIRMED              WAD   durable
ROUND_SUBMITTED              WAD   durable
ROUND_IN_KITCHEN             WKAD  durable
ROUND_READY                  WKAD  durable
ROUND_CANCELED               WKAD  durable
ROUND_ITEM_VOIDED            WKAD  durable
ROUND_ITEM_DELETED           WKAD  durable
ROUND_SERVED                 WAD   durable
SERVICE_CALL_CREATED         WA    durable
SERVICE_CALL_ACKED           WAD   durable
SERVICE_CALL_CLOSED          WAD   durable
CHECK_REQUESTED              WAD   durable
CHECK_PAID                   WAD   durable
PAYMENT_APPROVED             WAD   durable
PAYMENT_REJECTED             WAD   durable
PAYMENT_FAILED               WAD   durable
TABLE_SESSION_STARTED        FAD   durable
TABLE_CLEARED                WAD   durable
TABLE_STATUS_CHANGED         WAD   durable
TABLE_TRANSFERRED            WAD   durable
TICKET_IN_PROGRESS           WKA   durable
TICKET_READY                 WKA   durable
TICKET_DELIVERED             WKA   durable
PRODUCT_AVAILABILITY_CHANGED FKAB  durable
CART_ITEM_ADDED              D     -
CART_ITEM_UPDATED            D     -
CART_ITEM_REMOVED            D     -
CART_CLEARED                 D     -
CART_SYNC                    D     -
ENTITY_CREATED               A     durable
ENTITY_UPDATED               A     durable
ENTITY_DELETED               A     durable
CASCADE_DELETE               A     durable
EVENT_UNHEARD                A     durable
"""
ROWS = [(name, letters, mark == "durable") for name, letters, mark in
        (line.split() for line in TABLE.strip().splitlines())]  # fmt: skip

# All clients of a tenant with two branches. The event is for branch 1, sector 5, session 456.
CLIENTS: dict[str, Principal] = {
    "waiter of 5": make_principal(Endpoint.WAITER, user=1, sectors=[5]),
    "waiter of 6": make_principal(Endpoint.WAITER, user=2, sectors=[6]),
    "waiter of none": make_principal(Endpoint.WAITER, user=3),
    "head waiter": make_principal(Endpoint.WAITER, user=4, roles=["MANAGER"]),
    "cook": make_principal(Endpoint.KITCHEN, user=5),
    "head cook": make_principal(Endpoint.KITCHEN, user=6, roles=["MANAGER", "ADMIN"]),
    "manager": make_principal(Endpoint.ADMIN, user=7, roles=["MANAGER"]),
    "admin": make_principal(Endpoint.ADMIN, user=8),
    "diner": make_principal(Endpoint.DINER, session=456),
    "other diner": make_principal(Endpoint.DINER, session=457),
    "waiter elsewhere": make_principal(Endpoint.WAITER, branches=[2], sectors=[5, 6]),
    "cook elsewhere": make_principal(Endpoint.KITCHEN, branches=[2]),
    "admin elsewhere": make_principal(Endpoint.ADMIN, branches=[2]),
    "diner elsewhere": make_principal(Endpoint.DINER, branches=[2], session=458),
}
WAITERS = {"waiter of 5", "waiter of 6", "waiter of none", "head waiter"}
MEANING = {
    "W": {"waiter of 5"},
    "F": WAITERS,
    "K": {"cook", "head cook"},
    "A": {"manager", "admin", "head waiter"},
    "D": {"diner"},
    "B": {"diner", "other diner"},
}


def receivers(event: Event) -> set[str]:
    found = set(ROUTES.audiences(event))
    return {name for name, principal in CLIENTS.items() if found & audiences_of(principal)}


def expected_of(letters: str) -> set[str]:
    return set().union(*(MEANING[letter] for letter in letters))


def test_the_table_has_exactly_the_contracts_types() -> None:
    assert sorted(ROUTES) == sorted(name for name, _, _ in ROWS)


@pytest.mark.parametrize(("name", "letters", "durable"), ROWS)
def test_event_reaches_exactly_the_audiences_in_the_table(
    name: str, letters: str, durable: bool
) -> None:
    event = make_event(name, sector_id=5, session_id=456, table_id=10)

    assert receivers(event) == expected_of(letters)
    assert ROUTES[name].durable is durable


@pytest.mark.parametrize(("name", "letters", "_durable"), ROWS)
def test_event_without_a_sector_reaches_all_waiters_of_the_branch(
    name: str, letters: str, _durable: bool
) -> None:
    expected = expected_of(letters.replace("W", "F"))

    assert receivers(make_event(name, session_id=456)) == expected
    assert receivers(make_event(name, session_id=456, sector_id=None)) == expected


@pytest.mark.parametrize("session", [None, ...])
@pytest.mark.parametrize(("name", "letters", "_durable"), ROWS)
def test_event_without_a_session_reaches_no_diners(
    name: str, letters: str, _durable: bool, session: object
) -> None:
    event = make_event(name, sector_id=5, session_id=session)

    assert receivers(event) == expected_of(letters.replace("D", ""))


@pytest.mark.parametrize(("name", "letters", "_durable"), ROWS)
def test_branch_0_reaches_only_the_admins_of_every_branch(
    name: str, letters: str, _durable: bool
) -> None:
    event = make_event(name, branch_id=0, sector_id=5, session_id=456)
    heads = {"manager", "admin", "head waiter", "admin elsewhere"}

    assert receivers(event) == (heads if "A" in letters else set())


def test_event_for_an_uncovered_sector_reaches_no_waiter() -> None:
    event = make_event("ROUND_SERVED", sector_id=99, session_id=456)

    assert receivers(event) == expected_of("AD")


def test_round_reaches_the_kitchen_only_after_an_admin_sends_it_there() -> None:
    cooks = MEANING["K"]

    assert not receivers(make_event("ROUND_SUBMITTED", sector_id=5, session_id=456)) & cooks
    assert receivers(make_event("ROUND_IN_KITCHEN", sector_id=5, session_id=456)) >= cooks


@pytest.mark.parametrize("name", ["SOMETHING_NEW", "round_ready", " ROUND_READY", "ROUND_READY\0"])
def test_unknown_type_goes_to_admins_only(name: str) -> None:
    assert receivers(make_event(name, sector_id=5, session_id=456)) == MEANING["A"]
    assert ROUTES.route_of(name) is UNKNOWN
    assert not ROUTES.is_durable(name)
    assert name not in ROUTES


def test_session_is_keyed_by_its_tenant() -> None:
    event = make_event("CART_SYNC", tenant_id=2, session_id=456)

    assert receivers(event) == set()


# --- the operator's file ---


def read(text: str) -> dict[str, Route]:
    """What a file changes of the table."""
    return {name: r for name, r in read_routes(text).items() if ROUTES.get(name) != r}


GOOD = {
    "": {},
    "[routes]": {},
    '[routes.ROUND_READY]\nto = ["kitchen"]': {"ROUND_READY": Route(To.KITCHEN, True)},
    '[routes.ROUND_READY]\nto = ["kitchen"]\ndurable = false': {
        "ROUND_READY": Route(To.KITCHEN, False)
    },
    "[routes.CART_SYNC]\ndurable = true": {"CART_SYNC": Route(To.DINERS, True)},
    "[routes.CART_SYNC]\nto = []": {"CART_SYNC": Route(To(0), False)},
    '[routes.NEW]\nto = ["waiters", "admins", "waiters"]\ndurable = true': {
        "NEW": Route(To.WAITERS | To.ADMINS, True)
    },
    '[routes.NEW]\nto = ["diners"]': {"NEW": Route(To.DINERS, False)},
    "[routes.NEW]": {"NEW": Route(To.ADMINS, False)},
    "[routes.ROUND_READY]\nreceipt = true": {
        "ROUND_READY": Route(ROUTES["ROUND_READY"].to, True, receipt=True)
    },
    '[routes.ROUND_READY]\nmust_reach = "kitchen"\nwithin = 2.5': {
        "ROUND_READY": Route(
            ROUTES["ROUND_READY"].to, True, receipt=True, steps=(Step(To.KITCHEN, 2.5),)
        )
    },
    '[routes.NEW]\nto = ["waiters"]\ndurable = true\nmust_reach = "waiters"\nwithin = 10\n'
    'then = [{to = "floor", within = 10}, {to = "admins", within = 20}]': {
        "NEW": Route(
            To.WAITERS,
            True,
            receipt=True,
            steps=(Step(To.WAITERS, 10), Step(To.FLOOR, 10), Step(To.ADMINS, 20)),
        )
    },
    '[routes."it\'s new"]\nto = ["floor"]': {"it's new": Route(To.FLOOR, False)},
    '[routes.NEW]\nto = ["waiters", "floor", "kitchen", "admins", "diners", "branch_diners"]': {
        "NEW": Route(
            To.WAITERS | To.FLOOR | To.KITCHEN | To.ADMINS | To.DINERS | To.BRANCH_DINERS, False
        )
    },
}


@pytest.mark.parametrize("text", GOOD)
def test_file_overrides_and_extends_the_table(text: str) -> None:
    assert read(text) == GOOD[text]


BAD = [
    ("\nroutes ?", "not TOML: ", "line 2"),
    ("[routes.A]\nto = [", "not TOML: ", ""),
    ("[routes.A]\n[routes.A]", "not TOML: ", ""),
    ('[route.A]\nto = ["admins"]', "unknown table: route ", "[routes.TYPE]"),
    ("x = 1", "unknown table: x ", "[routes.TYPE]"),
    ("routes = 3", "routes: ", "[routes.ROUND_READY]"),
    ("[[routes]]", "routes: ", "[routes.ROUND_READY]"),
    ("[routes]\nA = 1", "routes.A: ", "table"),
    ("[[routes.A]]", "routes.A: ", "table"),
    ('[routes.A]\nfor = ["admins"]', "routes.A: ", "'for' (known: to, durable, receipt, "),
    ("[routes.A]\ndurable = 1", "routes.A.durable: ", "true or false"),
    ('[routes.A]\ndurable = "yes"', "routes.A.durable: ", "true or false"),
    ('[routes.A]\nto = "admins"', "routes.A.to: ", "list of audience names"),
    ("[routes.A]\nto = [1]", "routes.A.to: ", "list of audience names"),
    ('[routes.A]\nto = ["admin"]', "routes.A.to: ", "'admin' (known: admins, waiters, floor, "),
    ('[routes.A]\nto = ["ADMINS"]', "routes.A.to: ", "'ADMINS'"),
    ('[routes.A]\nto = [""]', "routes.A.to: ", "''"),
    ("[routes.ROUND_READY]\nreceipt = 1", "routes.ROUND_READY.receipt: ", "true or false"),
    ("[routes.CART_SYNC]\nreceipt = true", "routes.CART_SYNC.receipt: ", "durable"),
    (
        '[routes.EVENT_UNHEARD]\nmust_reach = "admins"\nwithin = 1',
        "routes.EVENT_UNHEARD.must_reach: ",
        "another one",
    ),
    ("[routes.EVENT_UNHEARD]\ndurable = false", "routes.EVENT_UNHEARD.durable: ", "must be true"),
    ('[routes.EVENT_ESCALATED]\nto = ["admins"]', "routes.EVENT_ESCALATED: ", "by the gateway"),
    ('[routes.""]\nto = ["admins"]', 'routes."": ', "never empty"),
    (
        '[routes.CART_SYNC]\nmust_reach = "diners"\nwithin = 1',
        "routes.CART_SYNC.must_reach: ",
        "durable",
    ),
    *(
        (f"[routes.ROUND_READY]\n{text}", f"routes.ROUND_READY.{place}: ", hint)
        for text, place, hint in (
            ('must_reach = "waiters"', "within", "missing"),
            ('must_reach = ["waiters"]\nwithin = 1', "must_reach", "name of an audience"),
            ('must_reach = "cooks"\nwithin = 1', "must_reach", "'cooks' (known: admins, "),
            ('must_reach = "floor"\nwithin = 1', "must_reach", "not one of the audiences in `to`"),
            ('must_reach = "waiters"\nwithin = 0', "within", "above 0"),
            ('must_reach = "waiters"\nwithin = -1', "within", "above 0"),
            ('must_reach = "waiters"\nwithin = inf', "within", "above 0"),
            ('must_reach = "waiters"\nwithin = nan', "within", "above 0"),
            ('must_reach = "waiters"\nwithin = true', "within", "above 0"),
            ('must_reach = "waiters"\nwithin = "10"', "within", "above 0"),
            ('must_reach = "waiters"\nwithin = 1\nreceipt = false', "receipt", "must be true"),
            ("within = 1", "within", "only with must_reach"),
            ('then = [{to = "floor", within = 1}]', "then", "only with must_reach"),
            ('must_reach = "waiters"\nwithin = 1\nthen = "floor"', "then", "must be a list"),
            ('must_reach = "waiters"\nwithin = 1\nthen = ["floor"]', "then", "must be a list"),
            ('must_reach = "waiters"\nwithin = 1\nthen = [{within = 1}]', "then[1].to", "missing"),
            (
                'must_reach = "waiters"\nwithin = 1\nthen = [{to = "floor"}]',
                "then[1].within",
                "missing",
            ),
            (
                'must_reach = "waiters"\nwithin = 1\nthen = [{to = "floor", within = 1, x = 1}]',
                "then[1]",
                "'x' (known: to, within)",
            ),
            (
                (
                    'must_reach = "waiters"\nwithin = 1\n'
                    'then = [{to = "floor", within = 1}, {to = "waiters", within = 1}]'
                ),
                "then[2].to",
                "'waiters' is an earlier step",
            ),
        )
    ),
    (
        '[routes.ROUND_READY]\nmust_reach = "waiters"\nwithin = 86401',
        "routes.ROUND_READY: ",
        "86400 seconds",
    ),
]


@pytest.mark.parametrize(("text", "place", "hint"), BAD)
def test_error_in_the_file_is_reported_with_its_place(text: str, place: str, hint: str) -> None:
    with pytest.raises(InvalidRoutes) as caught:
        read_routes(text)

    assert str(caught.value).startswith(place)
    assert hint in str(caught.value)


def test_events_are_routed_by_the_table_of_the_file() -> None:
    routes = read_routes('[routes.NEW]\nto = ["kitchen", "branch_diners"]')

    assert {a[0] for a in routes.audiences(make_event("NEW"))} == {"kitchen", "branch_diners"}
    assert {a[0] for a in ROUTES.audiences(make_event("NEW"))} == {"admins"}


def test_the_table_can_not_be_changed_by_accident() -> None:
    for table in (ROUTES, read_routes("")):
        with pytest.raises(TypeError):
            table["ROUND_READY"] = UNKNOWN  # type: ignore[index]


def test_event_without_a_sector_names_the_floor_once() -> None:
    routes = read_routes('[routes.NEW]\nto = ["waiters", "floor"]')

    assert routes.audiences(make_event("NEW")) == [floor(TenantId(1), BranchId(1))]
