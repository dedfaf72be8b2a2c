import hmac
import json
from typing import Any

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from hypothesis import example, given
from hypothesis import strategies as st

from tests.support.signed_tokens import (
    HS256,
    NOW,
    SECRET,
    STAFF,
    TABLE,
    TABLE_KEYS,
    TABLE_SECRET,
    refused,
    sign,
)
from trio_gateway.core import tokens
from trio_gateway.core.audiences import Endpoint
from trio_gateway.core.claims import Rules, decode_claims
from trio_gateway.core.close_codes import Close, Rejected
from trio_gateway.core.signatures import MAX_TOKEN_CHARACTERS, Key
from trio_gateway.core.tokens import (
    Staff,
    Table,
    legacy_signature,
    read_jwt,
    read_legacy_table_token,
    read_table_token,
)


def staff(rules: Rules = Rules(), **claims: Any) -> Staff:  # noqa: B008 - frozen
    return read_jwt(sign(STAFF | claims), HS256, rules, NOW)


def table(rules: Rules = Rules(), **claims: Any) -> Table:  # noqa: B008 - frozen
    return read_table_token(sign(TABLE | claims, TABLE_SECRET), TABLE_KEYS, rules, NOW)


# --- staff ---


def test_a_staff_token_names_its_owner() -> None:
    found = staff(sector_ids=[5, 6], jti="j", email="a@b.c")

    assert msgspec.structs.asdict(found) == {
        "tenant": 1, "user": "21", "branches": {1, 2}, "roles": {"WAITER"}, "sectors": {5, 6},
        "expires_at": NOW + 60, "issued_at": NOW - 60, "token_id": "j",
    }  # fmt: skip


@pytest.mark.parametrize("value", [None, ...])
@pytest.mark.parametrize("claim", ["iat", "jti", "sector_ids", "email", "nbf"])
def test_optional_claims_may_be_null_or_left_out(claim: str, value: Any) -> None:
    found = staff(**{claim: value})

    assert {"iat": found.issued_at, "jti": found.token_id}.get(claim) is None


WRONG: dict[str, list[Any]] = {
    "sub": [21, True, None, ..., "", "abc", "1.0", "-1", "+1", " 1", "1_0", "٢١", "²", "1" * 20,
            ["21"], "\ud800"],
    "tenant_id": [True, False, "1", 1.0, 0, -1, 2**63, None, ..., [1], {}],
    "branch_ids": [None, ..., 1, "1", "[1]", {}, {"1": 1}, [True], ["1"], [1.0], [0], [-1],
                   [2**63], [None], [[1]], [1, 2, False]],
    "roles": ["WAITER", "ADMIN", None, ..., 1, {}, {"ADMIN": 1}, [1], [None], ["WAITER", 1], True],
    "exp": [None, ..., True, "1000060", [NOW + 60], {}, float("nan"), float("inf"), -float("inf"),
            2**63, 10**400, NOW, NOW - 1, 0, -1],
    "iat": [True, False, "1", [], {}, float("nan"), float("inf"), 10**400],
    "nbf": [True, "1", [], float("nan"), float("inf"), NOW + 0.5, NOW + 1],
    "sector_ids": [5, "5", {}, [True], ["5"], [0], [5.0], [2**63], False],
    "jti": [1, True, "", [], {}, "\ud800", "a\udc00"],
    "type": ["refresh"],
}  # fmt: skip


@pytest.mark.parametrize(
    ("claim", "value"), [(claim, value) for claim, values in WRONG.items() for value in values]
)
def test_an_invalid_claim_is_refused(claim: str, value: Any) -> None:
    token = sign(STAFF | {claim: value})
    with pytest.raises(Rejected) as caught:
        read_jwt(token, HS256, Rules(), NOW)

    assert refused(caught, token)


def test_a_user_id_that_is_too_long_is_told_so() -> None:
    with pytest.raises(Rejected, match="sub has more than 19 digits"):
        read_jwt(sign(STAFF | {"sub": "1" * 20}), HS256, Rules(), NOW)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**64), 2**64) | st.floats() | st.text(max_size=3)
    | st.sampled_from(["refresh", "gateway", "21", NOW - 60, NOW + 60]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner),
    max_leaves=4,
)  # fmt: skip


