"""Tokens: read staff JWTs and table tokens, and say who the client is. Time is an argument."""

import hashlib
import hmac
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Annotated, Any, Final

import msgspec

from .audiences import (
    BranchId,
    Endpoint,
    Principal,
    SectorId,
    Sectors,
    SessionId,
    TableId,
    TenantId,
    UserId,
)
from .claims import (
    MOST_DIGITS,
    Rules,
    decode_claims,
    ids_of,
    is_for_us,
    positive_of,
    refuse_refresh_token,
    strings_of,
    times_of,
    token_id_of,
    user_of,
)
from .close_codes import Close, Rejected, auth_failed
from .decimals import is_decimal
from .events import MAX_ID
from .signatures import MAX_TOKEN_CHARACTERS, Key, claims_of, signed_payload

TABLE_TOKEN_LIFE: Final = 3 * 3600  # seconds from iat to exp, at most
_LEGACY_SIGNATURE: Final = 32  # hex digits
_LEGACY_COLONS: Final = 5  # of six fields
_FEW: Final = 8  # branches, roles or sectors of one token


def is_for_diners(token: str) -> bool:
    """Whether a token, valid or not, looks like a table token, legacy or not."""
    if token.count(":") == _LEGACY_COLONS:
        return True
    claims = claims_of(token)
    return claims is not None and "session_id" in claims


