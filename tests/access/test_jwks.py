"""Key sets at a URL that answers, hangs, sends slowly, sends garbage or is unreachable."""

import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final

import jwt
import pytest
import trio
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm
from structlog.testing import capture_logs
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.support.gateways import (
    TABLE_SECRET,
    Transport,
    admitted,
    closed,
    connect,
    free_port,
    http,
    make_settings,
    received,
    running,
    until,
)
from tests.support.stopwatch import Stopwatch
from trio_gateway.access import jwks
from trio_gateway.access.auth import JwtAuth
from trio_gateway.access.jwks import KeySet
from trio_gateway.core.audiences import Endpoint
from trio_gateway.core.claims import Rules
from trio_gateway.core.close_codes import Close, Rejected
from trio_gateway.testing import make_table_token

SIGNATURES: Final = ("RS256", "PS256", "ES256", "ES384", "EdDSA")
PRIVATE: Final[dict[str, Any]] = {
    "RS256": rsa.generate_private_key(65537, 2048),
    "ES256": ec.generate_private_key(ec.SECP256R1()),
    "EdDSA": ed25519.Ed25519PrivateKey.generate(),
}
OCT: Final = {"kty": "oct", "kid": "shared", "k": "c2VjcmV0" * 8}


def jwk(algorithm: str, kid: str | None = None, **changes: Any) -> dict[str, Any]:
    """The public key of an algorithm as a JWK, whose id is the algorithm."""
    public = PRIVATE[algorithm].public_key()
    kind: Any = {"RS256": RSAAlgorithm, "ES256": ECAlgorithm, "EdDSA": OKPAlgorithm}[algorithm]
    return {**kind.to_jwk(public, as_dict=True), "kid": kid or algorithm} | changes


def key_set(*keys: Any) -> bytes:
    return json.dumps({"keys": keys}).encode()


def signed(algorithm: str, *, by: str | None = None, kid: str | None = None, **claims: Any) -> str:
    """A waiter's token, signed with the key named ``by``, by default the algorithm's key."""
    found = {
        "sub": "21", "tenant_id": 1, "branch_ids": [1], "roles": ["WAITER"],
        "exp": time.time() + 600,
    } | claims  # fmt: skip
    headers = {} if kid is None else {"kid": kid}
    return jwt.encode(found, PRIVATE[by or algorithm], algorithm, headers=headers)


class Issuer:
    """The issuer of the tokens: a web server in a thread, with the failures it is given."""

    def __init__(self, port: int, body: bytes) -> None:
        self.url = f"http://127.0.0.1:{port}/jwks.json"
        self.body = body
        self.status = 200
        self.requests = 0
        self.answers = threading.Event()  # cleared: it takes the request and says nothing
        self.answers.set()
        self.raw: bytes | None = None  # said instead of a response
        self.drips = False


@contextmanager
def issuing(body: bytes, port: int = 0) -> Iterator[Issuer]:
    told = Issuer(port, body)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            told.requests += 1
            told.answers.wait(10)
            try:
                if told.raw is not None:
                    self.wfile.write(told.raw)
                    return
                self.send_response(told.status)
                self.end_headers()
                while told.drips:
                    self.wfile.write(b" ")
                    time.sleep(0.02)
                self.wfile.write(told.body)
            except OSError:
                pass

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    told.url = f"http://127.0.0.1:{server.server_port}/jwks.json"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield told
    finally:
        told.answers.set()
        told.drips = False
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def issuer() -> Iterator[Issuer]:
    with issuing(key_set(*map(jwk, PRIVATE))) as found:
        yield found


async def is_good(keys: KeySet, token: str) -> bool:
    """Whether the token is valid by the key set; raises if the key set is unavailable."""
    auth = JwtAuth((), Rules(), time.time, keys)
    try:
        await auth.authenticate(token, Endpoint.WAITER)
    except Rejected as rejected:
        if rejected.close is not Close.AUTH_FAILED:
            raise
        return False
    return True


