import dataclasses
import os
from datetime import time
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ed25519
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from trio_gateway.core.claims import Rules
from trio_gateway.core.routing import ROUTES, Route, To
from trio_gateway.core.tokens import read_jwt, read_table_token
from trio_gateway.settings import NAMES, InvalidSettings, Settings, load_settings
from trio_gateway.testing import make_jwt, make_table_token

# The contract's table, section 6.
PATTERNS = (
    "channel:branch:*:waiters", "channel:branch:*:kitchen", "channel:branch:*:admin",
    "channel:sector:*:*:waiters", "channel:session:*", "channel:tenant:*:admin",
    "branch:*:waiters", "branch:*:kitchen", "branch:*:admin", "sector:*:*:waiters",
    "sector:*:waiters", "session:*", "tenant:*:admin",
)  # fmt: skip
OURS = {  # in addition to those of the contract
    "WS_OPERATIONS_BIND": None,
    "ALLOW_REDIS_WITHOUT_PASSWORD": False,
    "REDIS_DLQ_STREAM": None,
    "REDIS_STREAM_SHARDS_PREVIOUS": 1,
    "JWT_SECRET_PREVIOUS": None,
    "TABLE_TOKEN_SECRET_PREVIOUS": None,
    "WS_MAX_HANDSHAKES": 1000,
    "WS_MAX_CONNECTIONS_PER_ADDRESS": 0,
    "WS_MAX_FAILED_LOGINS": 0,
    "WS_PROXY_HOPS": 0,
    "WS_TRACING": False,
    "WS_CONSOLE_TOKENS": False,
    "SECTOR_TABLE": "waiter_sector_assignment",
    "SECTOR_COLUMNS": (),
    "SERVICE_TIME_ZONE": "UTC",
    "SERVICE_TIME_ZONES": (),
    "SERVICE_DAY_CUTOFF": time(5),
    "SHIFT_WINDOWS": (),
}
DEFAULTS: dict[str, Any] = {
    "WS_MAX_CONNECTIONS_PER_USER": 3,
    "WS_MAX_CONNECTIONS_PER_SESSION": 20,
    "WS_MAX_CONNECTIONS_PER_TENANT": 0,
    "WS_MAX_TOTAL_CONNECTIONS": 1000,
    "WS_MESSAGE_RATE_LIMIT": 20,
    "WS_MESSAGE_RATE_WINDOW": 1.0,
    "WS_BROADCAST_BATCH_SIZE": 50,
    "WS_HEARTBEAT_TIMEOUT": 60,
    "WS_CLEANUP_INTERVAL": 30,
    "WS_PING_INTERVAL": 25,
    "WS_ACCEPT_TIMEOUT": 5,
    "WS_RECEIVE_TIMEOUT": 90,
    "WS_WRITE_TIMEOUT": 10,
    "WS_CALLBACK_TIMEOUT": 30,
    "WS_MAX_MESSAGE_SIZE": 65536,
    "WS_COMPRESSION": False,
    "WS_OUTBOX_BYTES": 1048576,
    "WS_OUTBOX_MESSAGES": 1000,
    "WS_HISTORY_EVENTS": 50000,
    "WS_HISTORY_BYTES": 67108864,
    "WS_HISTORY_AGE": 3600,
    "WS_RESUME_FROM_STREAM": 10_000,
    "WS_TENANT_EVENT_RATE": 0,
    "WS_UNCOVERED_SECTOR": "none",
    "WS_DROP_ALARM_WINDOW": 60,
    "WS_DROP_ALARM_THRESHOLD": 0.05,
    "WS_DROP_ALARM_COOLDOWN": 300,
    "WS_ROUTES_FILE": None,
    "WS_CLUSTER": False,
    "WS_PRESENCE_GRACE": 15,
    "WS_RECEIPT_TTL": 3600,
    "WS_SLO_SECONDS": 1,
    "WS_PRESENCE_STREAM": None,
    "WS_API_KEYS_FILE": None,
    "REDIS_URL": "redis://localhost:6380",
    "REDIS_CHANNEL_PATTERNS": PATTERNS,
    "REDIS_STREAMS": ("events:critical",),
    "REDIS_STREAM_SHARDS": 1,
    "REDIS_EVENT_QUEUE_SIZE": 5000,
    "REDIS_EVENT_MAX_WAIT": 2,
    "REDIS_EVENT_BATCH_SIZE": 50,
    "REDIS_POOL_MAX_CONNECTIONS": 50,
    "CIRCUIT_FAILURE_THRESHOLD": 5,
    "CIRCUIT_RECOVERY_TIMEOUT": 30,
    "JWT_SECRET": None,
    "TABLE_TOKEN_SECRET": None,
    "JWT_ALGORITHMS": ("HS256",),
    "JWT_PUBLIC_KEY": None,
    "JWT_JWKS_URL": None,
    "JWT_ISSUER": None,
    "JWT_AUDIENCE": None,
    "JWT_LEEWAY": 10,
    "JWT_REVALIDATION_INTERVAL": 300,
    "ALLOW_LEGACY_TABLE_TOKENS": False,
    "ALLOWED_ORIGINS": (
        "http://localhost:5176", "http://localhost:5177", "http://localhost:5178",
    ),
    "DATABASE_URL": None,
    "SECTOR_CACHE_TTL": 300,
    "ENVIRONMENT": "development",
    "LOG_LEVEL": "info",
    "LOG_FORMAT": None,
}  # fmt: skip
SECRET, OTHER = "s" * 32, "t" * 32
PRODUCTION = {"ENVIRONMENT": "production", "JWT_SECRET": SECRET, "TABLE_TOKEN_SECRET": OTHER}
PEM = (
    ed25519.Ed25519PrivateKey.generate()
    .public_key()
    .public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    .decode()
)