@given(
    st.dictionaries(st.sampled_from([*STAFF, *WRONG, "iss", "aud", "email"]), _JSON, max_size=4),
    st.sampled_from([Rules(), Rules(leeway=10), Rules(issuer="gateway", audience="gateway")]),
)
@example({}, Rules())
@example({"sector_ids": None, "jti": "a", "nbf": int(NOW)}, Rules())
@example({"iss": "gateway", "aud": ["gateway"]}, Rules(issuer="gateway", audience="gateway"))
def test_claims_of_the_usual_kind_are_read_as_all_others(
    changes: dict[str, Any], rules: Rules
) -> None:
    payload = json.dumps(STAFF | changes).encode()
    usual = tokens._usual_staff(payload, rules, NOW)
    try:
        expected = tokens._staff(decode_claims(payload), rules, NOW)
    except Rejected:
        assert usual is None
    else:
        assert usual in (expected, None)


def test_most_tokens_are_of_the_usual_kind() -> None:
    claims = STAFF | {"sector_ids": [5], "jti": "a", "email": "a@b.c", "iss": "gateway"}

    assert tokens._usual_staff(json.dumps(claims).encode(), Rules(), NOW) is not None


def test_the_largest_ids_are_valid() -> None:
    largest = 2**63 - 1
    found = staff(tenant_id=largest, branch_ids=[largest], sector_ids=[largest], sub=str(largest))

    assert (found.tenant, found.user) == (largest, str(largest))
    assert [*found.branches, *found.sectors] == [largest, largest]


def test_a_token_is_valid_until_its_exp() -> None:
    token = sign(STAFF | {"iat": 400, "exp": 500})

    assert read_jwt(token, HS256, Rules(), 499.9).expires_at == 500
    for now in (500, 500.1):
        with pytest.raises(Rejected, match="expired"):
            read_jwt(token, HS256, Rules(), now)


@pytest.mark.parametrize("claim", ["nbf", "iat"])
def test_nbf_and_iat_may_be_in_the_future_by_the_leeway(claim: str) -> None:
    token = sign(STAFF | {"iat": 400, claim: 500})

    assert read_jwt(token, HS256, Rules(leeway=10), 490).user == "21"
    with pytest.raises(Rejected, match=r"not valid yet|in the future") as caught:
        read_jwt(token, HS256, Rules(leeway=10), 489.9)
    assert caught.value.close is Close.AUTH_FAILED


def test_exp_is_exact_whatever_the_leeway() -> None:
    token = sign(STAFF | {"iat": 400, "exp": 500})

    assert read_jwt(token, HS256, Rules(leeway=10), 499.9).expires_at == 500
    with pytest.raises(Rejected, match="expired"):
        read_jwt(token, HS256, Rules(leeway=10), 500)


def test_nbf_in_the_past_is_fine() -> None:
    assert staff(nbf=NOW).user == "21"


@pytest.mark.parametrize(
    "iss", ["https://id.example", "https://id.example.com.evil", "", "HTTPS://ID.EXAMPLE.COM", None,
            ..., ["https://id.example.com"], 1, "https://id.example.com/"],
)  # fmt: skip
def test_iss_must_match_exactly(iss: Any) -> None:
    rules = Rules(issuer="https://id.example.com")

    assert staff(rules, iss="https://id.example.com").user == "21"
    with pytest.raises(Rejected) as caught:
        staff(rules, iss=iss)
    assert refused(caught) == "iss is not ours"


@pytest.mark.parametrize("aud", ["gateway", ["gateway"], ["other", "gateway"]])
def test_aud_may_be_a_string_or_a_list(aud: Any) -> None:
    assert staff(Rules(audience="gateway"), aud=aud).user == "21"


@pytest.mark.parametrize(
    "aud",
    ["gate", "gateway2", "", None, ..., [], ["gate", "way"], {"gateway": 1}, 1, [["gateway"]]],
)
def test_another_aud_is_refused(aud: Any) -> None:
    with pytest.raises(Rejected) as caught:
        staff(Rules(audience="gateway"), aud=aud)
    assert refused(caught) == "aud is not ours"