async def unavailable(keys: KeySet, token: str) -> bool:
    try:
        await is_good(keys, token)
    except Rejected as rejected:
        return rejected.close is Close.SERVER_OVERLOADED
    return False


# Which keys


async def test_token_of_each_kind_of_key_is_valid(issuer: Issuer) -> None:
    keys = KeySet(issuer.url, SIGNATURES)
    for algorithm in PRIVATE:
        assert await is_good(keys, signed(algorithm, kid=algorithm))
        assert await is_good(keys, signed(algorithm))  # one that names no key
    assert issuer.requests == 1


async def test_token_with_the_id_of_another_key_is_invalid(issuer: Issuer) -> None:
    other = rsa.generate_private_key(65537, 2048)
    listed = RSAAlgorithm.to_jwk(other.public_key(), as_dict=True) | {"kid": "other"}
    issuer.body = key_set(jwk("RS256"), listed)
    keys = KeySet(issuer.url, SIGNATURES)
    assert await is_good(keys, signed("RS256", kid="RS256"))
    assert not await is_good(keys, signed("RS256", kid="other"))
    assert issuer.requests == 1


async def test_symmetric_key_in_the_set_is_ignored(issuer: Issuer) -> None:
    """Everybody who can read the set could sign with it."""
    issuer.body = key_set(OCT, jwk("ES256"))
    keys = KeySet(issuer.url, ("HS256", *SIGNATURES))
    secret = jwt.utils.base64url_decode(OCT["k"])
    claims = jwt.decode(signed("ES256"), options={"verify_signature": False})
    for kid in ("shared", "ES256"):
        assert not await is_good(keys, jwt.encode(claims, secret, "HS256", headers={"kid": kid}))
    assert await is_good(keys, signed("ES256", kid="ES256"))
    assert keys.keys is not None
    assert [key.id for key in keys.keys] == ["ES256"]


@pytest.mark.parametrize(
    ("changes", "good"),
    [
        ({}, True),
        ({"use": "sig"}, True),
        ({"use": "enc"}, False),
        ({"alg": "RS256"}, True),
        ({"alg": None}, True),
        ({"alg": "PS256"}, False),
        ({"alg": "RSA-OAEP"}, False),
    ],
)
async def test_key_is_used_only_for_its_declared_purpose(
    issuer: Issuer, changes: dict[str, Any], good: bool
) -> None:
    issuer.body = key_set(jwk("RS256", **changes), jwk("ES256"))
    keys = KeySet(issuer.url, SIGNATURES)
    assert await is_good(keys, signed("RS256", kid="RS256")) is good


async def test_key_is_used_with_the_configured_algorithms_only(issuer: Issuer) -> None:
    keys = KeySet(issuer.url, ("ES256",))
    assert await is_good(keys, signed("ES256", kid="ES256"))
    assert not await is_good(keys, signed("RS256", kid="RS256"))
    assert not await is_good(keys, signed("EdDSA", kid="EdDSA"))
    assert issuer.requests == 1


@pytest.mark.parametrize(
    "broken",
    [
        None, 1, "RS256", [], {}, {"kty": "RSA"}, {"kty": "RSA", "n": "?", "e": "AQAB"},
        {"kty": "oct"}, {"kty": ["RSA"]}, {"kty": "EC", "crv": "P-256", "x": "AA", "y": "AA"},
        {"kty": "EC", "crv": ["P-256"]}, {"kty": "OKP", "crv": "Ed25519", "x": 5},
        jwk("RS256", alg=["RS256"]), jwk("RS256", alg={}), {**jwk("RS256"), "n": None},
    ],
)  # fmt: skip
async def test_malformed_key_does_not_affect_others(issuer: Issuer, broken: Any) -> None:
    issuer.body = key_set(broken, jwk("ES256"), broken)
    assert await is_good(KeySet(issuer.url, SIGNATURES), signed("ES256", kid="ES256"))


