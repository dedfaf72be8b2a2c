"""Settings: read once from the environment and ``.env``, then frozen."""

import difflib
import hmac
import os
import re
import secrets
from collections.abc import Mapping
from datetime import time
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import parse_qs, urlsplit

from dotenv import dotenv_values
from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from .core.event_ids import DEFAULT_STREAM, tag
from .core.origins import is_loopback, read_origin
from .core.routing import ROUTES, InvalidRoutes, Routing, read_routes
from .core.service_day import ServiceDays, read_windows, read_zone, read_zones
from .core.tokens import Key, Rules
from .keys import MIN_SECRET_BYTES, SIGNATURES, algorithms_of, is_well_known, public_keys
from .redis_url import RedisAddress

__all__ = ["InvalidSettings", "Settings", "load_settings"]

_PATTERNS = (
    "channel:branch:*:waiters",
    "channel:branch:*:kitchen",
    "channel:branch:*:admin",
    "channel:sector:*:*:waiters",
    "channel:session:*",
    "channel:tenant:*:admin",
    "branch:*:waiters",
    "branch:*:kitchen",
    "branch:*:admin",
    "sector:*:*:waiters",
    "sector:*:waiters",
    "session:*",
    "tenant:*:admin",
)
_ORIGINS = tuple(f"http://localhost:{port}" for port in (5176, 5177, 5178))
_USUAL_IDLE_TIMEOUT = 45  # seconds, of event-source-polyfill; the default of proxies is 60
_USUAL_PING = 25  # seconds between the pings of our clients, unless the gateway asks for others
_BIND = re.compile(
    r"(?:[a-z0-9._-]+|\[[0-9a-f:.]+\]):(?P<port>[0-9]{1,5})", re.ASCII | re.IGNORECASE
)
_HMAC = frozenset({"HS256", "HS384", "HS512"})
SECTOR_COLUMNS = (
    "tenant_id", "branch_id", "sector_id", "waiter_id", "assignment_date", "shift", "is_active",
)  # fmt: skip