@pytest.mark.parametrize("claims", [{"iss": "x"}, {"aud": "x"}, {"aud": ["x"]}, {"aud": 1}])
def test_iss_and_aud_are_not_checked_unless_configured(claims: dict[str, Any]) -> None:
    assert staff(**claims).user == "21"


# --- signatures ---


# --- the payload ---


@pytest.mark.parametrize(
    "claims", [b"", b"[]", b"null", b'"x"', b"1", b"{", b"\xff\xfe\xff", b"[" * 3000, b"{}",
               b'{"exp":' + b"9" * 5000 + b"}"],
)  # fmt: skip
def test_the_payload_must_be_a_json_object(claims: bytes) -> None:
    token = sign(claims)
    with pytest.raises(Rejected) as caught:
        read_jwt(token, HS256, Rules(), NOW)
    refused(caught, token)


@pytest.mark.parametrize("extra", ["NaN", "1e400", r'"\ud800"', '"é"', "-0", "1E5"])
def test_claim_that_is_not_read_may_be_all_that_python_reads(extra: str) -> None:
    claims = json.dumps(STAFF)[:-1] + f', "email": {extra}}}'

    assert read_jwt(sign(claims.encode()), HS256, Rules(), NOW).user == "21"


def test_the_length_of_a_token_is_limited() -> None:
    token = sign(STAFF | {"email": "x" * 5000})
    assert read_jwt(token, HS256, Rules(), NOW).user == "21"

    endless = sign(STAFF | {"email": "x" * MAX_TOKEN_CHARACTERS})
    with pytest.raises(Rejected, match="too long"):
        read_jwt(endless, HS256, Rules(), NOW)
    with pytest.raises(Rejected, match="too long"):
        read_legacy_table_token(endless, SECRET, NOW)


# --- roles and endpoints ---

ADMITTED = {
    "WAITER": {"waiter"},
    "KITCHEN": {"kitchen"},
    "MANAGER": {"waiter", "kitchen", "admin"},
    "ADMIN": {"waiter", "kitchen", "admin"},
    "DINER": set(),
    "waiter": set(),
    "": set(),
}


@pytest.mark.parametrize("endpoint", Endpoint)
@pytest.mark.parametrize("role", ADMITTED)
def test_role_is_admitted_on_the_endpoints_of_the_contract(role: str, endpoint: Endpoint) -> None:
    one = staff(roles=["OTHER", role])
    if endpoint.label in ADMITTED[role]:
        principal = one.on(endpoint)
        assert (principal.endpoint, principal.tenant, principal.user) == (endpoint, 1, "21")
        assert principal.roles == {"OTHER", role}
        assert principal.branches == {1, 2}
        return
    with pytest.raises(Rejected) as caught:
        one.on(endpoint)
    assert (caught.value.close, caught.value.label) == (Close.FORBIDDEN, "role")


def test_two_roles_are_admitted_on_the_endpoints_of_both() -> None:
    both = staff(roles=["WAITER", "KITCHEN"])

    assert both.on(Endpoint.WAITER).roles == both.on(Endpoint.KITCHEN).roles
    with pytest.raises(Rejected):
        both.on(Endpoint.ADMIN)


def test_token_without_roles_is_admitted_nowhere() -> None:
    with pytest.raises(Rejected) as caught:
        staff(roles=[]).on(Endpoint.WAITER)
    assert caught.value.close is Close.FORBIDDEN


def test_a_token_without_a_branch_is_valid_but_forbidden() -> None:
    with pytest.raises(Rejected) as caught:
        staff(branch_ids=[]).on(Endpoint.WAITER)
    assert (caught.value.close, caught.value.label) == (Close.FORBIDDEN, "branch")


def test_claimed_sectors_hold_in_every_branch_of_the_token() -> None:
    assert staff(sector_ids=[5, 6]).on(Endpoint.WAITER).sectors == {1: {5, 6}, 2: {5, 6}}
    assert staff().on(Endpoint.WAITER).sectors == {}


def test_principal_has_the_claims_that_revocations_name() -> None:
    principal = staff(jti="j").on(Endpoint.WAITER)
    diner = table(jti="j").on(Endpoint.DINER)

    for one in (principal, diner):
        assert (one.token_id, one.issued_at, one.expires_at) == ("j", NOW - 60, NOW + 60)


