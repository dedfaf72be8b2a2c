import pytest

from trio_gateway.core.audiences import BranchId, SectorId, TenantId, UserId
from trio_gateway.core.claims import Rules
from trio_gateway.core.minting import (
    lifetime,
    mint,
    mint_legacy_table_token,
    signing_algorithm,
    staff_claims,
    table_claims,
)
from trio_gateway.core.signatures import Key
from trio_gateway.core.tokens import Staff, read_jwt, read_legacy_table_token, read_table_token

NOW = 1_000_000.5
SECRET = "a-secret-of-at-least-64-bytes-so-that-it-is-long-enough-for-HS512"
RULES = Rules(issuer="pos", audience="gateway")


@pytest.mark.parametrize("algorithm", ["HS256", "HS384", "HS512"])
def test_minted_staff_token_is_valid_by_the_rules_it_was_made_for(algorithm: str) -> None:
    claims = staff_claims(
        tenant=7, user=31, branches=[1, 2], roles=["KITCHEN"], sectors=[5], rules=RULES
    )

    token = mint(claims | lifetime(NOW, 60), SECRET, algorithm)

    assert read_jwt(token, [Key(SECRET, (algorithm,))], RULES, NOW) == Staff(
        tenant=TenantId(7),
        user=UserId("31"),
        branches=frozenset({BranchId(1), BranchId(2)}),
        roles=frozenset({"KITCHEN"}),
        sectors=frozenset({SectorId(5)}),
        issued_at=1_000_000,
        expires_at=1_000_060,
    )


def test_minted_table_token_names_its_session() -> None:
    claims = table_claims(tenant=7, branch=2, table=10, session=456)

    table = read_table_token(
        mint(claims | lifetime(NOW, 60), SECRET), [Key(SECRET, ("HS256",))], Rules(), NOW
    )

    assert (table.tenant, table.branch, table.table, table.session) == (7, 2, 10, 456)


def test_minted_legacy_token_names_its_session_and_its_end() -> None:
    token = mint_legacy_table_token(
        SECRET, tenant=7, branch=2, table=10, session=456, expires_at=1_000_060
    )

    table = read_legacy_table_token(token, SECRET, NOW)

    assert (table.tenant, table.branch, table.table, table.session) == (7, 2, 10, 456)
    assert table.expires_at == 1_000_060


def test_first_algorithm_with_a_shared_secret_signs() -> None:
    assert signing_algorithm(["RS256", "HS384", "HS256"]) == "HS384"
    assert signing_algorithm(["RS256"]) is None