@pytest.fixture(autouse=True)
def _empty_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No settings but the test's own, and no ``.env`` but the test's own."""
    for name in os.environ:
        if name.upper() in NAMES or name.upper().startswith("WS_"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


def load(monkeypatch: pytest.MonkeyPatch, **environment: str) -> Settings:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return load_settings()


def problems(monkeypatch: pytest.MonkeyPatch, **environment: str) -> list[str]:
    with pytest.raises(InvalidSettings) as caught:
        load(monkeypatch, **environment)
    assert str(caught.value) == "\n".join(caught.value.problems)
    return caught.value.problems


def test_settings_and_defaults_are_those_of_the_contract() -> None:
    settings = load_settings()

    assert {name: getattr(settings, name.lower()) for name in DEFAULTS} == DEFAULTS
    ours = {name.upper() for name in Settings.model_fields} - DEFAULTS.keys()
    assert {name: getattr(settings, name.lower()) for name in ours} == OURS


def test_times_are_not_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = load(monkeypatch, WS_PING_INTERVAL="0.25", CIRCUIT_RECOVERY_TIMEOUT="1.5")

    assert (settings.ws_ping_interval, settings.circuit_recovery_timeout) == (0.25, 1.5)


def test_the_environment_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = load(
        monkeypatch, WS_MAX_TOTAL_CONNECTIONS="7", REDIS_URL="rediss://:pw@redis:6379/2",
        WS_COMPRESSION="true", WS_UNCOVERED_SECTOR="branch", ENVIRONMENT="Development",
        LOG_LEVEL="DEBUG",
    )  # fmt: skip

    assert settings.ws_max_total_connections == 7
    assert settings.redis_url == "rediss://:pw@redis:6379/2"
    assert (settings.ws_compression, settings.ws_uncovered_sector) == (True, "branch")
    assert (settings.environment, settings.log_level) == ("development", "debug")


LISTS = {
    "a,b": ("a", "b"),
    " a , b ,": ("a", "b"),
    "a": ("a",),
    '["a"]': ('["a"]',),
    ",": (),
}


@pytest.mark.parametrize("text", LISTS)
def test_lists_are_separated_by_commas(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = load(monkeypatch, REDIS_STREAMS=text, REDIS_CHANNEL_PATTERNS=text)

    assert settings.redis_streams == settings.redis_channel_patterns == LISTS[text]


@pytest.mark.parametrize("name", [name for name in DEFAULTS if name != "LOG_FORMAT"])
def test_an_empty_value_is_not_set(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert getattr(load(monkeypatch, **{name: ""}), name.lower()) == DEFAULTS[name]


# --- .env ---


def test_settings_missing_in_the_environment_are_read_from_the_file(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Path(".env").write_text(
        "# ours\nWS_PING_INTERVAL=5\nexport WS_CLEANUP_INTERVAL='6'\nWS_ACCEPT_TIMEOUT=7\n"
        "PATH=/x\nREDIS_STREAMS=a,b\nWS_WRITE_TIMEOUT=\n"
    )
    settings = load(monkeypatch, WS_PING_INTERVAL="9", WS_ACCEPT_TIMEOUT="")

    assert settings.ws_ping_interval == 9
    assert settings.ws_cleanup_interval == 6
    assert settings.ws_accept_timeout == 7
    assert settings.redis_streams == ("a", "b")
    assert settings.ws_write_timeout == 10


def test_another_file_can_be_named() -> None:
    Path("other.env").write_text("WS_PING_INTERVAL=5\n")

    assert load_settings("other.env").ws_ping_interval == 5
    assert load_settings("none.env").ws_ping_interval == 25


def test_a_mistake_in_the_file_stops_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    Path(".env").write_text("WS_PING_INTERVALL=5\nWS_CLEANUP_INTERVAL=never\n")

    first, second = problems(monkeypatch)
    assert first == "unknown setting: WS_PING_INTERVALL (did you mean WS_PING_INTERVAL?)"
    assert second.startswith("WS_CLEANUP_INTERVAL: ")


# --- mistakes ---


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("WS_MAX_CONECTIONS_PER_USER", " (did you mean WS_MAX_CONNECTIONS_PER_USER?)"),
        ("ws_ping_intervals", " (did you mean WS_PING_INTERVAL?)"),
        ("WS_QQQQQQQQQQQQQQ", ""),
    ],
)
@pytest.mark.parametrize("value", ["1", ""])
def test_an_unknown_setting_stops_the_start(
    name: str, hint: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert problems(monkeypatch, **{name: value}) == [f"unknown setting: {name}{hint}"]


def test_environment_variables_of_others_are_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    load(monkeypatch, REDIS_FOO="1", WSL_DISTRO_NAME="x", JWT_FOO="1", ws_ping_interval="5")


COUNTS = [n for n, default in DEFAULTS.items() if type(default) is int and "TIME" not in n]
SECONDS = [
    "WS_MESSAGE_RATE_WINDOW", "WS_HEARTBEAT_TIMEOUT", "WS_CLEANUP_INTERVAL", "WS_PING_INTERVAL",
    "WS_ACCEPT_TIMEOUT", "WS_RECEIVE_TIMEOUT", "WS_WRITE_TIMEOUT", "WS_CALLBACK_TIMEOUT",
    "WS_HISTORY_AGE", "WS_DROP_ALARM_WINDOW", "WS_DROP_ALARM_COOLDOWN", "WS_RECEIPT_TTL",
    "CIRCUIT_RECOVERY_TIMEOUT", "JWT_REVALIDATION_INTERVAL", "SECTOR_CACHE_TTL", "WS_SLO_SECONDS",
]  # fmt: skip
NUMBERS = [
    "WS_MAX_CONNECTIONS_PER_TENANT",
    "WS_PRESENCE_GRACE",
    "WS_RESUME_FROM_STREAM",
    "WS_TENANT_EVENT_RATE",
    "WS_DROP_ALARM_THRESHOLD",
    "JWT_LEEWAY",
    "REDIS_EVENT_MAX_WAIT",
]  # may be 0
WHOLE = [n for n in COUNTS if n not in SECONDS and n not in NUMBERS]
BAD = [
    *[(name, value) for name in WHOLE for value in ("0", "-1", "1.5", "many", "inf", "nan")],
    *[(name, value) for name in SECONDS for value in ("0", "-1", "soon", "inf", "nan")],
    *[(name, value) for name in NUMBERS for value in ("-1", "some", "inf", "nan")],
    *[("WS_DROP_ALARM_THRESHOLD", "1.01"), ("WS_DROP_ALARM_THRESHOLD", "5%")],
    *[("WS_COMPRESSION", "maybe"), ("ALLOW_LEGACY_TABLE_TOKENS", "2")],
    *[("WS_UNCOVERED_SECTOR", "all"), ("ENVIRONMENT", "staging"), ("LOG_LEVEL", "loud")],
    *[("LOG_FORMAT", "xml"), ("JWT_ALGORITHMS", "none"), ("JWT_ALGORITHMS", ",")],
    *[("JWT_ALGORITHMS", "HS256,none"), ("JWT_ALGORITHMS", "hs256")],
    *[("SERVICE_DAY_CUTOFF", value) for value in ("5", "25:00", "05:00Z", "dawn")],
    *[("SERVICE_TIME_ZONE", "Mars/Olympus"), ("SERVICE_TIME_ZONES", "1=UTC")],
    *[("SHIFT_WINDOWS", "NIGHT=22-06"), ("SECTOR_COLUMNS", "id=key"), ("SECTOR_COLUMNS", "shift")],
    *[("REDIS_URL", url) for url in ("localhost:6379", "http://x", "redis://x:port", "/run/x")],
    *[("ALLOWED_ORIGINS", o) for o in ("localhost", "http://a/", "http://a,null", "http://*.a b")],
]


@pytest.mark.parametrize(("name", "value"), BAD)
def test_invalid_value_is_named_with_its_setting(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    [problem] = problems(monkeypatch, **{name: value})

    assert problem.startswith(f"{name}: ")
    assert len(problem) > len(f"{name}: ") + 5


def test_every_mistake_is_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    found = problems(monkeypatch, WS_A="", WS_PING_INTERVAL="x", LOG_LEVEL="x", REDIS_URL="x")

    assert [line.partition(":")[0] for line in found] == [
        "unknown setting", "WS_PING_INTERVAL", "REDIS_URL", "LOG_LEVEL",
    ]  # fmt: skip


def test_no_problem_shows_a_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    found = problems(
        monkeypatch, ENVIRONMENT="production", JWT_SECRET="hunter2", TABLE_TOKEN_SECRET="hunter2",
        REDIS_URL="http://:hunter2@redis:hunter2", DATABASE_URL="hunter2://hunter2:hunter2@db",
        JWT_PUBLIC_KEY="-----BEGIN hunter2", JWT_ALGORITHMS="EdDSA,HS256", WS_PING_INTERVAL="x",
    )  # fmt: skip
    assert "hunter2" not in "\n".join(found)

    monkeypatch.setenv("REDIS_URL", "redis://:hunter2@redis")
    monkeypatch.setenv("WS_PING_INTERVAL", "1")
    assert "hunter2" not in "\n".join(problems(monkeypatch))


def test_error_of_settings_made_in_code_shows_no_secret() -> None:
    with pytest.raises(ValueError, match="redis_url") as caught:
        Settings(redis_url="hunter2")
    assert "hunter2" not in str(caught.value)


def test_repr_of_the_settings_shows_no_secret() -> None:
    settings = Settings(
        jwt_secret="hunter2", table_token_secret="hunter2", redis_url="redis://:hunter2@redis",
        database_url="postgresql://:hunter2@db",
    )  # fmt: skip

    assert "hunter2" not in f"{settings!r} {settings}"


def test_settings_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Settings().ws_ping_interval = 5


# --- production ---


def test_production_starts_with_two_secrets_of_32_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = load(monkeypatch, **PRODUCTION)

    assert settings.production
    assert settings.warnings == []


@pytest.mark.parametrize("name", ["JWT_SECRET", "TABLE_TOKEN_SECRET"])
@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("", "is not set (production requires it)"),
        ("s" * 31, "is shorter than 32 bytes"),
        ("é" * 15, "is shorter than 32 bytes"),
    ],
)
def test_production_needs_each_secret(
    name: str, value: str, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert problems(monkeypatch, **PRODUCTION | {name: value}) == [f"{name} {problem}"]


def test_a_secret_is_measured_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    load(monkeypatch, **PRODUCTION | {"JWT_SECRET": "é" * 16})


def test_production_needs_no_staff_secret_with_public_keys(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    load(
        monkeypatch,
        **PRODUCTION | {"JWT_SECRET": "", "JWT_ALGORITHMS": "EdDSA", "JWT_PUBLIC_KEY": PEM},
    )


def test_production_needs_allowed_origins(monkeypatch: pytest.MonkeyPatch) -> None:
    [problem] = problems(monkeypatch, **PRODUCTION, ALLOWED_ORIGINS="https://a.b,*")

    assert problem.startswith("ALLOWED_ORIGINS contains a wildcard")


def test_in_development_a_wildcard_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load(monkeypatch, ALLOWED_ORIGINS="*").allowed_origins == ("*",)


def test_logs_are_json_in_production_and_readable_elsewhere() -> None:
    production: dict[str, Any] = {name.lower(): value for name, value in PRODUCTION.items()}
    formats: list[dict[str, Any]] = [{}, {"log_format": "json"}, {"log_format": "console"}]

    assert [Settings(**one).json_logs for one in formats] == [False, True, False]
    assert [Settings(**production, **one).json_logs for one in formats] == [True, True, False]


def test_development_without_secrets_generates_them_with_a_warning() -> None:
    one, other = Settings(), Settings()

    assert one.staff_secret == one.staff_secret != other.staff_secret
    assert one.table_secret == one.table_secret != other.table_secret
    assert one.staff_secret != one.table_secret
    assert [line.split()[0] for line in one.warnings] == ["JWT_SECRET", "TABLE_TOKEN_SECRET"]


def test_development_warns_of_a_short_secret() -> None:
    settings = Settings(jwt_secret="short", table_token_secret=SECRET)

    assert settings.warnings == ["JWT_SECRET is shorter than 32 bytes"]


@pytest.mark.parametrize(
    ("bind", "good"),
    [
        ("127.0.0.1:9001", True), ("[::1]:9001", True), ("inner.host:65535", True),
        ("9001", False), (":9001", False), ("127.0.0.1", False), ("127.0.0.1:0", False),
        ("127.0.0.1:65536", False), ("unix:/run/x", False), ("http://127.0.0.1:9001", False),
    ],
)  # fmt: skip
def test_operations_address_is_a_host_and_a_port(
    bind: str, good: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if good:
        assert load(monkeypatch, WS_OPERATIONS_BIND=bind).ws_operations_bind == bind
    else:
        (problem,) = problems(monkeypatch, WS_OPERATIONS_BIND=bind)
        assert problem.startswith("WS_OPERATIONS_BIND: ")


@pytest.mark.parametrize(
    ("intervals", "named"),
    [
        ({}, []),
        ({"ws_ping_interval": 45, "ws_heartbeat_timeout": 90}, ["WS_PING_INTERVAL"]),
        ({"ws_ping_interval": 50, "ws_heartbeat_timeout": 50}, ["WS_PING_INTERVAL"] * 2),
        ({"ws_receive_timeout": 59}, ["WS_RECEIVE_TIMEOUT"]),
        ({"ws_heartbeat_timeout": 49}, ["WS_HEARTBEAT_TIMEOUT"]),
        ({"ws_receive_timeout": 40}, ["WS_RECEIVE_TIMEOUT", "WS_RECEIVE_TIMEOUT"]),
        ({"ws_ping_interval": 44, "ws_heartbeat_timeout": 59}, []),
    ],
    ids=str,
)
def test_inconsistent_intervals_are_named_at_the_start(
    intervals: dict[str, Any], named: list[str]
) -> None:
    settings = Settings(jwt_secret=SECRET, table_token_secret=OTHER, **intervals)

    assert [line.split()[0] for line in settings.warnings] == named


# --- what is made of them ---


def test_tokens_are_checked_with_the_secrets_and_rules() -> None:
    settings = Settings(jwt_secret=SECRET, table_token_secret=OTHER, jwt_issuer="us", jwt_leeway=5)

    assert settings.rules == Rules(issuer="us", leeway=5)
    staff, diner = make_jwt(SECRET, iss="us", iat=5), make_table_token(OTHER, iat=5, exp=10)
    assert read_jwt(staff, settings.staff_keys, settings.rules, 0).user == "21"
    assert read_table_token(diner, settings.table_keys, settings.rules, 0)


def test_unreadable_env_file_is_named(tmp_path: Path) -> None:
    (tmp_path / ".env").write_bytes(b"JWT_ISSUER=\xff\n")

    with pytest.raises(InvalidSettings, match=r"^\.env: not UTF-8$"):
        load_settings()


@pytest.mark.parametrize("form", ["text", "one line", "file"])
def test_a_public_key_is_a_pem_or_a_file_of_one(form: str, tmp_path: Path) -> None:
    (tmp_path / "key.pem").write_text(PEM)
    value = {"text": PEM, "one line": PEM.replace("\n", "\\n"), "file": str(tmp_path / "key.pem")}
    settings = Settings(
        jwt_algorithms=("HS256", "EdDSA"), jwt_public_key=value[form], jwt_secret=SECRET
    )

    secret, public = settings.staff_keys
    assert (secret.value, secret.algorithms) == (SECRET, ("HS256",))
    assert public.algorithms == ("EdDSA",)
    assert (
        public.value.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo) == PEM.encode()
    )


@pytest.mark.parametrize("value", ["none.pem", "-----BEGIN PUBLIC KEY-----\nAAAA", "/", "ñ.env"])
def test_invalid_public_key_stops_the_start(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("ñ.env").write_text("ñ", encoding="utf-8")

    assert problems(monkeypatch, JWT_ALGORITHMS="RS256", JWT_PUBLIC_KEY=value) == [
        "JWT_PUBLIC_KEY is neither a PEM public key nor a file of one"
    ]


def test_signature_algorithms_need_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    [problem] = problems(monkeypatch, JWT_ALGORITHMS="RS256,ES256")
    assert "JWT_PUBLIC_KEY or JWT_JWKS_URL" in problem

    settings = load(monkeypatch, JWT_JWKS_URL="https://id.example/jwks.json")
    assert settings.staff_keys == ()


def test_without_a_file_the_routes_are_those_of_the_contract() -> None:
    assert Settings().routes == ROUTES


def test_a_routes_file_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("routes.toml").write_text('[routes."SE ABRIÓ"]\nto = ["kitchen"]\n', encoding="utf-8")
    settings = load(monkeypatch, WS_ROUTES_FILE="routes.toml")

    assert settings.routes == dict(ROUTES) | {"SE ABRIÓ": Route(To.KITCHEN, False)}


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"[routes.A]\nto = [1]", "routes.A.to: must be a list of audience names"),
        (b"\xff", "not UTF-8"),
        (None, "No such file or directory"),
    ],
)
def test_a_mistake_in_the_routes_file_stops_the_start(
    data: bytes | None, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if data is not None:
        Path("routes.toml").write_bytes(data)

    assert problems(monkeypatch, WS_ROUTES_FILE="routes.toml") == [
        f"WS_ROUTES_FILE routes.toml: {problem}"
    ]


def test_origins_are_stored_as_browsers_send_them(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = load(monkeypatch, ALLOWED_ORIGINS="HTTPS://App.Example:443, http://[0::1]:80")

    assert settings.allowed_origins == ("https://app.example", "http://[::1]")


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"[keys.orders]\nscopes = []", "keys.orders.sha256: must be 64 hex digits"),
        (b"\xff", "not UTF-8"),
        (None, "No such file or directory"),
    ],
)
def test_a_mistake_in_the_file_of_api_keys_stops_the_start(
    monkeypatch: pytest.MonkeyPatch, data: bytes | None, problem: str
) -> None:
    if data is not None:
        Path("keys.toml").write_bytes(data)
    [line] = problems(monkeypatch, WS_API_KEYS_FILE="keys.toml")
    assert line.startswith(f"WS_API_KEYS_FILE keys.toml: {problem}")


def test_a_key_is_bound_to_its_algorithms() -> None:
    [key] = Settings().table_keys

    assert dataclasses.asdict(key)["algorithms"] == ("HS256",)


def test_a_presence_stream_without_presence_is_named_at_the_start() -> None:
    values: dict[str, Any] = {"jwt_secret": SECRET, "table_token_secret": OTHER}
    values["ws_presence_stream"] = "presence"
    [line] = Settings(**values).warnings
    assert line.startswith("WS_PRESENCE_STREAM has no effect")
    assert Settings(**values, ws_cluster=True).warnings == []


@pytest.mark.parametrize("stream", ["events:critical", "dead"])
def test_presence_stream_is_no_stream_of_events(
    monkeypatch: pytest.MonkeyPatch, stream: str
) -> None:
    [problem] = problems(
        monkeypatch, WS_PRESENCE_STREAM=stream, WS_CLUSTER="true", REDIS_DLQ_STREAM="dead"
    )
    assert "WS_PRESENCE_STREAM is one of REDIS_STREAMS or REDIS_DLQ_STREAM" in problem


def test_dead_letter_stream_is_not_a_source(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidSettings, match="REDIS_DLQ_STREAM is one of REDIS_STREAMS"):
        load(monkeypatch, REDIS_DLQ_STREAM="b", REDIS_STREAMS="a,b")


@pytest.mark.parametrize(
    ("one", "other"), [("events:critical", "events:25267"), ("orders:583", "orders:7000")]
)
def test_streams_with_colliding_event_ids_are_refused(
    monkeypatch: pytest.MonkeyPatch, one: str, other: str
) -> None:
    assert problems(monkeypatch, REDIS_STREAMS=f"{one},payments,{other}") == [
        f"REDIS_STREAMS: events of {one} and of {other} would have the same ids; rename one"
    ]
    assert load(monkeypatch, REDIS_STREAMS=f"{one},{one}").redis_streams == (one, one)


@pytest.mark.parametrize(
    ("environment", "problem"),
    [
        ({"REDIS_STREAM_SHARDS": "0"}, "REDIS_STREAM_SHARDS: Input should be greater than or"),
        ({"REDIS_STREAM_SHARDS": "257"}, "REDIS_STREAM_SHARDS: Input should be less than or"),
        ({"REDIS_STREAM_SHARDS": "2", "REDIS_STREAMS": "a,b"}, "only one stream can have shards"),
        ({"REDIS_STREAM_SHARDS_PREVIOUS": "2", "REDIS_STREAMS": "a,b"}, "only one stream can have"),
        ({"REDIS_STREAM_SHARDS": "2", "REDIS_STREAMS": ","}, "only one stream can have shards"),
        ({"REDIS_STREAM_SHARDS": "2", "REDIS_STREAMS": "a{b}"}, "can't contain {"),
        (
            {"REDIS_STREAM_SHARDS": "12", "REDIS_STREAM_SHARDS_PREVIOUS": "8"},
            "must be a multiple or a divisor of REDIS_STREAM_SHARDS_PREVIOUS (8)",
        ),
        (
            {
                "REDIS_URL": "redis+cluster://a",
                "REDIS_STREAM_SHARDS": "8",
                "REDIS_STREAM_SHARDS_PREVIOUS": "1",
            },
            "REDIS_STREAM_SHARDS_PREVIOUS must be 8 or be left out",
        ),
        (
            {"REDIS_STREAM_SHARDS": "2", "REDIS_DLQ_STREAM": "events:critical:{1}"},
            "REDIS_DLQ_STREAM is one of REDIS_STREAMS",
        ),
        (
            {"REDIS_STREAM_SHARDS": "64", "REDIS_STREAMS": "orders:786"},
            "events of orders:786:{7} and of orders:786:{40} would have the same ids; rename one",
        ),
    ],
)
def test_shards_that_cannot_work_are_refused(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], problem: str
) -> None:
    assert any(problem in found for found in problems(monkeypatch, **environment))


def test_shards_are_of_the_one_stream_that_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = load(monkeypatch, REDIS_STREAM_SHARDS="2", REDIS_STREAMS="orders,orders")
    assert settings.sharding.names == ("orders", "orders:{0}", "orders:{1}")


def test_tracing_without_its_dependencies_stops_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trio_gateway.settings.checks._OTEL", ("trio_gateway.no_such", "no.such"))
    monkeypatch.setenv("WS_TRACING", "true")
    with pytest.raises(InvalidSettings, match=r"WS_TRACING needs .*trio-gateway\[otel\]"):
        load_settings()
    monkeypatch.setenv("WS_TRACING", "false")
    assert load_settings().ws_tracing is False


def test_streams_of_a_cluster_are_those_of_its_shards_alone() -> None:
    url = "redis+cluster://a"
    assert Settings(redis_url=url, redis_stream_shards=2).sharding.names == (
        "events:critical:{0}", "events:critical:{1}",
    )  # fmt: skip
    assert Settings(redis_url=url).sharding.names == ("events:critical",)
