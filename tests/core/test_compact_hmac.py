"""The quick proof of a token finds exactly what PyJWT finds."""

import base64
import hmac
import json
from typing import Any

import jwt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trio_gateway.core import signatures
from trio_gateway.core.claims import Rules
from trio_gateway.core.close_codes import Rejected
from trio_gateway.core.compact_hmac import as_bytes, proved_payload
from trio_gateway.core.signatures import Key
from trio_gateway.core.tokens import Staff, read_jwt

NOW = 1_000_000.0
SECRET = "staff-secret-of-at-least-32-bytes!"
STAFF = {"sub": "21", "tenant_id": 1, "branch_ids": [1], "roles": ["WAITER"], "exp": NOW + 60}
ALL = ("HS256", "HS384", "HS512")


def b64(data: bytes) -> bytes:
    return base64.urlsafe_b64encode(data).rstrip(b"=")


def signed(header: bytes, payload: bytes, secret: str = SECRET, digest: str = "sha256") -> str:
    data = b64(header) + b"." + b64(payload)
    return (data + b"." + b64(hmac.digest(secret.encode(), data, digest))).decode()


def secret_for(_algorithm: str) -> bytes:
    return SECRET.encode()


@pytest.mark.parametrize("algorithm", ALL)
@pytest.mark.parametrize("typ", ["JWT", None])
def test_token_made_by_pyjwt_is_proved(algorithm: str, typ: str | None) -> None:
    token = jwt.encode(STAFF, SECRET * 2, algorithm, headers={"typ": typ})
    found = proved_payload(as_bytes(token), ALL, lambda _: (SECRET * 2).encode())
    assert found is not None
    assert json.loads(found) == STAFF


def test_no_other_token_is_proved() -> None:
    header, payload = b'{"alg":"HS256","typ":"JWT"}', json.dumps(STAFF).encode()
    token = signed(header, payload)
    good, _, signature = token.rpartition(".")
    others = [
        f"{good}.{signature}=",  # not canonical
        f"{good}.{signature[:-1]}",
        f"{good}.",
        good,
        "",
        "é" + token,
        signed(header, payload, "another"),
        signed(b'{"alg":"none"}', payload),
        signed(b'{"alg":"HS256","crit":["x"]}', payload),
        signed(b'{"alg":"HS256","kid":"a"}', payload),
        signed(b'{"alg":"HS512","typ":"JWT"}', payload),
    ]
    assert proved_payload(as_bytes(token), ALL, secret_for) == payload
    assert [proved_payload(as_bytes(each), ALL, secret_for) for each in others] == [None] * 11
    assert proved_payload(as_bytes(token), ("HS512",), secret_for) is None


def outcome(token: str, secret: Any = SECRET, algorithms: tuple[str, ...] = ("HS256",)) -> object:
    try:
        return read_jwt(token, [Key(secret, algorithms)], Rules(), NOW)
    except Rejected as rejected:
        return type(rejected), rejected.text


PEM = "-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n"
SECRETS = [SECRET, "another" * 6, PEM, "", '{"kty":"oct"}']
payloads = st.binary(max_size=40) | st.dictionaries(
    st.sampled_from([*STAFF, "iat", "type", "x"]), st.none() | st.integers() | st.text(max_size=5)
).map(lambda changes: json.dumps({**STAFF, **changes}).encode())


@given(payloads, st.sampled_from(SECRETS))
def test_known_header_makes_no_difference(payload: bytes, secret: str) -> None:
    """A space in the header is all that makes PyJWT read a token."""
    known = signed(b'{"alg":"HS256","typ":"JWT"}', payload, secret)
    unknown = signed(b'{"alg":"HS256", "typ":"JWT"}', payload, secret)

    assert outcome(known, secret) == outcome(unknown, secret)
    assert outcome(known) == outcome(unknown)
    assert outcome(known, secret, ("RS256",)) == outcome(unknown, secret, ("RS256",))


def test_proved_token_is_not_decoded_by_pyjwt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signatures._JWS, "decode_complete", None)
    found = outcome(signed(b'{"typ":"JWT","alg":"HS256"}', json.dumps(STAFF).encode()))
    assert isinstance(found, Staff)
    assert found.user == "21"