# How often


async def test_new_key_is_looked_up_once_a_minute_before_its_token_is_invalid(
    issuer: Issuer, mock_clock: MockClock
) -> None:
    issuer.body = key_set(jwk("RS256"))
    keys = KeySet(issuer.url, SIGNATURES)
    assert await is_good(keys, signed("RS256", kid="RS256"))
    issuer.body = key_set(jwk("ES256"))
    mock_clock.jump(59)
    assert await unavailable(keys, signed("ES256", kid="ES256"))
    assert issuer.requests == 1
    mock_clock.jump(1)
    assert await is_good(keys, signed("ES256", kid="ES256"))
    assert await unavailable(keys, old := signed("RS256", kid="RS256"))  # which is gone
    assert issuer.requests == 2
    mock_clock.jump(60)
    assert not await is_good(keys, old)


async def test_invented_key_ids_cost_one_fetch_a_minute(
    issuer: Issuer, mock_clock: MockClock
) -> None:
    keys = KeySet(issuer.url, SIGNATURES)
    token = signed("RS256", kid="RS256")
    made_up = [signed("RS256", by="RS256", kid=f"made up {n}") for n in range(300)]
    for minute in range(3):
        outcomes = Counter([await unavailable(keys, each) for each in made_up])
        assert outcomes == ({True: 299, False: 1} if not minute else {False: 300})
        assert await is_good(keys, token)
        assert issuer.requests == min(minute + 1, 2)
        mock_clock.jump(60)


async def test_unauthenticated_client_cannot_use_up_the_fetch_that_a_new_key_needs(
    issuer: Issuer, mock_clock: MockClock
) -> None:
    """Knowing the next key's id does not help, either."""
    issuer.body = key_set(jwk("RS256"))
    keys = KeySet(issuer.url, SIGNATURES)
    assert not await is_good(keys, signed("RS256", kid="ES256"))
    issuer.body = key_set(jwk("RS256"), jwk("ES256"))
    mock_clock.jump(10)
    token = signed("ES256", kid="ES256")
    assert await unavailable(keys, token)
    mock_clock.jump(50)
    assert not await is_good(keys, signed("RS256", kid="made up"))  # its fetch is everybody's
    assert await is_good(keys, token)
    assert issuer.requests == 2


@pytest.mark.parametrize("kid", ["key", None])
async def test_key_that_changes_without_a_new_id_is_looked_up(
    issuer: Issuer, mock_clock: MockClock, kid: str | None
) -> None:
    issuer.body = key_set(jwk("RS256", kid="key"))
    keys = KeySet(issuer.url, SIGNATURES)
    assert not await is_good(keys, signed("RS256", kid="made up"))
    assert await is_good(keys, signed("RS256", kid=kid))
    issuer.body = key_set(jwk("ES256", kid="key"))
    assert await is_good(keys, signed("ES256", kid=kid))
    assert not await is_good(keys, signed("RS256", kid=kid))
    issuer.body = key_set(jwk("EdDSA", kid="key"))
    issuer.status = 503
    assert await unavailable(keys, token := signed("EdDSA", kid=kid))
    issuer.status = 200
    assert await unavailable(keys, token)  # it is not asked again at once
    mock_clock.jump(jwks.TIMEOUT)
    assert await is_good(keys, token)
    assert issuer.requests == 5


async def test_forged_tokens_cost_three_fetches_a_minute(
    issuer: Issuer, mock_clock: MockClock
) -> None:
    keys = KeySet(issuer.url, SIGNATURES)
    other = rsa.generate_private_key(65537, 2048)
    claims = jwt.decode(signed("RS256"), options={"verify_signature": False})
    forged = [
        jwt.encode(claims | {"jti": str(n)}, other, "RS256", headers={"kid": "RS256"})
        for n in range(50)
    ]
    assert [await unavailable(keys, each) for each in forged].count(False) == 4
    assert issuer.requests == 4
    mock_clock.jump(60)
    assert not await is_good(keys, signed("ES256", kid="made up"))
    assert [await unavailable(keys, each) for each in forged].count(False) == 50