# --- table tokens ---


def test_a_table_token_names_its_session() -> None:
    diner = table().on(Endpoint.DINER)

    assert (diner.tenant, diner.session, diner.user) == (1, 456, None)
    assert (list(diner.branches), list(diner.roles)) == ([2], [])
    assert (table().table, diner.expires_at) == (10, NOW + 60)


TABLE_WRONG: dict[str, list[Any]] = {
    claim: [True, "1", 1.0, 0, -1, 2**63, None, ..., [1]]
    for claim in ("tenant_id", "branch_id", "table_id", "session_id")
} | {
    "exp": [None, ..., True, "1", float("nan"), float("inf"), NOW, NOW - 1],
    "iat": [None, ..., True, "1", float("nan"), -float("inf"), NOW + 3600],
    "nbf": [NOW + 1],
    "jti": [1, "", "\ud800"],
    "type": ["refresh"],
}


@pytest.mark.parametrize(
    ("claim", "value"), [(claim, value) for claim, them in TABLE_WRONG.items() for value in them]
)
def test_an_invalid_table_claim_is_refused(claim: str, value: Any) -> None:
    token = sign(TABLE | {"exp": NOW + 7200, claim: value}, TABLE_SECRET)
    with pytest.raises(Rejected) as caught:
        read_table_token(token, TABLE_KEYS, Rules(), NOW)
    refused(caught, token)


def test_table_token_is_valid_for_3_hours_at_most() -> None:
    issued = NOW - 60

    assert table(iat=issued, exp=issued + 3 * 3600).expires_at == issued + 3 * 3600
    with pytest.raises(Rejected, match="3 hours"):
        table(iat=issued, exp=issued + 3 * 3600 + 1)


@pytest.mark.parametrize("claim", ["nbf", "iat"])
def test_table_token_has_the_same_leeway(claim: str) -> None:
    assert table(Rules(leeway=10), **{claim: NOW + 10}).session == 456
    with pytest.raises(Rejected, match=r"not valid yet|in the future"):
        table(Rules(leeway=10), **{claim: NOW + 11})


def test_a_table_tokens_exp_is_exact_whatever_the_leeway() -> None:
    assert table(Rules(leeway=10), exp=NOW + 1).expires_at == NOW + 1
    with pytest.raises(Rejected, match="expired"):
        table(Rules(leeway=10), exp=NOW)


def test_iss_and_aud_are_checked_for_staff_tokens_only() -> None:
    assert table(Rules(issuer="us", audience="us"), iss="them").session == 456


def test_each_kind_of_token_has_its_own_secret() -> None:
    with pytest.raises(Rejected, match="token invalid"):
        read_table_token(sign(TABLE, SECRET), TABLE_KEYS, Rules(), NOW)
    with pytest.raises(Rejected, match="token invalid"):
        read_jwt(sign(STAFF, TABLE_SECRET), HS256, Rules(), NOW)


def test_kinds_of_token_stay_apart_with_equal_secrets() -> None:
    with pytest.raises(Rejected) as caught:
        read_table_token(sign(STAFF), HS256, Rules(), NOW)
    refused(caught, sign(STAFF))
    with pytest.raises(Rejected) as caught:
        read_jwt(sign(TABLE), HS256, Rules(), NOW)
    refused(caught, sign(TABLE))


# --- legacy table tokens ---


def legacy(fields: str, secret: str = TABLE_SECRET) -> str:
    signature = hmac.new(secret.encode(), fields.encode("utf-8", "surrogatepass"), "sha256")
    return f"{fields}:{signature.hexdigest()[:32]}"


def test_a_legacy_token_names_its_session() -> None:
    found = read_legacy_table_token(legacy("1:2:10:456:1000060"), TABLE_SECRET, NOW)

    assert (found.tenant, found.branch, found.table, found.session) == (1, 2, 10, 456)
    assert (found.expires_at, found.issued_at, found.token_id) == (1_000_060.0, None, None)


def test_a_legacy_signature_follows_the_contract() -> None:
    fields = "1:2:10:456:1000060"

    assert f"{fields}:{legacy_signature(fields, TABLE_SECRET)}" == legacy(fields)


