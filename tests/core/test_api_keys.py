"""The file of API keys: what it may say, and what a problem names."""

from contextlib import suppress
from hashlib import sha256
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trio_gateway.core.api_keys import ApiKey, InvalidApiKeys, Scope, read_api_keys

DIGEST = sha256(b"a secret").hexdigest()
VALID = {"sha256": f'"{DIGEST}"', "scopes": '["publish"]', "tenants": "[1, 2]", "rate": "50"}


def text(name: str = "orders", /, **changes: str | None) -> str:
    lines = [f"{key} = {value}" for key, value in (VALID | changes).items() if value is not None]
    return "\n".join([f"[keys.{name}]", *lines, ""])


def test_a_key_has_its_scopes_tenants_and_rate() -> None:
    (key,) = read_api_keys(text(scopes='["publish", "read"]'))
    assert key == ApiKey(
        "orders",
        bytes.fromhex(DIGEST),
        frozenset({Scope.PUBLISH, Scope.READ}),
        frozenset({1, 2}),
        50.0,
    )
    assert (key.may_act_for(1), key.may_act_for(3)) == (True, False)
    assert DIGEST not in repr(key)
    assert str(key.digest) not in repr(key)


def test_a_key_without_tenants_is_for_all_of_them_at_the_default_rate() -> None:
    (key,) = read_api_keys(text(tenants=None, rate=None))
    assert key.may_act_for(10**12)
    assert key.rate == 100


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("sha256", None),
        ("sha256", '"abc"'),
        ("sha256", "5"),
        ("sha256", f'"{DIGEST}0"'),
        ("sha256", f'"{sha256(b"").hexdigest()}"'),
        ("scopes", None),
        ("scopes", "[]"),
        ("scopes", '"publish"'),
        ("scopes", '["publish", "write"]'),
        ("scopes", "[{publish = 1}]"),
        ("tenants", "[]"),
        ("tenants", "1"),
        ("tenants", "[0]"),
        ("tenants", "[true]"),
        ("tenants", '["1"]'),
        ("tenants", "[1.0]"),
        ("tenants", f"[{2**63}]"),
        ("rate", "0"),
        ("rate", "-1"),
        ("rate", "true"),
        ("rate", '"100"'),
        ("rate", "nan"),
        ("rate", "inf"),
    ],
)
def test_a_problem_names_the_key_and_the_field(field: str, value: str | None) -> None:
    with pytest.raises(InvalidApiKeys, match=rf"^keys\.orders\.{field}: "):
        read_api_keys(text("orders", **{field: value}))


@pytest.mark.parametrize(
    ("document", "problem"),
    [
        ("", "no key"),
        ("keys = 5", "no key"),
        ("[keys]", "no key"),
        ("[keys]\norders = 5", "keys.orders: must be a table"),
        ("[other]", "unknown table or key at the top"),
        ("x = [", "not TOML"),
        (text() + text("menu"), "keys.menu.sha256: the same as that of keys.orders"),
        (text(tenant="[1]"), "keys.orders: unknown field tenant "),
        (text('"a b"'), "keys: a name has letters"),
        (text("a.b"), "keys.a: unknown field b"),
    ],
)
def test_anything_else_in_the_file_is_a_problem(document: str, problem: str) -> None:
    with pytest.raises(InvalidApiKeys) as found:
        read_api_keys(document)
    assert str(found.value).startswith(problem)


SECRET = "hush-hush-this-is-a-secret"


@pytest.mark.parametrize(
    "document",
    [
        text(sha256=f'"{SECRET}"'),
        text(secret=f'"{SECRET}"'),
        text(**{SECRET: "5"}),
        text(scopes=f'["{SECRET}"]'),
        text(tenants=f'["{SECRET}"]'),
        text(rate=f'"{SECRET}"'),
        f"{SECRET} = 5",
        f"[keys.orders]\nsha256 = {SECRET}",
        f"[keys.orders]\n{SECRET}",
        f"[keys.orders]\n{SECRET} = 1\n{SECRET} = 2",
    ],
)
def test_no_problem_shows_a_secret_that_stands_in_the_wrong_place(document: str) -> None:
    with pytest.raises(InvalidApiKeys) as found:
        read_api_keys(document)
    assert SECRET not in str(found.value)


VALUES: Any = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=5,
)


@given(st.text(max_size=60) | st.builds(lambda value: text(scopes=repr(value)), VALUES))
def test_any_text_is_read_or_refused(document: str) -> None:
    with suppress(InvalidApiKeys):
        assert read_api_keys(document)
