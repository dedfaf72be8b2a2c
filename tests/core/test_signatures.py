"""Signatures: the algorithm is fixed per key, whatever a token says."""

from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from tests.support.signed_tokens import HS256, NOW, SECRET, STAFF, b64, refused, sign
from trio_gateway.core.claims import Rules
from trio_gateway.core.close_codes import Rejected
from trio_gateway.core.signatures import Key
from trio_gateway.core.tokens import read_jwt

RSA = rsa.generate_private_key(65537, 2048)
EC = ec.generate_private_key(ec.SECP256R1())
ED = ed25519.Ed25519PrivateKey.generate()
PRIVATE: dict[str, Any] = {"RS256": RSA, "ES256": EC, "EdDSA": ED}
PEM = RSA.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


@pytest.mark.parametrize("algorithm", PRIVATE)
def test_a_signature_is_checked_with_the_public_key(algorithm: str) -> None:
    token = jwt.encode(STAFF, PRIVATE[algorithm], algorithm)
    public = PRIVATE[algorithm].public_key()

    assert read_jwt(token, [Key(public, (algorithm,))], Rules(), NOW).user == "21"


@pytest.mark.parametrize("signed_as", PRIVATE)
@pytest.mark.parametrize("key_of", PRIVATE)
def test_a_token_for_another_kind_of_key_is_refused(signed_as: str, key_of: str) -> None:
    token = jwt.encode(STAFF, PRIVATE[signed_as], signed_as)
    keys = [Key(PRIVATE[key_of].public_key(), tuple(PRIVATE))]  # as JWT_ALGORITHMS has them
    if signed_as == key_of:
        assert read_jwt(token, keys, Rules(), NOW).user == "21"
        return
    with pytest.raises(Rejected) as caught:
        read_jwt(token, keys, Rules(), NOW)
    refused(caught, token)


PUBLIC = Key(RSA.public_key(), ("RS256",))


@pytest.mark.parametrize("secret", [PEM, PEM.strip(), PEM.replace(b"\n", b"\r\n")])
@pytest.mark.parametrize("keys", [[PUBLIC], [PUBLIC, *HS256], [*HS256, PUBLIC]])
def test_a_public_key_is_not_accepted_as_a_secret(secret: bytes, keys: list[Key]) -> None:
    token = sign(STAFF, secret)
    with pytest.raises(Rejected) as caught:
        read_jwt(token, keys, Rules(), NOW)
    refused(caught, token)


@pytest.mark.parametrize("alg", ["none", "None", "NONE", "", None, 0, [], ["HS256"], {}, "HS512",
                                 "HS384", "hs256", "RS256", "dir"])  # fmt: skip
def test_an_algorithm_outside_the_list_is_refused(alg: Any) -> None:
    signed = sign(STAFF, alg=alg)
    for token in (signed, signed[: signed.rindex(".") + 1]):
        with pytest.raises(Rejected) as caught:
            read_jwt(token, HS256, Rules(), NOW)
        refused(caught, token)


@pytest.mark.parametrize("alg", ["HS256", "HS512"])
def test_every_algorithm_on_the_list_is_admitted(alg: str) -> None:
    token = sign(STAFF, SECRET * 2, alg=alg)  # HS512 wants 64 bytes

    assert read_jwt(token, [Key(SECRET * 2, ("HS256", "HS512"))], Rules(), NOW).user == "21"


@pytest.mark.parametrize("header", [{"kid": 1}, {"crit": ["x"]}, {"b64": False}, {"alg": ...}])
def test_an_unsupported_header_is_refused(header: dict[str, Any]) -> None:
    if header == {"alg": ...}:
        _, claims, signature = sign(STAFF).split(".")
        token = f"{b64(b'{}')}.{claims}.{signature}"
    else:
        token = sign(STAFF, **header)
    with pytest.raises(Rejected) as caught:
        read_jwt(token, HS256, Rules(), NOW)
    refused(caught, token)


def test_tokens_of_the_previous_and_the_current_key_are_valid() -> None:
    old, new = Key("old" * 20, ("HS256",)), Key("new" * 20, ("HS256",))
    for secret in ("old" * 20, "new" * 20):
        assert read_jwt(sign(STAFF, secret), [new, old], Rules(), NOW).user == "21"

    with pytest.raises(Rejected, match="token invalid"):
        read_jwt(sign(STAFF, "other" * 20), [new, old], Rules(), NOW)


def test_without_keys_no_token_is_valid() -> None:
    with pytest.raises(Rejected, match="algorithm not allowed"):
        read_jwt(sign(STAFF), [], Rules(), NOW)


GOOD = sign(STAFF)
CLAIMS = GOOD.split(".")[1]


@pytest.mark.parametrize(
    "token",
    ["", ".", "..", "...", "a.b.c", GOOD + ".", GOOD[:-1], "." + GOOD, GOOD.upper(),
     GOOD.replace(".", ":"), f"Bearer {GOOD}", GOOD + "\n", GOOD + "ñ", GOOD + "\ud800",
     GOOD.replace(CLAIMS, CLAIMS[:-4] + "AAAA"), GOOD.replace(CLAIMS, ""),
     f"{b64(b'[]')}.{CLAIMS}.x", f"{b64(b'null')}.{CLAIMS}.x", f"{b64(b'[' * 3000)}.{CLAIMS}.x"],
)  # fmt: skip
def test_a_damaged_token_is_refused(token: str) -> None:
    with pytest.raises(Rejected) as caught:
        read_jwt(token, HS256, Rules(), NOW)
    refused(caught, token)
