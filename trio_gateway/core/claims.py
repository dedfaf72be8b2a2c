"""Claims: read those of a token, each with its type. An error names the claim and no value.

Every function that can fail raises :exc:`Rejected` as AUTH_FAILED.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from .audiences import UserId
from .close_codes import auth_failed
from .decimals import is_decimal
from .events import MAX_ID

MOST_DIGITS: Final = len(str(MAX_ID))


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """Requirements for a token besides its signature.

    ``leeway`` (seconds) is how far ``nbf`` and ``iat`` may be in the future, because the issuer's
    clock may be ahead of ours. ``exp`` is exact.
    """

    issuer: str | None = None
    audience: str | None = None
    leeway: float = 0.0


def decode_claims(payload: bytes) -> Mapping[str, Any]:
    """Return the claims that are the payload of a JWT (RFC 7519, 4)."""
    try:
        try:
            claims = msgspec.json.decode(payload)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            # Slower, but less strict: a claim that we do not read may be NaN, for example.
            claims = json.loads(payload)
    except (ValueError, RecursionError):
        raise auth_failed("token invalid") from None
    if not isinstance(claims, dict):
        raise auth_failed("token invalid")
    return claims


def refuse_refresh_token(claims: Mapping[str, Any]) -> None:
    """Raise if the backend issued this token only to get others."""
    if claims.get("type") == "refresh":
        raise auth_failed("a refresh token is not a credential here")


def times_of(claims: Mapping[str, Any], rules: Rules, now: float) -> tuple[float, float | None]:
    """Return when a token expires, and when it was issued, if it is valid now."""
    if (expires_at := _time(claims, "exp")) <= now:
        raise auth_failed("token expired")
    if claims.get("nbf") is not None and _time(claims, "nbf") - rules.leeway > now:
        raise auth_failed("token not valid yet")
    # A revocation by time is compared with iat: one in the far future would escape it.
    issued_at = None if claims.get("iat") is None else _time(claims, "iat")
    if issued_at is not None and issued_at - rules.leeway > now:
        raise auth_failed("iat is in the future")
    if rules.issuer not in (None, claims.get("iss")):
        raise auth_failed("iss is not ours")
    if not is_for_us(claims.get("aud"), rules):
        raise auth_failed("aud is not ours")
    return expires_at, issued_at


def is_for_us(audience: Any, rules: Rules) -> bool:
    """Whether ``aud`` names our audience, or need not (RFC 7519, 4.1.3)."""
    named = audience if isinstance(audience, list) else [audience]
    return rules.audience is None or rules.audience in named


def _time(claims: Mapping[str, Any], name: str) -> float:
    """A NumericDate (RFC 7519, 2): seconds since 1970."""
    value = claims.get(name)
    if type(value) is int:
        if abs(value) > MAX_ID:
            raise auth_failed(f"{name} out of range")
        return float(value)
    if type(value) is not float:
        raise auth_failed(f"{name} missing or not a number")
    if not math.isfinite(value):
        raise auth_failed(f"{name} out of range")
    return value


def _is_id(value: object) -> bool:
    return type(value) is int and 0 < value <= MAX_ID


def positive_of(claims: Mapping[str, Any], name: str) -> int:
    """Return an id, which is from 1 to 2**63 - 1."""
    value = claims.get(name)
    if not _is_id(value):
        raise auth_failed(f"{name} missing or not a positive integer")
    assert isinstance(value, int)
    return value


def ids_of(claims: Mapping[str, Any], name: str) -> list[int]:
    """Return a list of ids."""
    value = claims.get(name)
    if not isinstance(value, list) or not all(map(_is_id, value)):
        raise auth_failed(f"{name} missing or not a list of positive integers")
    return value


def strings_of(claims: Mapping[str, Any], name: str) -> list[str]:
    """Return a list of strings."""
    value = claims.get(name)
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise auth_failed(f"{name} missing or not a list of strings")
    return value


def user_of(claims: Mapping[str, Any]) -> UserId:
    """Return the user that ``sub`` names, in decimal digits."""
    value = claims.get("sub")
    if not isinstance(value, str) or not is_decimal(value, MOST_DIGITS):
        if isinstance(value, str) and is_decimal(value, len(value)):
            raise auth_failed(f"sub has more than {MOST_DIGITS} digits")
        raise auth_failed("sub missing or not a decimal string")
    return UserId(value)


def token_id_of(claims: Mapping[str, Any]) -> str | None:
    """Return ``jti``, which may be left out."""
    value = claims.get("jti")
    if value is None:
        return None
    if not isinstance(value, str) or not value or not _encodable(value):
        raise auth_failed("jti is not a string")
    return value


def _encodable(text: str) -> bool:
    """Whether this can be part of a Redis key: a lone surrogate cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
