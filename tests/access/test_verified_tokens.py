"""Tokens that were verified are not verified again, for as long as they are valid."""

import gc
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from trio_gateway.access import auth
from trio_gateway.access.auth import JwtAuth, TableAuth
from trio_gateway.access.verified_tokens import VerifiedTokens
from trio_gateway.core.audiences import Endpoint
from trio_gateway.core.claims import Rules
from trio_gateway.core.close_codes import Close, Rejected
from trio_gateway.core.signatures import Key
from trio_gateway.core.tokens import Staff, read_jwt

SECRET = "secret-of-at-least-32-bytes-for-all!"
KEYS = (Key(SECRET, ("HS256",)),)
STAFF: dict[str, Any] = {"sub": "21", "tenant_id": 1, "branch_ids": [1], "roles": ["WAITER"]}
TABLE = {"tenant_id": 1, "branch_id": 1, "table_id": 1, "session_id": 1, "iat": 1000}


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


class Reads:
    """Counts how often a token is read."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        self.count, read = 0, getattr(auth, name)

        def counted(*arguments: Any) -> Any:
            self.count += 1
            return read(*arguments)

        monkeypatch.setattr(auth, name, counted)


def staff(**claims: Any) -> str:
    return jwt.encode({**STAFF, "exp": 2000, **claims}, SECRET)


async def test_a_staff_token_is_verified_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, reads = Clock(), Reads(monkeypatch, "read_jwt")
    method, token = JwtAuth(KEYS, Rules(), clock), staff(roles=["MANAGER"], jti="a")
    first = await method.authenticate(token, Endpoint.WAITER)
    clock.now = 1999.9

    assert await method.authenticate(token, Endpoint.WAITER) == first
    assert (await method.authenticate(token, Endpoint.ADMIN)).endpoint is Endpoint.ADMIN
    assert reads.count == 1
    await method.authenticate(staff(jti="b"), Endpoint.WAITER)
    assert reads.count == 2


async def test_so_is_a_table_token(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, reads = Clock(), Reads(monkeypatch, "read_table_token")
    method, token = TableAuth(KEYS, Rules(), clock), jwt.encode({**TABLE, "exp": 2000}, SECRET)
    found = [await method.authenticate(token, Endpoint.DINER) for _ in range(3)]
    assert found == [found[0]] * 3
    assert reads.count == 1

    clock.now = 2000.0
    with pytest.raises(Rejected, match="token expired"):
        await method.authenticate(token, Endpoint.DINER)


async def test_a_role_that_is_not_admitted_stays_so() -> None:
    method, token = JwtAuth(KEYS, Rules(), Clock()), staff()
    await method.authenticate(token, Endpoint.WAITER)
    for _ in range(2):
        with pytest.raises(Rejected) as rejected:
            await method.authenticate(token, Endpoint.ADMIN)
        assert rejected.value.close is Close.FORBIDDEN


@pytest.mark.parametrize(
    ("now", "text"),
    [(2000.0, "token expired"), (989.9, "token not valid yet")],
    ids=["exp", "the clock was set back"],
)
async def test_the_times_of_a_token_that_was_valid_still_count(now: float, text: str) -> None:
    clock = Clock()
    method, token = JwtAuth(KEYS, Rules(leeway=10), clock), staff(nbf=1000)
    await method.authenticate(token, Endpoint.WAITER)
    clock.now = now

    with pytest.raises(Rejected, match=text):
        await method.authenticate(token, Endpoint.WAITER)


class KeySet:
    """As of an issuer, without a fetch."""

    successes = 1

    def __init__(self) -> None:
        self.private = ec.generate_private_key(ec.SECP256R1())
        self.keys: tuple[Key, ...] = (Key(self.private.public_key(), ("ES256",)),)

    async def keys_for(self, _algorithm: str | None) -> tuple[Key, ...]:
        return self.keys

    async def look_up(self, *_: object) -> tuple[Key, ...]:
        return self.keys


async def test_a_token_whose_key_was_taken_out_of_the_key_set_is_invalid() -> None:
    keys: Any = KeySet()
    method = JwtAuth((), Rules(), Clock(), keys)
    token = jwt.encode({**STAFF, "exp": 2000}, keys.private, "ES256")
    for _ in range(2):
        assert (await method.authenticate(token, Endpoint.WAITER)).user == "21"

    keys.keys = KeySet().keys
    with pytest.raises(Rejected) as rejected:
        await method.authenticate(token, Endpoint.WAITER)
    assert rejected.value.close is Close.AUTH_FAILED


def test_they_are_bounded_and_hold_no_token() -> None:
    remembered: VerifiedTokens[Staff] = VerifiedTokens(most=3)
    tokens = [staff(jti=str(n)) for n in range(5)]
    for token in tokens:
        remembered.add(remembered.key_of(token), read_jwt(token, KEYS, Rules(), 1000.0))

    assert len(remembered) == 3
    assert [remembered.get(remembered.key_of(each), 1000.0) is not None for each in tokens] == [
        False, False, True, True, True,
    ]  # fmt: skip
    assert not any(isinstance(each, str) for each in gc.get_referents(remembered._found))


def test_one_that_was_verified_with_keys_of_before_is_not_remembered() -> None:
    remembered: VerifiedTokens[Staff] = VerifiedTokens()
    before, after, token = object(), object(), staff()
    key = remembered.key_of(token)
    found = read_jwt(token, KEYS, Rules(), 1000.0)
    for keys in (before, after):
        assert remembered.get(key, 1000.0, keys) is None
    remembered.add(key, found, before)  # it took a while
    assert remembered.get(key, 1000.0, after) is None
    remembered.add(key, found, after)
    assert remembered.get(key, 1000.0, after) is found


def test_two_processes_have_different_hashes() -> None:
    assert VerifiedTokens[Staff]().key_of("a") != VerifiedTokens[Staff]().key_of("a")
