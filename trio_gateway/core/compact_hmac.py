"""Prove a token valid quickly: a common header, a shared secret, the canonical encoding.

Most tokens begin with one of a few headers, so these are compared and not parsed. Whatever is not
proved here may still be valid: PyJWT decides.
"""

import base64
import binascii
import hmac
import json
from collections.abc import Callable, Container
from typing import Final

_HEADERS: Final = {
    base64.urlsafe_b64encode(json.dumps(header, separators=(",", ":")).encode()).rstrip(b"="): (
        f"HS{bits}",
        f"sha{bits}",
    )
    for bits in (256, 384, 512)
    for header in (
        {"alg": f"HS{bits}", "typ": "JWT"},
        {"typ": "JWT", "alg": f"HS{bits}"},
        {"alg": f"HS{bits}"},
    )
}
_STANDARD: Final = bytes.maketrans(b"-_", b"+/")


def proved_payload(
    token: bytes, algorithms: Container[str], secret_for: Callable[[str], bytes]
) -> bytes | None:
    """Return the payload of a token with a valid HMAC (RFC 7515, 3.1), or None if in doubt.

    ``secret_for`` returns the secret for an algorithm, and may raise what PyJWT raises for an
    invalid key.
    """
    signed, _, signature = token.rpartition(b".")
    header, _, payload = signed.partition(b".")
    found = _HEADERS.get(header)
    if found is None or found[0] not in algorithms:
        return None
    digest = hmac.digest(secret_for(found[0]), signed, found[1])
    expected = base64.urlsafe_b64encode(digest).rstrip(b"=")
    if not hmac.compare_digest(expected, signature):
        return None
    try:
        padding = b"=" * (-len(payload) % 4)
        return binascii.a2b_base64(payload.translate(_STANDARD) + padding, strict_mode=True)
    except binascii.Error:
        return None


def as_bytes(token: str) -> bytes:
    """Return the token in ASCII; empty if it is not, so that it is not proved."""
    try:
        return token.encode("ascii")
    except UnicodeEncodeError:
        return b""
