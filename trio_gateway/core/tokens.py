"""Tokens: read staff JWTs and table tokens. Time is an argument."""

import hashlib
import hmac
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Annotated, Any, Final

import jwt
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
from .close_codes import Close, Rejected
from .compact_hmac import as_bytes, proved_payload
from .decimals import is_decimal
from .events import MAX_ID

MAX_TOKEN_CHARACTERS: Final = 8192


class _Hmac(jwt.algorithms.HMACAlgorithm):
    """Checks each secret only once for being a key of another kind.

    PyJWT does it for every token, which costs as much as the rest of the verification.
    """

    def __init__(self, hash_algorithm: Any) -> None:
        super().__init__(hash_algorithm)
        self.prepare_key = lru_cache(maxsize=8)(super().prepare_key)  # type: ignore[method-assign]


def _verifier() -> jwt.api_jws.PyJWS:
    verifier = jwt.api_jws.PyJWS()
    for bits in (256, 384, 512):
        verifier.unregister_algorithm(f"HS{bits}")
        verifier.register_algorithm(f"HS{bits}", _Hmac(getattr(hashlib, f"sha{bits}")))
    return verifier


_JWS: Final = _verifier()  # making one costs as much as verifying
TABLE_TOKEN_LIFE: Final = 3 * 3600  # seconds from iat to exp, at most
_LEGACY_SIGNATURE: Final = 32  # hex digits
_LEGACY_COLONS: Final = 5  # of six fields
_FEW: Final = 8  # branches, roles or sectors of one token
_MOST_DIGITS: Final = len(str(MAX_ID))


@dataclass(frozen=True, slots=True)
class Key:
    """A key and the algorithms it may be used with, which are never taken from the token."""

    value: Any  # a secret, or a public key object of cryptography
    algorithms: tuple[str, ...]
    id: str | None = None  # its id in a key set; a token with another id is not verified with it


def names_of(token: str) -> tuple[str | None, str | None]:
    """Return the algorithm and the key id of a token's header, if any. Not verified."""
    try:
        header = jwt.get_unverified_header(token)
    except (jwt.PyJWTError, ValueError, RecursionError):
        return None, None
    algorithm, key = header.get("alg"), header.get("kid")
    return algorithm if isinstance(algorithm, str) else None, key if isinstance(key, str) else None


def claims_of(token: str) -> Mapping[str, Any] | None:
    """Return the claims of a JWT, not verified: use them only to explain what is wrong."""
    try:
        claims = json.loads(
            _JWS.decode_complete(token, options={"verify_signature": False})["payload"]
        )
    except (jwt.PyJWTError, ValueError, RecursionError):
        return None
    return claims if isinstance(claims, dict) else None


def is_for_diners(token: str) -> bool:
    """Whether a token, valid or not, looks like a table token, legacy or not."""
    if token.count(":") == _LEGACY_COLONS:
        return True
    claims = claims_of(token)
    return claims is not None and "session_id" in claims


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """Requirements for a token besides its signature.

    ``leeway`` (seconds) is how far ``nbf`` and ``iat`` may be in the future, because the issuer's
    clock may be ahead of ours. ``exp`` is exact.
    """

    issuer: str | None = None
    audience: str | None = None
    leeway: float = 0.0


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
    payload = _verified(token, keys)
    return _usual_staff(payload, rules, now) or _staff(_claims(payload), rules, now)


def check_claims(token: str, rules: Rules, now: float) -> None:
    """Raise :exc:`Rejected` if this token cannot be valid, whoever signed it.

    It is damaged or has expired, or its claims are invalid.
    """
    if (claims := claims_of(token)) is None:
        raise _failed("token invalid")
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
        or not is_decimal(claims.sub, _MOST_DIGITS)
        or rules.issuer not in (None, claims.iss)
        or not _is_for_us(claims.aud, rules)
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
    _refuse_refresh_token(claims)
    expires_at, issued_at = _times(claims, rules, now)
    return Staff(
        user=_user(claims),
        tenant=TenantId(_positive(claims, "tenant_id")),
        branches=_set_of(_ids(claims, "branch_ids")),
        roles=_set_of(_strings(claims, "roles")),
        sectors=_set_of(_ids(claims, "sector_ids") if claims.get("sector_ids") is not None else []),
        expires_at=expires_at,
        issued_at=issued_at,
        token_id=_token_id(claims),
    )


