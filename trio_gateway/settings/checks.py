"""Checks of several settings together: problems that prevent the start, and warnings."""

from collections.abc import Iterable
from importlib.util import find_spec
from typing import Final
from urllib.parse import urlsplit

from ..core.event_ids import tag
from ..core.origins import is_loopback
from ..core.shards import Sharding
from ..keys import MIN_SECRET_BYTES, SIGNATURES, is_well_known
from ..redis_url import RedisKind, RedisUrl
from .values import HMAC, SettingValues

_USUAL_IDLE_TIMEOUT: Final = 45  # seconds, of event-source-polyfill; the default of proxies is 60
_USUAL_PING: Final = 25  # seconds between the pings of our clients, by default
_OTEL: Final = ("opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.http")


def problems_of(settings: SettingValues) -> list[str]:
    """The problems that prevent the start, as texts that name the settings."""
    problems = []
    signatures = SIGNATURES & set(settings.jwt_algorithms)
    if signatures and not (settings.jwt_public_key or settings.jwt_jwks_url):
        problems.append(
            "JWT_ALGORITHMS names a public-key algorithm: set JWT_PUBLIC_KEY or JWT_JWKS_URL"
        )
    problems += _stream_problems(settings)
    if settings.ws_tracing and not all(map(_is_installed, _OTEL)):
        problems.append("WS_TRACING needs other packages: pip install 'trio-gateway[otel]'")
    if settings.environment == "production":
        problems += _production_problems(settings)
    return problems


def warnings_of(settings: SettingValues) -> list[str]:
    """Problems that do not prevent the start, as texts for operators."""
    found = []
    if settings.jwt_secret is None and HMAC & set(settings.jwt_algorithms):
        found.append("JWT_SECRET is not set: it is random, so no staff token is valid")
    if settings.table_token_secret is None:
        found.append("TABLE_TOKEN_SECRET is not set: it is random, so no table token is valid")
    if settings.jwt_secret is not None and settings.jwt_secret == settings.table_token_secret:
        found.append("JWT_SECRET and TABLE_TOKEN_SECRET are the same: use two different secrets")
    if settings.ws_presence_stream is not None and not settings.ws_cluster:
        found.append("WS_PRESENCE_STREAM has no effect: presence is known with WS_CLUSTER=true")
    for name in RedisUrl.from_url(settings.redis_url).ignored:
        found.append(f"REDIS_URL: {name} has no effect: the gateway sets it itself")
    url = urlsplit(settings.jwt_jwks_url or "")
    if url.scheme == "http" and not is_loopback(url.hostname or ""):
        found.append("JWT_JWKS_URL is not https: anyone on the network path can forge tokens")
    for name in _secrets_in_use(settings):
        secret = getattr(settings, name)
        if secret is not None and len(secret.encode()) < MIN_SECRET_BYTES:
            found.append(f"{name.upper()} is shorter than {MIN_SECRET_BYTES} bytes")
    return found + _interval_warnings(settings)


