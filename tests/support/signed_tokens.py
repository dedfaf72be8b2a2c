"""Tokens signed by hand, so that they may be anything, and what is said of those refused."""

import base64
import hashlib
import hmac
import json
import traceback
from typing import Any

import pytest

from trio_gateway.core.close_codes import Close, Rejected
from trio_gateway.core.signatures import Key

NOW = 1_000_000.0
SECRET = "staff-secret-of-at-least-32-bytes!"
TABLE_SECRET = "table-secret-of-at-least-32-bytes!"
HS256 = (Key(SECRET, ("HS256",)),)
TABLE_KEYS = (Key(TABLE_SECRET, ("HS256",)),)
STAFF: dict[str, Any] = {
    "sub": "21", "tenant_id": 1, "branch_ids": [1, 2], "roles": ["WAITER"],
    "iat": NOW - 60, "exp": NOW + 60,
}  # fmt: skip
TABLE: dict[str, Any] = {
    "tenant_id": 1, "branch_id": 2, "table_id": 10, "session_id": 456,
    "iat": NOW - 60, "exp": NOW + 60,
}  # fmt: skip


def b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def sign(claims: Any, secret: str | bytes = SECRET, **header: Any) -> str:
    """A token by hand, so that it may be anything; a claim set to ``...`` is left out."""
    if isinstance(claims, dict):
        claims = json.dumps({k: v for k, v in claims.items() if v is not ...}).encode()
    head = json.dumps({"alg": "HS256", "typ": "JWT"} | header).encode()
    signed = f"{b64(head)}.{b64(claims)}"
    key = secret.encode() if isinstance(secret, str) else secret
    digest = {"HS512": hashlib.sha512, "HS384": hashlib.sha384}.get(
        str(header.get("alg")), hashlib.sha256
    )
    return f"{signed}.{b64(hmac.new(key, signed.encode(), digest).digest())}"


def refused(caught: pytest.ExceptionInfo[Rejected], token: str = "") -> str:
    """The text of a refusal as AUTH_FAILED, once it is sure to hold no part of the token."""
    error = caught.value
    assert (error.close, error.label) == (Close.AUTH_FAILED, "auth")
    shown = error.text + "".join(traceback.format_exception_only(error)) + repr(error.__cause__)
    parts = {token[i : i + 8] for i in range(len(token) - 7)}
    assert not any(part in shown and part not in "token invalid" for part in parts)
    return error.text
