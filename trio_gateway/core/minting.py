"""Minting: make tokens that a gateway with the same secret accepts."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jwt

from .claims import Rules
from .tokens import legacy_signature


def staff_claims(
    *,
    tenant: int,
    user: int,
    branches: Iterable[int],
    roles: Iterable[str],
    sectors: Iterable[int] = (),
    rules: Rules | None = None,
) -> dict[str, Any]:
    """Return the claims of a staff token. It satisfies the issuer and audience of ``rules``."""
    claims: dict[str, Any] = {
        "sub": str(user),
        "tenant_id": tenant,
        "branch_ids": list(branches),
        "roles": list(roles),
    }
    if sectors := list(sectors):
        claims["sector_ids"] = sectors
    if rules is not None and rules.issuer is not None:
        claims["iss"] = rules.issuer
    if rules is not None and rules.audience is not None:
        claims["aud"] = rules.audience
    return claims


def table_claims(*, tenant: int, branch: int, table: int, session: int) -> dict[str, Any]:
    """Return the claims of a table token."""
    return {"tenant_id": tenant, "branch_id": branch, "table_id": table, "session_id": session}


def lifetime(now: float, life: float) -> dict[str, float]:
    """Return the claims ``iat`` and ``exp`` of a token that is valid for ``life`` seconds."""
    issued_at = int(now)
    return {"iat": issued_at, "exp": issued_at + life}


def signing_algorithm(algorithms: Sequence[str]) -> str | None:
    """Return the first of the algorithms that signs with a shared secret, if there is one."""
    return next((name for name in algorithms if name.startswith("HS")), None)


def mint(claims: Mapping[str, Any], secret: str, algorithm: str = "HS256") -> str:
    """Return a JWT with these claims, signed with a shared secret (RFC 7519)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # `serve` and `check` warn about a short secret
        return jwt.encode(dict(claims), secret, algorithm)


def mint_legacy_table_token(
    secret: str, *, tenant: int, branch: int, table: int, session: int, expires_at: int
) -> str:
    """Return a ``tenant:branch:table:session:expires_at:sig`` token; the time is unix seconds."""
    return sign_legacy(f"{tenant}:{branch}:{table}:{session}:{expires_at}", secret)


def sign_legacy(fields: str, secret: str) -> str:
    """Append the signature to the first five fields of a legacy table token."""
    return f"{fields}:{legacy_signature(fields, secret)}"