async def test_token_that_no_key_could_make_valid_causes_no_fetch(
    issuer: Issuer, mock_clock: MockClock
) -> None:
    keys = KeySet(issuer.url, SIGNATURES)
    assert await is_good(keys, signed("RS256", kid="RS256"))
    mock_clock.jump(60)
    for claims in ({"exp": time.time() - 1}, {"roles": "WAITER"}, {"type": "refresh"}):
        assert not await is_good(keys, signed("RS256", kid="gone", **claims))
    assert issuer.requests == 1


async def test_concurrent_clients_share_one_fetch(issuer: Issuer) -> None:
    keys, good = KeySet(issuer.url, SIGNATURES), []
    issuer.answers.clear()

    async def one() -> None:
        good.append(await is_good(keys, signed("EdDSA", kid="EdDSA")))

    async with trio.open_nursery() as nursery:
        for _ in range(50):
            nursery.start_soon(one)
        await until(lambda: issuer.requests)
        issuer.answers.set()
    assert good == [True] * 50
    assert issuer.requests == 1


async def test_tokens_that_no_public_key_could_have_signed_cause_no_fetch(issuer: Issuer) -> None:
    keys = KeySet(issuer.url, ("HS256", *SIGNATURES))
    for algorithm in ("HS256", "none", "RS512", "", None):
        assert await keys.keys_for(algorithm) == ()
    assert issuer.requests == 0


async def test_fetch_continues_when_the_client_disconnects(
    issuer: Issuer, mock_clock: MockClock
) -> None:
    """Otherwise a client that connects once a minute could keep a new key out for ever."""
    issuer.body = key_set(jwk("RS256"))
    keys = KeySet(issuer.url, SIGNATURES)
    assert await is_good(keys, signed("RS256", kid="RS256"))
    issuer.body = key_set(jwk("ES256"))
    mock_clock.jump(60)
    issuer.answers.clear()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(is_good, keys, signed("RS256", kid="made up"))
        await until_requested(issuer, 2)
        nursery.cancel_scope.cancel()
        issuer.answers.set()
    assert await is_good(keys, signed("ES256", kid="ES256"))


async def until_requested(issuer: Issuer, number: int) -> None:
    """Under a clock that stands still."""
    while issuer.requests < number:
        await trio.to_thread.run_sync(time.sleep, 0.005)


# When it can't be had


async def test_token_is_not_called_invalid_before_the_keys_were_fetched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(jwks, "TIMEOUT", 0.2)
    port = free_port()
    keys = KeySet(f"http://127.0.0.1:{port}/", SIGNATURES)
    token = signed("RS256", kid="RS256")
    assert await unavailable(keys, token)
    with issuing(key_set(jwk("RS256")), port) as issuer:
        assert await unavailable(keys, token)  # it is not asked again at once
        assert issuer.requests == 0
        await trio.sleep(0.2)
        assert await is_good(keys, token)


GARBAGE: Final = {
    "nothing": b"",
    "no JSON": b"<html>Service unavailable</html>",
    "not UTF-8": b'{"keys":["\xff"]}',
    "a list": b"[]",
    "null": b"null",
    "keys that are not a list": b'{"keys":5}',
    "keys that are an object": b'{"keys":{"a":1}}',
    "no keys": b'{"keys":[]}',
    "symmetric ones alone": key_set(OCT),
    "deep": b'{"keys":' + b"[" * 200_000,
    "over a mebibyte": key_set(jwk("RS256"))[:-1] + b" " * (1 << 20) + b"}",
}