def _set_of(values: list[Any]) -> frozenset[Any]:
    """Return the values as a set: one for all tokens with the same few, as most have."""
    return _shared_set(*values) if len(values) <= _FEW else frozenset(values)


@lru_cache(maxsize=4096)
def _shared_set(*values: Any) -> frozenset[Any]:
    return frozenset(values)


def read_table_token(token: str, keys: Sequence[Key], rules: Rules, now: float) -> Table:
    """Read a table token, or raise :exc:`Rejected` as AUTH_FAILED."""
    claims = _claims(_verified(token, keys))
    _refuse_refresh_token(claims)
    expires_at, issued_at = _times(claims, Rules(leeway=rules.leeway), now)
    if issued_at is None:
        raise _failed("iat missing or not a number")
    if expires_at - issued_at > TABLE_TOKEN_LIFE:
        raise _failed("exp is more than 3 hours after iat")
    return Table(
        tenant=TenantId(_positive(claims, "tenant_id")),
        branch=BranchId(_positive(claims, "branch_id")),
        table=TableId(_positive(claims, "table_id")),
        session=SessionId(_positive(claims, "session_id")),
        expires_at=expires_at,
        issued_at=issued_at,
        token_id=_token_id(claims),
    )


def read_legacy_table_token(token: str, secret: str, now: float) -> Table:
    """Read a ``tenant:branch:table:session:expires_at:sig`` token.

    Raises :exc:`Rejected` as AUTH_FAILED.
    """
    if len(token) > MAX_TOKEN_CHARACTERS:
        raise _failed("token too long")
    fields, _, signature = token.rpartition(":")
    expected = legacy_signature(fields, secret)
    if not hmac.compare_digest(
        expected.encode(), signature.encode("utf-8", errors="surrogatepass")
    ):
        raise _failed("token invalid")
    numbers = fields.split(":")
    if len(numbers) != 5 or not all(is_decimal(each, _MOST_DIGITS) for each in numbers):
        raise _failed("token invalid")
    tenant, branch, table, session, expires_at = map(int, numbers)
    if not all(0 < number <= MAX_ID for number in (tenant, branch, table, session)):
        raise _failed("token invalid")
    if expires_at <= now:
        raise _failed("token expired")
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


class Unverified(Rejected):
    """None of the known keys signed this token; a key that is not known yet may have."""

    def __init__(self, text: str) -> None:
        super().__init__(Close.AUTH_FAILED, text, "auth")


def _failed(text: str) -> Rejected:
    return Rejected(Close.AUTH_FAILED, text, "auth")


def _verified(token: str, keys: Sequence[Key]) -> bytes:
    """Return the payload of a token that one of the keys signed, or raise :exc:`Unverified`.

    PyJWT does not check the claims: it is lenient with types, and has been with ``iss``.
    """
    if len(token) > MAX_TOKEN_CHARACTERS:
        raise _failed("token too long")
    allowed = signed_by_another = False
    data = as_bytes(token)
    for key in keys:
        try:
            payload = proved_payload(data, key.algorithms, partial(_secret, key))
            if payload is not None:
                return payload
            found = _JWS.decode_complete(token, key.value, algorithms=list(key.algorithms))
        except jwt.InvalidAlgorithmError:
            continue
        except (jwt.PyJWTError, ValueError, TypeError, RecursionError):
            allowed = True  # TypeError: the algorithm is allowed, but for another kind of key
            continue
        named = found["header"].get("kid")
        if key.id is None or named is None or key.id == named:
            signed: bytes = found["payload"]
            return signed
        signed_by_another = any(each.id == named for each in keys)
    if signed_by_another:
        raise _failed("token names a key that did not sign it")
    raise Unverified("token invalid" if allowed else "token algorithm not allowed")