SIGNED = [
    "1:2:10:456:1000000", "1:2:10:456:999999", "1:2:10:456:0", "1:2:10:456:-1", "1:2:10:456:x",
    "1:2:10:456:1e9", "1:2:10:456:1000060.5", "1:2:10:456:", "1:2:10:456", "1:2:10:456:1000060:7",
    "", "::::", "0:2:10:456:1000060", "1:0:10:456:1000060", "1:2:0:456:1000060",
    "1:2:10:0:1000060", "-1:2:10:456:1000060", "+1:2:10:456:1000060", " 1:2:10:456:1000060",
    "1_0:2:10:456:1000060", "١:2:10:456:1000060", "1:2:10:456:١٠٠٠٠٦٠", "²:2:10:456:1000060",
    "9223372036854775808:2:10:456:1000060", f"{'1' * 5000}:2:10:456:1000060", "\ud800:2:3:4:5",
]  # fmt: skip


@pytest.mark.parametrize("fields", SIGNED)
def test_valid_signature_does_not_make_invalid_fields_valid(fields: str) -> None:
    token = legacy(fields)
    with pytest.raises(Rejected) as caught:
        read_legacy_table_token(token, TABLE_SECRET, NOW)
    refused(caught, token)


LEGACY = legacy("1:2:10:456:1000060")


@pytest.mark.parametrize(
    "token",
    [LEGACY[:-1], LEGACY + "0", LEGACY + " ", LEGACY.upper(), LEGACY[:-32], LEGACY[:-33],
     LEGACY[:-32] + "0" * 32, LEGACY[:-32] + "é" * 32, LEGACY[:-32] + "\ud800",
     LEGACY.replace("456", "457"), legacy("1:2:10:456:1000060", SECRET), "", ":", "x", "\ud800"],
)  # fmt: skip
def test_invalid_signature_makes_the_token_invalid(token: str) -> None:
    with pytest.raises(Rejected) as caught:
        read_legacy_table_token(token, TABLE_SECRET, NOW)
    assert refused(caught, token) == "token invalid"


def test_each_form_of_table_token_is_read_only_as_that_form() -> None:
    with pytest.raises(Rejected, match="token invalid"):
        read_table_token(LEGACY, TABLE_KEYS, Rules(), NOW)
    with pytest.raises(Rejected, match="token invalid"):
        read_legacy_table_token(sign(TABLE, TABLE_SECRET), TABLE_SECRET, NOW)


# --- junk ---

RSA = Key(rsa.generate_private_key(65537, 2048).public_key(), ("RS256",))

odd = st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters())
claim_names = st.sampled_from(
    [*STAFF, *TABLE, "nbf", "jti", "iss", "aud", "type", "sector_ids", "crit", "b64"]
)
claims = st.dictionaries(claim_names, odd | st.lists(odd, max_size=3), max_size=4)


@given(st.text(st.characters(), max_size=60) | st.text("eyJ.-_0:1", max_size=60))
@example("eyJhbGciOiJIUzI1NiJ9.e30.")
@example(":" * 5)
def test_random_text_is_refused_without_another_exception(token: str) -> None:
    rules = Rules(issuer="us", audience="us")
    with pytest.raises(Rejected) as caught:
        read_jwt(token, [*HS256, RSA], rules, NOW)
    refused(caught, token)
    with pytest.raises(Rejected) as caught:
        read_table_token(token, TABLE_KEYS, rules, NOW)
    refused(caught, token)
    with pytest.raises(Rejected) as caught:
        read_legacy_table_token(token, TABLE_SECRET, NOW)
    refused(caught, token)


@given(claims, claims)
def test_arbitrary_signed_claims_are_valid_or_rejected(
    changes: dict[str, Any], header: dict[str, Any]
) -> None:
    for read, keys, good in ((read_jwt, HS256, STAFF), (read_table_token, HS256, TABLE)):
        token = sign(good | changes, **header)
        try:
            found = read(token, keys, Rules(), NOW)
        except Rejected as error:
            assert error.close is Close.AUTH_FAILED  # noqa: PT017 - either outcome is fine
        else:
            assert found.tenant == (good | changes)["tenant_id"]