_List = Annotated[tuple[str, ...], NoDecode]
_Count = Annotated[int, Field(ge=1)]
_Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class InvalidSettings(ValueError):  # noqa: N818 - reads better where it is raised
    """The gateway can't start with these settings.

    ``problems`` has one text for each problem; it names the setting and says what is wrong.
    """

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class Settings(BaseSettings):
    """Every setting of the gateway, with its default (contract, section 6).

    ``Settings(...)`` takes keyword arguments by the settings' names in lower case;
    :func:`load_settings` also reads ``.env``. Times are in seconds, sizes in bytes.
    """

    model_config = SettingsConfigDict(
        frozen=True,
        extra="ignore",
        hide_input_in_errors=True,
        # An empty value is what compose files and unit files write for "not set".
        env_ignore_empty=True,
    )

    ws_max_connections_per_user: _Count = 3
    ws_max_connections_per_session: _Count = 20
    ws_max_total_connections: _Count = 1000
    ws_message_rate_limit: _Count = 20
    ws_message_rate_window: _Seconds = 1.0
    ws_broadcast_batch_size: _Count = 50
    ws_heartbeat_timeout: _Seconds = 60
    ws_cleanup_interval: _Seconds = 30
    ws_ping_interval: _Seconds = 25
    ws_accept_timeout: _Seconds = 5
    ws_receive_timeout: _Seconds = 90
    ws_write_timeout: _Seconds = 10
    ws_callback_timeout: _Seconds = 30
    ws_max_message_size: _Count = 65536
    ws_compression: bool = False
    ws_outbox_bytes: _Count = 1_048_576
    ws_outbox_messages: _Count = 1000
    ws_history_events: _Count = 50_000
    ws_history_bytes: _Count = 67_108_864
    ws_history_age: _Seconds = 3600
    ws_tenant_event_rate: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0
    ws_uncovered_sector: Literal["none", "branch"] = "none"
    ws_drop_alarm_window: _Seconds = 60
    ws_drop_alarm_threshold: Annotated[float, Field(ge=0, le=1)] = 0.05
    ws_drop_alarm_cooldown: _Seconds = 300
    ws_routes_file: Path | None = None
    ws_tracing: bool = False  # needs the extra "otel"
    ws_console_tokens: bool = False  # the console makes tokens; in development only
    ws_max_handshakes: _Count = 1000  # in progress at a time
    ws_max_connections_per_address: Annotated[int, Field(ge=0)] = 0  # 0 = off
    ws_max_failed_logins: Annotated[int, Field(ge=0)] = 0  # per address and minute; 0 = off
    ws_operations_bind: str | None = None  # host:port serves metrics and details, there only
    ws_proxy_hops: Annotated[int, Field(ge=0)] = (
        0  # how many trusted proxies add to X-Forwarded-For
    )

    redis_url: str = Field(default="redis://localhost:6380", repr=False)
    allow_redis_without_password: bool = False
    redis_channel_patterns: _List = _PATTERNS
    redis_streams: _List = (DEFAULT_STREAM,)
    redis_dlq_stream: str | None = None  # entries that are not valid events are copied to it
    redis_event_queue_size: _Count = 5000
    redis_event_batch_size: _Count = 50
    redis_pool_max_connections: _Count = 50
    circuit_failure_threshold: _Count = 5
    circuit_recovery_timeout: _Seconds = 30

    jwt_secret: str | None = Field(default=None, repr=False)
    table_token_secret: str | None = Field(default=None, repr=False)
    # While a secret is being changed, tokens signed with the previous one are still accepted.
    jwt_secret_previous: str | None = Field(default=None, repr=False)
    table_token_secret_previous: str | None = Field(default=None, repr=False)
    jwt_algorithms: _List = ("HS256",)
    jwt_public_key: str | None = Field(default=None, repr=False)
    jwt_jwks_url: str | None = None
    jwt_issuer: str | None = None
    jwt_audience: str | None = None
    # Seconds for nbf and iat, if the clock of the issuer is ahead; exp is exact.
    jwt_leeway: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 10
    jwt_revalidation_interval: _Seconds = 300
    allow_legacy_table_tokens: bool = False
    allowed_origins: _List = _ORIGINS

    database_url: str | None = Field(default=None, repr=False)
    sector_cache_ttl: _Seconds = 300
    sector_table: str = "waiter_sector_assignment"
    sector_columns: _List = ()  # name=column, for columns with another name
    service_time_zone: str = "UTC"
    service_time_zones: _List = ()  # tenant:branch=Zone
    service_day_cutoff: time = time(5)
    shift_windows: _List = ()  # SHIFT=HH:MM-HH:MM
    environment: Literal["development", "production"] = "development"
    log_level: Literal["debug", "info", "warning", "error", "critical"] = "info"
    log_format: Literal["json", "console"] | None = None

    @field_validator(
        "redis_channel_patterns", "redis_streams", "jwt_algorithms", "allowed_origins",
        "sector_columns", "service_time_zones", "shift_windows",
        mode="before",
    )  # fmt: skip
    @classmethod
    def _split(cls, value: Any) -> Any:
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(",") if part.strip())
        return value

    @field_validator("log_level", "log_format", "environment", mode="before")
    @classmethod
    def _lower(cls, value: Any) -> Any:
        return value.lower() if isinstance(value, str) else value

    @field_validator("jwt_algorithms")
    @classmethod
    def _known_algorithms(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value:
            raise ValueError("names no algorithm")
        for name in value:
            if name not in _HMAC | SIGNATURES:
                known = ", ".join(sorted(_HMAC | SIGNATURES))
                raise ValueError(f"unknown algorithm {name} (known: {known})")
        return value

    @field_validator("allowed_origins")
    @classmethod
    def _well_formed_origins(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        found = []
        for origin in value:
            try:
                found.append(origin if origin == "*" else read_origin(origin))
            except ValueError:
                raise ValueError(
                    f"{origin} is not scheme://host[:port] (nothing may follow, not even a slash)"
                ) from None
        return tuple(found)

    @field_validator("ws_operations_bind")
    @classmethod
    def _host_and_port(cls, value: str | None) -> str | None:
        if value is not None:
            match = _BIND.fullmatch(value)
            if match is None or not 0 < int(match["port"]) < 1 << 16:
                raise ValueError("is not host:port, for example 127.0.0.1:9001")
        return value

    @field_validator("service_day_cutoff")
    @classmethod
    def _local(cls, value: time) -> time:
        if value.tzinfo is not None:
            raise ValueError("has a time zone: set that as SERVICE_TIME_ZONE")
        return value

    @field_validator("redis_url")
    @classmethod
    def _usable_redis_url(cls, value: str) -> str:
        RedisAddress.from_url(value).check()
        return value

    @field_validator("jwt_jwks_url")
    @classmethod
    def _on_the_web(cls, value: str | None) -> str | None:
        if value is not None and not (
            urlsplit(value).scheme in {"http", "https"} and urlsplit(value).hostname
        ):
            raise ValueError("must begin with https:// or http://, and name a host")
        return value

    @model_validator(mode="after")
    def _needs_keys(self) -> Self:
        problems = []
        if SIGNATURES & set(self.jwt_algorithms) and not (self.jwt_public_key or self.jwt_jwks_url):
            problems.append("JWT_ALGORITHMS names a signature: set JWT_PUBLIC_KEY or JWT_JWKS_URL")
        if self.redis_dlq_stream in self.redis_streams:
            problems.append(
                "REDIS_DLQ_STREAM is one of REDIS_STREAMS: each copy would be copied again"
            )
        problems += self._streams_that_share_a_tag()
        if self.ws_tracing and not all(map(_is_installed, _OTEL)):
            problems.append("WS_TRACING needs other packages: pip install 'trio-gateway[otel]'")
        if self.production:
            problems += self._production_problems()
        # Read them now, so that a mistake in one of them prevents the start.
        for read in ("routes", "staff_keys", "service_days", "sector_column_names"):
            try:
                getattr(self, read)
            except InvalidSettings as error:
                problems += error.problems
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def _streams_that_share_a_tag(self) -> list[str]:
        """Event ids name their stream by a tag of 16 bits: no two streams may have the same tag."""
        first: dict[str, str] = {}
        return [
            f"REDIS_STREAMS: events of {other} and of {name} would have the same ids; rename one"
            for name in self.redis_streams
            if (other := first.setdefault(tag(name), name)) != name
        ]

    def _production_problems(self) -> list[str]:
        problems = []
        for name in self._secrets_in_use:
            secret = getattr(self, name)
            if secret is None:
                if not name.endswith("_previous"):
                    problems.append(f"{name.upper()} is not set (production needs one)")
            elif len(secret.encode()) < MIN_SECRET_BYTES:
                problems.append(f"{name.upper()} is shorter than {MIN_SECRET_BYTES} bytes")
            elif is_well_known(secret):
                problems.append(
                    f"{name.upper()} is not secret: it is the value of a published example"
                )
        if self.ws_console_tokens:
            problems.append("WS_CONSOLE_TOKENS admits anybody (it is for development)")
        if "*" in self.allowed_origins:
            problems.append("ALLOWED_ORIGINS is a wildcard (production needs a list)")
        if not self.allow_redis_without_password and _is_open(self.redis_url):
            problems.append(
                "REDIS_URL has no password and is not on this machine"
                " (ALLOW_REDIS_WITHOUT_PASSWORD=true if the network is private)"
            )
        return problems

    @property
    def _secrets_in_use(self) -> list[str]:
        staff = ["jwt_secret", "jwt_secret_previous"] if _HMAC & set(self.jwt_algorithms) else []
        return [*staff, "table_token_secret", "table_token_secret_previous"]

    @cached_property
    def routes(self) -> Routing:
        """The routing table in force."""
        if self.ws_routes_file is None:
            return ROUTES
        try:
            return read_routes(self.ws_routes_file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
            raise InvalidSettings([f"WS_ROUTES_FILE {self.ws_routes_file}: {reason}"]) from None
        except InvalidRoutes as error:
            raise InvalidSettings([f"WS_ROUTES_FILE {self.ws_routes_file}: {error}"]) from None

    @cached_property
    def staff_secret(self) -> str:
        """``JWT_SECRET``, or in development a random secret that no token was signed with yet."""
        return self.jwt_secret or _random_secret("staff")

    @cached_property
    def table_secret(self) -> str:
        """``TABLE_TOKEN_SECRET``, or in development a random secret."""
        return self.table_token_secret or _random_secret("table")

    @cached_property
    def staff_keys(self) -> tuple[Key, ...]:
        """The keys that staff tokens may be signed with."""
        keys = []
        if hmacs := tuple(name for name in self.jwt_algorithms if name in _HMAC):
            keys = [Key(s, hmacs) for s in (self.staff_secret, self.jwt_secret_previous) if s]
        if self.jwt_public_key:
            keys += [
                Key(public_key, tuple(sorted(fitting)))
                for public_key in _read_public_keys(self.jwt_public_key)
                if (fitting := algorithms_of(public_key) & set(self.jwt_algorithms))
            ]
        return tuple(keys)

    @cached_property
    def table_keys(self) -> tuple[Key, ...]:
        """The keys that table tokens may be signed with."""
        secrets = (self.table_secret, self.table_token_secret_previous)
        return tuple(Key(secret, ("HS256",)) for secret in secrets if secret)

    @cached_property
    def rules(self) -> Rules:
        """What a staff token must satisfy besides its signature."""
        return Rules(issuer=self.jwt_issuer, audience=self.jwt_audience, leeway=self.jwt_leeway)

    @cached_property
    def service_days(self) -> ServiceDays:
        """The time zones, the cutoff and the shifts that decide which assignments are in force."""
        problems = []
        zone, zones, windows = ServiceDays().zone, {}, {}
        try:
            zone = read_zone(self.service_time_zone)
        except ValueError as error:
            problems.append(f"SERVICE_TIME_ZONE: {error}")
        try:
            zones = dict(read_zones(self.service_time_zones))
        except ValueError as error:
            problems.append(f"SERVICE_TIME_ZONES: {error}")
        try:
            windows = dict(read_windows(self.shift_windows))
        except ValueError as error:
            problems.append(f"SHIFT_WINDOWS: {error}")
        if problems:
            raise InvalidSettings(problems)
        return ServiceDays(zone, zones, self.service_day_cutoff, windows)

    @cached_property
    def sector_column_names(self) -> Mapping[str, str]:
        """The columns of the sector table that have names of their own, by our names."""
        found = {}
        for item in self.sector_columns:
            name, equals, called = item.partition("=")
            if not equals or not called or name not in SECTOR_COLUMNS:
                known = ", ".join(SECTOR_COLUMNS)
                raise InvalidSettings(
                    [f"SECTOR_COLUMNS: {item} is not name=column (names: {known})"]
                )
            found[name] = called
        return found

    @property
    def production(self) -> bool:
        """Whether ``ENVIRONMENT`` is ``production``."""
        return self.environment == "production"

    @property
    def json_logs(self) -> bool:
        """Whether logs are JSON: ``LOG_FORMAT``, and in production by default."""
        return (self.log_format or ("json" if self.production else "console")) == "json"

    @property
    def warnings(self) -> list[str]:
        """Problems that do not prevent the start, as texts for operators."""
        found = []
        if self.jwt_secret is None and _HMAC & set(self.jwt_algorithms):
            found.append("JWT_SECRET is not set: it is random, so no staff token is valid")
        if self.table_token_secret is None:
            found.append("TABLE_TOKEN_SECRET is not set: it is random, so no table token is valid")
        if self.jwt_secret is not None and self.jwt_secret == self.table_token_secret:
            found.append("JWT_SECRET and TABLE_TOKEN_SECRET are the same: use two")
        for name in RedisAddress.from_url(self.redis_url).ignored:
            found.append(f"REDIS_URL: {name} has no effect: the gateway sets it itself")
        url = urlsplit(self.jwt_jwks_url or "")
        if url.scheme == "http" and not is_loopback(url.hostname or ""):
            found.append("JWT_JWKS_URL is not https: anybody on the way can forge tokens")
        for name in self._secrets_in_use:
            secret = getattr(self, name)
            if secret is not None and len(secret.encode()) < MIN_SECRET_BYTES:
                found.append(f"{name.upper()} is shorter than {MIN_SECRET_BYTES} bytes")
        return found + self._interval_warnings()

    def _interval_warnings(self) -> list[str]:
        """Warnings about intervals that do not fit each other, usual clients or usual proxies."""
        heartbeat, receive = self.ws_heartbeat_timeout, self.ws_receive_timeout
        found = []
        if self.ws_ping_interval >= heartbeat:
            found.append(
                f"WS_PING_INTERVAL ({self.ws_ping_interval:g} s) is not below WS_HEARTBEAT_TIMEOUT"
                f" ({heartbeat:g} s): a dead connection is found only by the heartbeat timeout"
            )
        if self.ws_ping_interval >= _USUAL_IDLE_TIMEOUT:
            found.append(
                f"WS_PING_INTERVAL ({self.ws_ping_interval:g} s) is not below {_USUAL_IDLE_TIMEOUT}"
                " s: EventSource polyfills reconnect then, and from 60 s proxies close connections"
            )
        if receive < heartbeat:
            found.append(
                f"WS_RECEIVE_TIMEOUT ({receive:g} s) is below WS_HEARTBEAT_TIMEOUT"
                f" ({heartbeat:g} s), which then never applies"
            )
        if min(heartbeat, receive) < 2 * _USUAL_PING:
            name = "WS_HEARTBEAT_TIMEOUT" if heartbeat <= receive else "WS_RECEIVE_TIMEOUT"
            found.append(
                f"{name} ({min(heartbeat, receive):g} s) is below {2 * _USUAL_PING} s: clients that"
                f" ping every {_USUAL_PING} s and do not ask for the intervals are closed with 4008"
                " when one ping is late"
            )
        return found


# An environment variable of the workers: the seed of their common random secrets.
DEVELOPMENT_SECRET = "TRIO_GATEWAY_DEVELOPMENT_SECRET"  # noqa: S105 - a name


def _random_secret(kind: str) -> str:
    """A random secret; all workers of a supervisor have the same one."""
    seed = os.environ.get(DEVELOPMENT_SECRET)
    if seed is None:
        return secrets.token_urlsafe(MIN_SECRET_BYTES)
    return hmac.new(seed.encode(), kind.encode(), "sha256").hexdigest()


NAMES = frozenset(name.upper() for name in Settings.model_fields)


def load_settings(env_file: str = ".env") -> Settings:
    """Read the settings from the environment, and those it does not set from ``env_file``.

    Raises :exc:`InvalidSettings` for invalid values, for unknown names that begin with ``WS_``, and
    for what production requires. No text contains the value of a secret.
    """
    try:
        in_file = dotenv_values(env_file)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise InvalidSettings([f"{env_file}: {reason}"]) from None
    problems = [_unknown(name) for name in sorted({*os.environ, *in_file})]
    problems = [problem for problem in problems if problem]
    try:
        settings = Settings(_env_file=env_file)  # type: ignore[call-arg]  # pydantic-settings takes it
    except ValidationError as error:
        raise InvalidSettings(problems + _explain(error)) from None
    if problems:
        raise InvalidSettings(problems)
    return settings


def _unknown(name: str) -> str:
    """The problem with a name that begins with ``WS_`` and is not a setting, or ``""``."""
    if not name.upper().startswith("WS_") or name.upper() in NAMES:
        return ""
    close = difflib.get_close_matches(name.upper(), NAMES, n=1)
    return f"unknown setting: {name}" + (f" (did you mean {close[0]}?)" if close else "")


def _explain(error: ValidationError) -> list[str]:
    problems = []
    for each in error.errors(include_url=False, include_input=False, include_context=False):
        text = each["msg"].removeprefix("Value error, ")
        where = "_".join(str(part) for part in each["loc"][:1]).upper()
        problems += [f"{where}: {text}"] if where else text.splitlines()
    return problems


_OTEL = ("opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.http")


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # its parent package is not installed, either
        return False


def _is_open(redis_url: str) -> bool:
    """Whether anybody on the network may be able to publish to this Redis."""
    parts = urlsplit(redis_url)
    if parts.scheme == "unix" or parts.password or "password" in parse_qs(parts.query):
        return False
    return not is_loopback(parts.hostname or "localhost")


def _read_public_keys(text: str) -> list[Any]:
    try:
        return public_keys(text)
    except ValueError as error:
        raise InvalidSettings([f"JWT_PUBLIC_KEY {error}"]) from None
