"""What production refuses to start with, and which keys are good for what."""

import os
import time
from pathlib import Path
from typing import Any, Final

import jwt
import pytest
from click.testing import CliRunner
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from trio_gateway.cli import main
from trio_gateway.core.close_codes import Rejected
from trio_gateway.core.tokens import read_jwt, read_table_token
from trio_gateway.settings import NAMES, InvalidSettings, Settings, load_settings
from trio_gateway.testing import make_jwt, make_table_token

SECRET, OTHER, OLD = "s" * 32, "t" * 32, "u" * 32
PRODUCTION: Final = {
    "ENVIRONMENT": "production",
    "JWT_SECRET": SECRET,
    "TABLE_TOKEN_SECRET": OTHER,
    "REDIS_URL": "redis://127.0.0.1:1",
}
PRIVATE: Final[dict[str, Any]] = {
    "RS256": rsa.generate_private_key(65537, 2048),
    "ES256": ec.generate_private_key(ec.SECP256R1()),
    "ES384": ec.generate_private_key(ec.SECP384R1()),
    "EdDSA": ed25519.Ed25519PrivateKey.generate(),
}
PEMS: Final = {
    name: key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
    for name, key in PRIVATE.items()
}


@pytest.fixture(autouse=True)
def _empty_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in os.environ:
        if name.upper() in NAMES or name.upper().startswith("WS_"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


def problems(monkeypatch: pytest.MonkeyPatch, **changes: str) -> list[str]:
    """What stands in the way of a start in production."""
    for name, value in (PRODUCTION | changes).items():
        monkeypatch.setenv(name, value)
    try:
        load_settings()
    except InvalidSettings as invalid:
        return invalid.problems
    return []


SECRETS = ["JWT_SECRET", "TABLE_TOKEN_SECRET", "JWT_SECRET_PREVIOUS", "TABLE_TOKEN_SECRET_PREVIOUS"]
WELL_KNOWN = [
    "your-256-bit-secret-your-256-bit-secret",
    "a-string-secret-at-least-256-bits-long",
    "CHANGE-ME-CHANGE-ME-CHANGE-ME-CHANGE-ME",
    "change_me_in_production_or_be_sorry!",
    "your_secret_key_here_your_secret_key",
    "your-super-secret-jwt-key-change-in-prod",
]


@pytest.mark.parametrize("name", SECRETS)
def test_production_refuses_a_short_secret(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert problems(monkeypatch, **{name: "s" * 31}) == [f"{name} is shorter than 32 bytes"]


@pytest.mark.parametrize("secret", WELL_KNOWN)
@pytest.mark.parametrize("name", SECRETS)
def test_production_refuses_the_secret_of_an_example(
    name: str, secret: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    [problem] = problems(monkeypatch, **{name: secret})
    assert problem == f"{name} is not secret: it was copied from a published example"


@pytest.mark.parametrize("name", SECRETS[:2])
def test_production_refuses_a_missing_secret(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert problems(monkeypatch, **{name: ""}) == [f"{name} is not set (production requires it)"]


def test_production_needs_no_previous_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    assert problems(monkeypatch) == []
    assert problems(monkeypatch, JWT_SECRET_PREVIOUS=OLD, TABLE_TOKEN_SECRET_PREVIOUS=OLD) == []


@pytest.mark.parametrize(
    "url",
    [
        "redis://10.0.0.5", "redis://redis:6379/0", "rediss://redis.example", "redis://:@redis",
        "redis://user@redis", "redis://redis?db=1", "redis://redis?password=", "redis://0.0.0.0",
        "redis://127.0.0.1.evil.example", "redis://localhost.evil.example", "redis://[2001:db8::1]",
        "redis+sentinel://10.0.0.5/m", "redis+sentinel://localhost,10.0.0.5/m",
        "redis+sentinel://10.0.0.5/m?sentinel_password=hunter2", "redis+cluster://127.0.0.1,redis",
    ],
)  # fmt: skip
def test_production_refuses_a_remote_redis_without_a_password(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    [problem] = problems(monkeypatch, REDIS_URL=url)
    assert problem.startswith("REDIS_URL has no password")
    assert "ALLOW_REDIS_WITHOUT_PASSWORD" in problem
    assert problems(monkeypatch, REDIS_URL=url, ALLOW_REDIS_WITHOUT_PASSWORD="true") == []


@pytest.mark.parametrize(
    "url",
    [
        "redis://:hunter2@redis", "rediss://user:hunter2@redis:6380/1", "unix:///run/redis.sock",
        "redis://localhost", "redis://127.0.0.1:6379", "redis://127.3.2.1", "redis://[::1]:6379",
        "redis://redis?password=hunter2", "redis://",
        "redis+sentinel://:hunter2@a,b/m", "redis+sentinel://localhost,[::1]/m",
        "redis+cluster://user:hunter2@a,b", "redis+cluster://a?password=hunter2",
    ],
)  # fmt: skip
def test_production_accepts_a_redis_with_a_password_or_on_this_machine(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert problems(monkeypatch, REDIS_URL=url) == []


def test_check_and_serve_print_the_same_problems_one_per_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wrong = {
        "JWT_SECRET": "short",
        "TABLE_TOKEN_SECRET": "",
        "ALLOWED_ORIGINS": "*",
        "REDIS_URL": "redis://10.0.0.5",
    }
    expected = problems(monkeypatch, **wrong)
    assert [line.split()[0] for line in expected] == [*wrong]
    for command in ("check", "serve"):
        ended = CliRunner().invoke(main, [command])
        assert ended.exit_code == 2
        assert ended.output.splitlines() == [f"trio-gateway: {line}" for line in expected]


# Rotation


def is_good(settings: Settings, token: str) -> bool:
    try:
        read_jwt(token, settings.staff_keys, settings.rules, time.time())
    except Rejected:
        return False
    return True


def test_tokens_of_the_previous_secret_are_valid_during_a_rotation() -> None:
    settings = Settings(
        jwt_secret=SECRET,
        jwt_secret_previous=OLD,
        table_token_secret=OTHER,
        table_token_secret_previous=OLD,
    )
    assert is_good(settings, make_jwt(SECRET))
    assert is_good(settings, make_jwt(OLD))
    assert not is_good(settings, make_jwt(OTHER))
    for secret in (OTHER, OLD):
        token = make_table_token(secret)
        now = jwt.decode(token, secret, ["HS256"])["iat"]
        assert read_table_token(token, settings.table_keys, settings.rules, now).session == 456
    with pytest.raises(Rejected):
        read_table_token(make_table_token(SECRET), settings.table_keys, settings.rules, 0)


def test_tokens_of_the_previous_secret_are_invalid_after_the_rotation() -> None:
    assert not is_good(Settings(jwt_secret=SECRET), make_jwt(OLD))


# Public keys


def signed(algorithm: str, by: str) -> str:
    claims = jwt.decode(make_jwt(SECRET), SECRET, ["HS256"])
    return jwt.encode(claims, PRIVATE[by], algorithm)


@pytest.mark.parametrize("given", PRIVATE)
def test_public_key_is_used_with_its_own_algorithms_only(given: str) -> None:
    settings = Settings(jwt_algorithms=tuple(PRIVATE), jwt_public_key=PEMS[given])
    for algorithm in PRIVATE:
        assert is_good(settings, signed(algorithm, by=algorithm)) is (algorithm == given)
    [key] = settings.staff_keys
    assert key.algorithms == (given,)


def test_all_keys_of_a_setting_are_used() -> None:
    both = PEMS["RS256"] + "\n" + PEMS["EdDSA"]
    for text in (both, both.replace("\n", "\\n")):
        settings = Settings(jwt_algorithms=("RS256", "EdDSA"), jwt_public_key=text)
        assert len(settings.staff_keys) == 2
        assert is_good(settings, signed("RS256", by="RS256"))
        assert is_good(settings, signed("EdDSA", by="EdDSA"))
        assert not is_good(settings, signed("ES256", by="ES256"))


def test_one_invalid_key_among_several_stops_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = PEMS["RS256"] + "-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n"
    assert problems(monkeypatch, JWT_ALGORITHMS="RS256", JWT_PUBLIC_KEY=broken) == [
        "JWT_PUBLIC_KEY is neither a PEM public key nor a file of one"
    ]


def test_private_key_instead_of_the_public_one_stops_the_start_and_is_not_shown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pem = PRIVATE["EdDSA"].private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
    [problem] = problems(monkeypatch, JWT_ALGORITHMS="EdDSA", JWT_PUBLIC_KEY=pem)
    assert pem.splitlines()[1] not in problem


@pytest.mark.parametrize("url", ["id.example/jwks", "file:///etc/keys", "ftp://x/y", "https://"])
def test_key_set_url_must_be_http(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    [problem] = problems(monkeypatch, JWT_ALGORITHMS="RS256", JWT_JWKS_URL=url)
    assert problem.startswith("JWT_JWKS_URL: must begin with https://")


def test_key_set_without_tls_is_a_warning() -> None:
    def warned(url: str) -> bool:
        settings = Settings(jwt_algorithms=("RS256",), jwt_jwks_url=url)
        return any(line.startswith("JWT_JWKS_URL") for line in settings.warnings)

    assert warned("http://id.example/jwks.json")
    assert not warned("https://id.example/jwks.json")
    assert not warned("http://localhost:8080/jwks.json")