class Staff(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A valid staff token. Times are unix seconds."""

    tenant: TenantId
    user: UserId
    branches: frozenset[BranchId]
    roles: frozenset[str]
    expires_at: float
    sectors: frozenset[SectorId] = frozenset()
    issued_at: float | None = None
    token_id: str | None = None

    def on(self, endpoint: Endpoint) -> Principal:
        """Return the principal on this endpoint, or raise :exc:`Rejected` as FORBIDDEN."""
        if not self.roles & endpoint.roles:
            raise Rejected(Close.FORBIDDEN, "role not admitted here", "role")
        if not self.branches:
            raise Rejected(Close.FORBIDDEN, "no branch in the token", "branch")
        # Without a database the claimed sectors hold in every branch of the token.
        sectors: Sectors = {branch: self.sectors for branch in self.branches if self.sectors}
        return Principal(
            endpoint=endpoint,
            tenant=self.tenant,
            user=self.user,
            roles=self.roles,
            branches=self.branches,
            sectors=sectors,
            expires_at=self.expires_at,
            issued_at=self.issued_at,
            token_id=self.token_id,
        )


class Table(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A valid table token. Times are unix seconds."""

    tenant: TenantId
    branch: BranchId
    table: TableId
    session: SessionId
    expires_at: float
    issued_at: float | None = None
    token_id: str | None = None

    def on(self, endpoint: Endpoint) -> Principal:
        """Return the principal on this endpoint, which must be the diners'."""
        assert endpoint is Endpoint.DINER
        return Principal(
            endpoint=endpoint,
            tenant=self.tenant,
            session=self.session,
            table=self.table,
            branches=frozenset({self.branch}),
            expires_at=self.expires_at,
            issued_at=self.issued_at,
            token_id=self.token_id,
        )


def read_jwt(token: str, keys: Sequence[Key], rules: Rules, now: float) -> Staff:
    """Read a staff JWT, or raise :exc:`Rejected` as AUTH_FAILED (RFC 7519, RFC 8725).

    ``now`` is unix time in seconds. No error contains any part of the token.
    """
    payload = signed_payload(token, keys)
    return _usual_staff(payload, rules, now) or _staff(decode_claims(payload), rules, now)


def check_claims(token: str, rules: Rules, now: float) -> None:
    """Raise :exc:`Rejected` if this token cannot be valid, whoever signed it.

    It is damaged or has expired, or its claims are invalid.
    """
    if (claims := claims_of(token)) is None:
        raise auth_failed("token invalid")
    _staff(claims, rules, now)


_Id = Annotated[int, msgspec.Meta(gt=0, le=MAX_ID)]
_Time = Annotated[int, msgspec.Meta(ge=-MAX_ID, le=MAX_ID)] | float


class _UsualClaims(msgspec.Struct, gc=False):
    """The claims of a staff token, with their usual types."""

    sub: str
    tenant_id: _Id
    branch_ids: list[_Id]
    roles: list[str]
    exp: _Time
    sector_ids: list[_Id] | None = None
    iat: _Time | None = None
    nbf: _Time | None = None
    jti: str | None = None
    iss: Any = None
    aud: Any = None
    type: Any = None


_USUAL: Final = msgspec.json.Decoder(_UsualClaims)


def _usual_staff(payload: bytes, rules: Rules, now: float) -> Staff | None:
    """Read the usual kind of claims in a quarter of the time that :func:`_staff` needs.

    Returns None for all others: :func:`_staff` finds out what is wrong with them, if anything is.
    """
    if not payload.isascii():  # msgspec does not check the encoding of what it skips
        return None
    try:
        claims = _USUAL.decode(payload)
    except (msgspec.MsgspecError, RecursionError):
        return None
    if (
        claims.exp <= now
        or (claims.nbf is not None and claims.nbf - rules.leeway > now)
        or (claims.iat is not None and claims.iat - rules.leeway > now)
        or claims.type == "refresh"
        or claims.jti == ""
        or not is_decimal(claims.sub, MOST_DIGITS)
        or rules.issuer not in (None, claims.iss)
        or not is_for_us(claims.aud, rules)
    ):
        return None
    return Staff(
        user=UserId(claims.sub),
        tenant=TenantId(claims.tenant_id),
        branches=_set_of(claims.branch_ids),
        roles=_set_of(claims.roles),
        sectors=_set_of(claims.sector_ids or []),
        expires_at=float(claims.exp),
        issued_at=None if claims.iat is None else float(claims.iat),
        token_id=claims.jti,
    )


def _staff(claims: Mapping[str, Any], rules: Rules, now: float) -> Staff:
    refuse_refresh_token(claims)
    expires_at, issued_at = times_of(claims, rules, now)
    return Staff(
        user=user_of(claims),
        tenant=TenantId(positive_of(claims, "tenant_id")),
        branches=_set_of(ids_of(claims, "branch_ids")),
        roles=_set_of(strings_of(claims, "roles")),
        sectors=_set_of(
            ids_of(claims, "sector_ids") if claims.get("sector_ids") is not None else []
        ),
        expires_at=expires_at,
        issued_at=issued_at,
        token_id=token_id_of(claims),
    )


def _set_of(values: list[Any]) -> frozenset[Any]:
    """Return the values as a set: one for all tokens with the same few, as most have."""
    return _shared_set(*values) if len(values) <= _FEW else frozenset(values)


@lru_cache(maxsize=4096)
def _shared_set(*values: Any) -> frozenset[Any]:
    return frozenset(values)


def read_table_token(token: str, keys: Sequence[Key], rules: Rules, now: float) -> Table:
    """Read a table token, or raise :exc:`Rejected` as AUTH_FAILED."""
    claims = decode_claims(signed_payload(token, keys))
    refuse_refresh_token(claims)
    expires_at, issued_at = times_of(claims, Rules(leeway=rules.leeway), now)
    if issued_at is None:
        raise auth_failed("iat missing or not a number")
    if expires_at - issued_at > TABLE_TOKEN_LIFE:
        raise auth_failed("exp is more than 3 hours after iat")
    return Table(
        tenant=TenantId(positive_of(claims, "tenant_id")),
        branch=BranchId(positive_of(claims, "branch_id")),
        table=TableId(positive_of(claims, "table_id")),
        session=SessionId(positive_of(claims, "session_id")),
        expires_at=expires_at,
        issued_at=issued_at,
        token_id=token_id_of(claims),
    )


def read_legacy_table_token(token: str, secret: str, now: float) -> Table:
    """Read a ``tenant:branch:table:session:expires_at:sig`` token.

    Raises :exc:`Rejected` as AUTH_FAILED.
    """
    if len(token) > MAX_TOKEN_CHARACTERS:
        raise auth_failed("token too long")
    fields, _, signature = token.rpartition(":")
    expected = legacy_signature(fields, secret)
    if not hmac.compare_digest(
        expected.encode(), signature.encode("utf-8", errors="surrogatepass")
    ):
        raise auth_failed("token invalid")
    numbers = fields.split(":")
    if len(numbers) != 5 or not all(is_decimal(each, MOST_DIGITS) for each in numbers):
        raise auth_failed("token invalid")
    tenant, branch, table, session, expires_at = map(int, numbers)
    if not all(0 < number <= MAX_ID for number in (tenant, branch, table, session)):
        raise auth_failed("token invalid")
    if expires_at <= now:
        raise auth_failed("token expired")
    return Table(
        tenant=TenantId(tenant),
        branch=BranchId(branch),
        table=TableId(table),
        session=SessionId(session),
        expires_at=float(expires_at),
    )


def legacy_signature(fields: str, secret: str) -> str:
    """Return the first 32 lowercase hex digits of HMAC-SHA256 over the first five fields."""
    data = fields.encode("utf-8", errors="surrogatepass")
    return hmac.new(secret.encode(), data, hashlib.sha256).hexdigest()[:_LEGACY_SIGNATURE]