def _secret(key: Key, algorithm: str) -> bytes:
    secret: bytes = _JWS.get_algorithm_by_name(algorithm).prepare_key(key.value)
    return secret


def _claims(payload: bytes) -> Mapping[str, Any]:
    try:
        try:
            claims = msgspec.json.decode(payload)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            # Slower, but less strict: a claim that we do not read may be NaN, for example.
            claims = json.loads(payload)
    except (ValueError, RecursionError):
        raise _failed("token invalid") from None
    if not isinstance(claims, dict):
        raise _failed("token invalid")
    return claims


def _refuse_refresh_token(claims: Mapping[str, Any]) -> None:
    if claims.get("type") == "refresh":
        raise _failed("a refresh token is no credential here")


def _times(claims: Mapping[str, Any], rules: Rules, now: float) -> tuple[float, float | None]:
    """Return when a token expires, and when it was issued, if it is valid now."""
    if (expires_at := _time(claims, "exp")) <= now:
        raise _failed("token expired")
    if claims.get("nbf") is not None and _time(claims, "nbf") - rules.leeway > now:
        raise _failed("token not valid yet")
    # A revocation by time is compared with iat: one in the far future would escape it.
    issued_at = None if claims.get("iat") is None else _time(claims, "iat")
    if issued_at is not None and issued_at - rules.leeway > now:
        raise _failed("iat is in the future")
    if rules.issuer not in (None, claims.get("iss")):
        raise _failed("iss is not ours")
    if not _is_for_us(claims.get("aud"), rules):
        raise _failed("aud is not ours")
    return expires_at, issued_at


def _is_for_us(audience: Any, rules: Rules) -> bool:
    """Whether ``aud`` names our audience, or need not (RFC 7519, 4.1.3)."""
    named = audience if isinstance(audience, list) else [audience]
    return rules.audience is None or rules.audience in named


def _time(claims: Mapping[str, Any], name: str) -> float:
    """A NumericDate (RFC 7519, 2): seconds since 1970."""
    value = claims.get(name)
    if type(value) is int:
        if abs(value) > MAX_ID:
            raise _failed(f"{name} out of range")
        return float(value)
    if type(value) is not float:
        raise _failed(f"{name} missing or not a number")
    if not math.isfinite(value):
        raise _failed(f"{name} out of range")
    return value


def _is_id(value: object) -> bool:
    return type(value) is int and 0 < value <= MAX_ID


def _positive(claims: Mapping[str, Any], name: str) -> int:
    value = claims.get(name)
    if not _is_id(value):
        raise _failed(f"{name} missing or not a positive integer")
    assert isinstance(value, int)
    return value


def _ids(claims: Mapping[str, Any], name: str) -> list[int]:
    value = claims.get(name)
    if not isinstance(value, list) or not all(map(_is_id, value)):
        raise _failed(f"{name} missing or not a list of positive integers")
    return value


def _strings(claims: Mapping[str, Any], name: str) -> list[str]:
    value = claims.get(name)
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise _failed(f"{name} missing or not a list of strings")
    return value


def _user(claims: Mapping[str, Any]) -> UserId:
    value = claims.get("sub")
    if not isinstance(value, str) or not is_decimal(value, _MOST_DIGITS):
        if isinstance(value, str) and is_decimal(value, len(value)):
            raise _failed(f"sub has more than {_MOST_DIGITS} digits")
        raise _failed("sub missing or not a decimal string")
    return UserId(value)


def _token_id(claims: Mapping[str, Any]) -> str | None:
    value = claims.get("jti")
    if value is None:
        return None
    if not isinstance(value, str) or not value or not _encodable(value):
        raise _failed("jti is not a string")
    return value


def _encodable(text: str) -> bool:
    """Whether this can be part of a Redis key: a lone surrogate cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
