"""The settings: names, types and defaults, and the check of each value alone."""

import re
from datetime import time
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from ..core.event_ids import DEFAULT_STREAM
from ..core.origins import read_origin
from ..core.shards import MAX_SHARDS
from ..keys import SIGNATURES
from ..redis_url import RedisUrl

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
_BIND = re.compile(
    r"(?:[a-z0-9._-]+|\[[0-9a-f:.]+\]):(?P<port>[0-9]{1,5})", re.ASCII | re.IGNORECASE
)
HMAC = frozenset({"HS256", "HS384", "HS512"})

_List = Annotated[tuple[str, ...], NoDecode]
_Count = Annotated[int, Field(ge=1)]
_Shards = Annotated[int, Field(ge=1, le=MAX_SHARDS)]
_Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class SettingValues(BaseSettings):
    """Every setting of the gateway, with its default (contract, section 6).

    Times are in seconds, sizes in bytes.
    """

    model_config = SettingsConfigDict(
        frozen=True,
        extra="ignore",
        hide_input_in_errors=True,
        # Compose files and unit files write an empty value for "not set".
        env_ignore_empty=True,
    )

    ws_max_connections_per_user: _Count = 3
    ws_max_connections_per_session: _Count = 20
    ws_max_connections_per_tenant: Annotated[int, Field(ge=0)] = 0  # 0 = off
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
    ws_resume_from_stream: Annotated[int, Field(ge=0)] = 10_000
    ws_tenant_event_rate: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0
    ws_uncovered_sector: Literal["none", "branch"] = "none"
    ws_drop_alarm_window: _Seconds = 60
    ws_drop_alarm_threshold: Annotated[float, Field(ge=0, le=1)] = 0.05
    ws_drop_alarm_cooldown: _Seconds = 300
    ws_routes_file: Path | None = None
    ws_cluster: bool = False  # limits and presence apply over all processes on the same Redis
    ws_receipt_ttl: _Seconds = 3600.0
    ws_slo_seconds: _Seconds = 1.0  # an event that takes longer is late
    ws_presence_grace: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 15
    ws_presence_stream: str | None = None  # joins and leaves are added to it
    ws_api_keys_file: Path | None = None  # enables the API for backends
    ws_tracing: bool = False  # needs the extra "otel"
    ws_console_tokens: bool = False  # the console mints tokens; in development only
    ws_max_handshakes: _Count = 1000  # in progress at a time
    ws_max_connections_per_address: Annotated[int, Field(ge=0)] = 0  # 0 = off
    ws_max_failed_logins: Annotated[int, Field(ge=0)] = 0  # per address and minute; 0 = off
    ws_operations_bind: str | None = None  # host:port; serves metrics and details only there
    ws_proxy_hops: Annotated[int, Field(ge=0)] = 0  # trusted proxies that add X-Forwarded-For

    redis_url: str = Field(default="redis://localhost:6380", repr=False)
    allow_redis_without_password: bool = False
    redis_channel_patterns: _List = _PATTERNS
    redis_streams: _List = (DEFAULT_STREAM,)
    redis_stream_shards: _Shards = 1
    redis_stream_shards_previous: _Shards = 1  # before a change: those streams are read, too
    redis_dlq_stream: str | None = None  # invalid stream entries are copied to it
    redis_event_queue_size: _Count = 5000
    redis_event_batch_size: _Count = 50
    redis_event_max_wait: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 2
    redis_pool_max_connections: _Count = 50
    circuit_failure_threshold: _Count = 5
    circuit_recovery_timeout: _Seconds = 30

    jwt_secret: str | None = Field(default=None, repr=False)
    table_token_secret: str | None = Field(default=None, repr=False)
    # Tokens signed with a previous secret are still accepted, so that secrets can be rotated.
    jwt_secret_previous: str | None = Field(default=None, repr=False)
    table_token_secret_previous: str | None = Field(default=None, repr=False)
    jwt_algorithms: _List = ("HS256",)
    jwt_public_key: str | None = Field(default=None, repr=False)
    jwt_jwks_url: str | None = None
    jwt_issuer: str | None = None
    jwt_audience: str | None = None
    # Seconds that nbf and iat may be in the future; exp is exact.
    jwt_leeway: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 10
    jwt_revalidation_interval: _Seconds = 300
    allow_legacy_table_tokens: bool = False
    allowed_origins: _List = _ORIGINS

    database_url: str | None = Field(default=None, repr=False)
    sector_cache_ttl: _Seconds = 300
    sector_table: str = "waiter_sector_assignment"
    sector_columns: _List = ()  # name=column, for each column with another name
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
            if name not in HMAC | SIGNATURES:
                known = ", ".join(sorted(HMAC | SIGNATURES))
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
            raise ValueError("must have no time zone: set SERVICE_TIME_ZONE instead")
        return value

    @field_validator("redis_url")
    @classmethod
    def _usable_redis_url(cls, value: str) -> str:
        RedisUrl.from_url(value).check()
        return value

    @field_validator("jwt_jwks_url")
    @classmethod
    def _http_url(cls, value: str | None) -> str | None:
        if value is not None and not (
            urlsplit(value).scheme in {"http", "https"} and urlsplit(value).hostname
        ):
            raise ValueError("must begin with https:// or http://, and name a host")
        return value
