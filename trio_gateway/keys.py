"""Keys: read public keys, find their algorithms, and recognise published secrets."""

import re
from pathlib import Path
from typing import Any

SIGNATURES = frozenset(
    {"RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"}
)
MIN_SECRET_BYTES = 32


def is_well_known(secret: str) -> bool:
    """Whether a secret contains the text of a published example."""
    return any(words in secret.lower() for words in _WELL_KNOWN)


_WELL_KNOWN = (
    "a-string-secret-at-least-256-bits-long", "your-256-bit-secret", "your-secret", "your_secret",
    "your-super-secret", "change-me", "changeme", "change_me", "change-this", "change-in-prod",
)  # fmt: skip


def algorithms_of(public_key: Any) -> frozenset[str]:
    """Return the algorithms that a public key supports (RFC 7518, 3.1; RFC 8037)."""
    from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa

    match public_key:
        case rsa.RSAPublicKey():
            return frozenset({"RS256", "RS384", "RS512", "PS256", "PS384", "PS512"})
        case ec.EllipticCurvePublicKey():
            curves = {"secp256r1": "ES256", "secp384r1": "ES384", "secp521r1": "ES512"}
            return frozenset({curves[name]} if (name := public_key.curve.name) in curves else ())
        case ed25519.Ed25519PublicKey() | ed448.Ed448PublicKey():
            return frozenset({"EdDSA"})
    return frozenset()


def public_keys(text: str) -> list[Any]:
    """Read PEM public keys, from the text itself or from the file of this path.

    Raises :exc:`ValueError`; its message contains nothing of the text.
    """
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        pem = text if "-----BEGIN" in text else Path(text).read_text(encoding="ascii")
        blocks = re.findall(r"-----BEGIN [^-]+-----.*?-----END [^-]+-----", pem, re.DOTALL)
        if not blocks:
            raise ValueError
        return [load_pem_public_key(block.replace("\\n", "\n").encode()) for block in blocks]
    except (OSError, ValueError):
        raise ValueError("is neither a PEM public key nor a file of one") from None
