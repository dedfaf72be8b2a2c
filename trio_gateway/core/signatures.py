"""Signatures: find out whether one of our keys signed a JWT (RFC 7515).

What is read without a key (:func:`names_of`, :func:`claims_of`) proves nothing.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Final

import jwt

from .close_codes import Close, Rejected, auth_failed
from .compact_hmac import as_bytes, proved_payload

MAX_TOKEN_CHARACTERS: Final = 8192


@dataclass(frozen=True, slots=True)
class Key:
    """A key and the algorithms it may be used with, which are never taken from the token."""

    value: Any  # a secret, or a public key object of cryptography
    algorithms: tuple[str, ...]
    id: str | None = None  # its id in a key set; a token with another id is not verified with it


class Unverified(Rejected):
    """None of the known keys signed this token; a key that is not known yet may have."""

    def __init__(self, text: str) -> None:
        super().__init__(Close.AUTH_FAILED, text, "auth")


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


def signed_payload(token: str, keys: Sequence[Key]) -> bytes:
    """Return the payload of a token that one of the keys signed, or raise :exc:`Unverified`.

    PyJWT does not check the claims: it is lenient with types, and has been with ``iss``.
    """
    if len(token) > MAX_TOKEN_CHARACTERS:
        raise auth_failed("token too long")
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
        raise auth_failed("token names a key that did not sign it")
    raise Unverified("token invalid" if allowed else "token algorithm not allowed")


def _secret(key: Key, algorithm: str) -> bytes:
    secret: bytes = _JWS.get_algorithm_by_name(algorithm).prepare_key(key.value)
    return secret