def _interval_warnings(settings: SettingValues) -> list[str]:
    """Warnings about intervals that do not fit each other, usual clients or usual proxies."""
    heartbeat, receive = settings.ws_heartbeat_timeout, settings.ws_receive_timeout
    found = []
    if settings.ws_ping_interval >= heartbeat:
        found.append(
            f"WS_PING_INTERVAL ({settings.ws_ping_interval:g} s) is not below WS_HEARTBEAT_TIMEOUT"
            f" ({heartbeat:g} s): a dead connection is found only by the heartbeat timeout"
        )
    if settings.ws_ping_interval >= _USUAL_IDLE_TIMEOUT:
        found.append(
            f"WS_PING_INTERVAL ({settings.ws_ping_interval:g} s) is not below {_USUAL_IDLE_TIMEOUT}"
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


def sharding_of(settings: SettingValues) -> Sharding:
    """In which streams the events of a tenant are."""
    return Sharding(
        tuple(dict.fromkeys(settings.redis_streams)),
        shards=settings.redis_stream_shards,
        previous=_previous_shards(settings),
    )


def _previous_shards(settings: SettingValues) -> int:
    """The number of shards before a change; in a Cluster, where there is none, the present one.

    The times of entries in different nodes are those of different clocks, so the entries of an old
    and of a new stream have no order that clients could resume in.
    """
    if "redis_stream_shards_previous" in settings.model_fields_set or not _is_cluster(settings):
        return settings.redis_stream_shards_previous
    return settings.redis_stream_shards


def _is_cluster(settings: SettingValues) -> bool:
    return RedisUrl.from_url(settings.redis_url).kind is RedisKind.CLUSTER


def _stream_problems(settings: SettingValues) -> list[str]:
    problems = _shard_problems(settings)
    if problems:
        return problems
    names = sharding_of(settings).names
    if settings.redis_dlq_stream in names:
        problems.append("REDIS_DLQ_STREAM is one of REDIS_STREAMS: each copy would be copied again")
    if settings.ws_presence_stream in {*names, settings.redis_dlq_stream} - {None}:
        problems.append(
            "WS_PRESENCE_STREAM is one of REDIS_STREAMS or REDIS_DLQ_STREAM: name another stream"
        )
    return problems + _streams_with_the_same_tag(names)


def _shard_problems(settings: SettingValues) -> list[str]:
    new, old = settings.redis_stream_shards, _previous_shards(settings)
    if new == old == 1:
        return []
    problems = []
    if len(set(settings.redis_streams)) != 1:
        problems.append(
            "REDIS_STREAM_SHARDS: only one stream can have shards; name one in REDIS_STREAMS"
        )
    elif "{" in settings.redis_streams[0]:
        problems.append(
            "REDIS_STREAMS: the name of a stream with shards can't contain {, which begins a shard"
        )
    if new != old and _is_cluster(settings):
        problems.append(
            f"REDIS_STREAM_SHARDS_PREVIOUS must be {new} or be left out: in a Cluster the number of"
            " shards can't be changed while events are published"
        )
    elif new % old and old % new:
        problems.append(
            f"REDIS_STREAM_SHARDS ({new}) must be a multiple or a divisor of"
            f" REDIS_STREAM_SHARDS_PREVIOUS ({old})"
        )
    return problems


def _streams_with_the_same_tag(names: Iterable[str]) -> list[str]:
    """Event ids name their stream by a tag of 16 bits: no two streams may have the same tag."""
    first: dict[str, str] = {}
    return [
        f"REDIS_STREAMS: events of {other} and of {name} would have the same ids; rename one"
        for name in names
        if (other := first.setdefault(tag(name), name)) != name
    ]


def _production_problems(settings: SettingValues) -> list[str]:
    problems = []
    for name in _secrets_in_use(settings):
        secret = getattr(settings, name)
        if secret is None:
            if not name.endswith("_previous"):
                problems.append(f"{name.upper()} is not set (production requires it)")
        elif len(secret.encode()) < MIN_SECRET_BYTES:
            problems.append(f"{name.upper()} is shorter than {MIN_SECRET_BYTES} bytes")
        elif is_well_known(secret):
            problems.append(f"{name.upper()} is not secret: it was copied from a published example")
    if settings.ws_console_tokens:
        problems.append("WS_CONSOLE_TOKENS mints tokens without authentication (development only)")
    if "*" in settings.allowed_origins:
        problems.append("ALLOWED_ORIGINS contains a wildcard (production requires a list)")
    if not settings.allow_redis_without_password and _is_open(settings.redis_url):
        problems.append(
            "REDIS_URL has no password and is not on this machine"
            " (ALLOW_REDIS_WITHOUT_PASSWORD=true if the network is private)"
        )
    return problems


def _secrets_in_use(settings: SettingValues) -> list[str]:
    """The names of the settings whose secrets sign or verify tokens."""
    staff = ["jwt_secret", "jwt_secret_previous"] if HMAC & set(settings.jwt_algorithms) else []
    return [*staff, "table_token_secret", "table_token_secret_previous"]


def _is_open(redis_url: str) -> bool:
    """Whether anyone on the network may be able to publish to this Redis."""
    url = RedisUrl.from_url(redis_url)
    if url.data.path is not None or url.data.password:
        return False
    return not all(is_loopback(seed.host) for seed in url.seeds)


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # its parent package is not installed, either
        return False