@pytest.mark.parametrize("name", GARBAGE)
async def test_invalid_response_is_a_failed_fetch_and_keeps_the_old_keys(
    issuer: Issuer, mock_clock: MockClock, name: str
) -> None:
    good, token = issuer.body, signed("RS256", kid="RS256")
    issuer.body = GARBAGE[name]
    keys = KeySet(issuer.url, SIGNATURES)
    assert await unavailable(keys, token)
    issuer.body = good
    mock_clock.jump(60)
    assert await is_good(keys, token)
    issuer.body = GARBAGE[name]
    mock_clock.jump(60)
    assert await unavailable(keys, signed("RS256", kid="made up"))
    assert issuer.requests == 3
    assert await is_good(keys, token)


@pytest.mark.parametrize(
    "raw",
    [
        b"", b"hello\r\n\r\n", b"HTTP/1.1 500 No\r\n\r\n", b"HTTP/1.1 999999 ?\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 302 Found\r\nLocation: gopher://x\r\n\r\n",
    ],
)  # fmt: skip
async def test_broken_http_is_a_failed_fetch(
    issuer: Issuer, mock_clock: MockClock, raw: bytes
) -> None:
    issuer.raw = raw
    keys = KeySet(issuer.url, SIGNATURES)
    with capture_logs() as logs:
        assert await unavailable(keys, signed("RS256", kid="RS256"))
    assert [line["event"] for line in logs] == ["keys not fetched"]
    issuer.raw = None
    mock_clock.jump(60)
    assert await is_good(keys, signed("RS256", kid="RS256"))


async def test_fetch_from_a_dripping_server_times_out_and_holds_no_thread(
    issuer: Issuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jwks, "TIMEOUT", 0.2)
    issuer.drips = True
    keys = KeySet(issuer.url, SIGNATURES)
    watch = Stopwatch()
    assert await unavailable(keys, signed("RS256", kid="RS256"))
    assert watch.net < 0.5
    await until(lambda: not keys._limiter.borrowed_tokens, 1)
    issuer.drips = False
    assert await is_good(keys, signed("RS256", kid="RS256"))


# In a gateway


@pytest.mark.parametrize("transport", ["direct", "asgi"])
async def test_clients_are_admitted_by_the_keys_at_a_url(
    redis_url: str, issuer: Issuer, transport: Transport
) -> None:
    settings = make_settings(redis_url, jwt_algorithms=SIGNATURES, jwt_jwks_url=issuer.url)
    async with running(settings, transport=transport) as gateway:
        assert issuer.requests == 0  # fetched when first needed
        for algorithm in PRIVATE:
            token = signed(algorithm, kid=algorithm)
            async with admitted(f"{gateway.url}/ws/waiter?token={token}"):
                pass
        for bad in (signed("ES256", kid="RS256"), signed("RS256", kid="ES256"), "x"):
            async with connect(f"{gateway.url}/ws/waiter?token={bad}") as client:
                assert (await closed(client))[0] == Close.AUTH_FAILED
    assert issuer.requests == 1


@pytest.mark.parametrize("transport", ["direct", "asgi"])
async def test_token_of_a_new_key_is_1013_or_503_until_the_key_was_looked_up(
    redis_url: str, issuer: Issuer, transport: Transport, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jwks, "AT_MOST_EVERY", 0.8)
    issuer.body = key_set(jwk("RS256"))
    settings = make_settings(redis_url, jwt_algorithms=SIGNATURES, jwt_jwks_url=issuer.url)
    async with running(settings, transport=transport) as gateway:
        async with admitted(f"{gateway.url}/ws/waiter?token={signed('RS256', kid='RS256')}"):
            pass
        issuer.body = key_set(jwk("ES256"))
        token = signed("ES256", kid="ES256")
        headers = {"Authorization": f"Bearer {token}"}
        async with connect(f"{gateway.url}/ws/waiter?token={token}") as client:
            assert (await closed(client))[0] == Close.SERVER_OVERLOADED
        reply = await http(gateway.port, "/ws/ticket", method="POST", headers=headers)
        assert reply.status == 503
        reply = await http(gateway.port, "/ws/waiter/events", headers=headers)
        assert reply.status == 503
        assert gateway.app.parts.counts.rejected == {"dependency": 2}
        await trio.sleep(0.8)
        async with admitted(f"{gateway.url}/ws/waiter?token={token}"):
            pass
    assert issuer.requests == 2


async def test_hung_server_does_not_delay_clients_whose_key_is_cached(
    redis_url: str, issuer: Issuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jwks, "AT_MOST_EVERY", 0.0)
    settings = make_settings(redis_url, jwt_algorithms=("RS256",), jwt_jwks_url=issuer.url)
    known = signed("RS256", kid="RS256")
    async with (
        running(settings) as gateway,
        admitted(f"{gateway.url}/ws/waiter?token={known}") as bystander,
        trio.open_nursery() as nursery,
    ):
        url = gateway.url
        issuer.answers.clear()

        async def with_an_unknown_key() -> None:
            token = signed("RS256", kid="made up")
            async with connect(f"{url}/ws/waiter?token={token}") as client:
                await closed(client)

        for _ in range(20):
            nursery.start_soon(with_an_unknown_key)
        await until(lambda: issuer.requests == 2)
        for _ in range(10):
            watch = Stopwatch()
            async with admitted(f"{url}/ws/waiter?token={known}"):
                pass
            assert await received(bystander) == []
            assert watch.net < 0.25
        assert not gateway.app.parts.counts.rejected  # those still wait
        issuer.answers.set()
        await until(lambda: gateway.app.parts.counts.rejected == {"auth": 20})
    assert issuer.requests == 2


async def test_unreachable_key_set_is_1013_or_503_only_for_tokens_that_need_it(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jwks, "TIMEOUT", 0.2)
    settings = make_settings(
        redis_url,
        jwt_algorithms=("HS256", "RS256"),
        jwt_jwks_url=f"http://127.0.0.1:{free_port()}/",
    )
    async with running(settings) as gateway:
        token = signed("RS256", kid="RS256")
        async with connect(f"{gateway.url}/ws/waiter?token={token}") as client:
            assert (await closed(client))[0] == Close.SERVER_OVERLOADED
        headers = {"Authorization": f"Bearer {token}"}
        reply = await http(gateway.port, "/ws/ticket", method="POST", headers=headers)
        assert reply.status == 503  # not 401, though it is no diner's
        reply = await http(gateway.port, "/ws/catchup?branch_id=1&since=0", headers=headers)
        assert reply.status == 503
        async with admitted(gateway.staff_url("waiter")), admitted(gateway.diner_url()):
            assert gateway.app.parts.counts.rejected == {"dependency": 1}
        table = {"Authorization": f"Bearer {make_table_token(TABLE_SECRET)}"}
        assert (await http(gateway.port, "/ws/ticket", method="POST", headers=table)).status == 200


async def test_waiting_for_the_keys_ends_with_the_accept_timeout(
    redis_url: str, issuer: Issuer
) -> None:
    issuer.answers.clear()
    settings = make_settings(
        redis_url, jwt_algorithms=("RS256",), jwt_jwks_url=issuer.url, ws_accept_timeout=0.3
    )
    async with running(settings) as gateway, trio.open_nursery() as nursery:
        url = f"{gateway.url}/ws/waiter?token={signed('RS256', kid='RS256')}"
        endings: list[int] = []

        async def one() -> None:
            async with connect(url) as client:
                endings.append((await closed(client))[0])

        nursery.start_soon(one)  # fetches, and is held as long as that takes
        await until(lambda: issuer.requests)
        nursery.start_soon(one)
        await until(lambda: endings == [Close.SERVER_OVERLOADED], 1)
        issuer.answers.set()
        await until(lambda: len(endings) == 2)
        await wait_all_tasks_blocked()
        async with admitted(url):
            pass
