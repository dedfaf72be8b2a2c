"""Redis URLs: where Redis is, with credentials and TLS options.

The sources, the commands, the publisher and the CLI all read their URL with this module, so that
each option has the same meaning everywhere.
"""

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from enum import StrEnum
from typing import Any, Final
from urllib.parse import parse_qsl, unquote, urlsplit

from .redis_tls import TLS_OPTIONS, Tls

PORT: Final = 6379
SENTINEL_PORT: Final = 26379


class RedisKind(StrEnum):
    """What a URL leads to."""

    SINGLE = "single"  # one server; its name may lead to another one after a failover
    SENTINEL = "sentinel"
    CLUSTER = "cluster"


_KINDS: Final[Mapping[str, RedisKind]] = {
    "redis": RedisKind.SINGLE,
    "rediss": RedisKind.SINGLE,
    "unix": RedisKind.SINGLE,
    "redis+sentinel": RedisKind.SENTINEL,
    "rediss+sentinel": RedisKind.SENTINEL,
    "redis+cluster": RedisKind.CLUSTER,
    "rediss+cluster": RedisKind.CLUSTER,
}
_NAME: Final = re.compile(r"[a-z_]{1,40}")
_MASTER_NAME: Final = re.compile(r"[A-Za-z0-9._-]+")  # the characters that Sentinel allows
_REST: Final = re.compile(r"([^/?#]*)([^?#]*)(.*)", re.DOTALL)  # authority, path, the rest
# Options of redis-py that have no effect here: the gateway decides these itself.
_IGNORED: Final = frozenset({
    "socket_timeout", "socket_connect_timeout", "socket_read_size", "socket_keepalive",
    "retry_on_timeout", "retry_on_error", "max_connections", "health_check_interval", "timeout",
    "protocol", "legacy_responses", "encoding", "encoding_errors", "decode_responses",
    "lib_name", "lib_version",
})  # fmt: skip
_SENTINEL_OPTIONS: Final = frozenset({"sentinel_username", "sentinel_password"})
_KNOWN: Final = (
    frozenset({"db", "username", "password", "client_name"})
    | _SENTINEL_OPTIONS
    | TLS_OPTIONS
    | _IGNORED
)


@dataclass(frozen=True, slots=True)
class RedisAddress:
    """Address and credentials of one Redis server. The ``repr`` has no password."""

    host: str = "localhost"
    port: int = PORT
    path: str | None = None  # of a unix socket
    tls: Tls | None = None
    db: int = 0
    user: str | None = None
    password: str | None = field(default=None, repr=False)
    client_name: str | None = None
    ignored: tuple[str, ...] = ()  # options that have no effect here
    # A server that refuses the credentials is used without them: it may need none.
    optional_auth: bool = False

    @classmethod
    def from_url(
        cls, url: str, *, kind: RedisKind = RedisKind.SINGLE, default_port: int = PORT
    ) -> "RedisAddress":
        """Read a ``redis://``, ``rediss://`` or ``unix://`` URL, with the options of ``kind``.

        Raises :exc:`ValueError` for any other URL, an unknown option or an invalid value. The
        text names the option and contains no value.
        """
        try:
            parts = urlsplit(url)
        except ValueError:  # its text contains parts of the URL
            raise ValueError("is not a URL: write %5B and %5D for [ and ] in a password") from None
        if _KINDS.get(parts.scheme) is not RedisKind.SINGLE:
            raise ValueError("must begin with redis://, rediss:// or unix://")
        if "," in parts.netloc.rpartition("@")[2]:
            raise ValueError("has several hosts: write redis+sentinel:// or redis+cluster://")
        try:
            port = parts.port or default_port
        except ValueError:
            raise ValueError("has an invalid port") from None
        if parts.fragment:
            raise ValueError("contains a #: write %23 in a password")
        options = _options(parts.query, kind, tls=parts.scheme == "rediss")
        in_path = "" if parts.scheme == "unix" else unquote(parts.path).strip("/")
        db = options.pop("db", in_path) or "0"
        if not (db.isascii() and db.isdigit()):
            raise ValueError("has a database that is not a number")
        user, password = options.pop("username", None), options.pop("password", None)
        found = cls(
            host=unquote(parts.hostname or "localhost"),
            port=port,
            path=unquote(parts.path) if parts.scheme == "unix" else None,
            tls=Tls.from_options(options) if parts.scheme == "rediss" else None,
            db=int(db),
            user=unquote(parts.username) if parts.username else user,
            password=unquote(parts.password) if parts.password else password,
            client_name=options.pop("client_name", None) or None,
            ignored=tuple(sorted(options.keys() & _IGNORED)),
        )
        if found.path == "":
            raise ValueError("has no path of a unix socket")
        return found

    def check(self) -> None:
        """Raise :exc:`ValueError` if a file that an option names can't be used."""
        if self.tls is not None:
            self.tls.check()

    def pool_options(self, library: Any) -> dict[str, Any]:
        """Arguments for a connection pool of ``redis`` or ``redis.asyncio``.

        ``library`` is that module.
        """
        found: dict[str, Any] = {
            "db": self.db,
            "username": self.user,
            "password": self.password,
            "client_name": self.client_name,
        }
        if self.path is not None:
            connection = library.UnixDomainSocketConnection
            return found | {"connection_class": connection, "path": self.path}
        found |= {"host": self.host, "port": self.port}
        if self.tls is None:
            return found | {"connection_class": library.Connection}
        for each in fields(self.tls):
            if (value := getattr(self.tls, each.name)) is not None:
                found[f"ssl_{each.name}"] = list(value) if isinstance(value, tuple) else value
        return found | {"connection_class": library.SSLConnection}

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return self.path or f"{host}:{self.port}"


@dataclass(frozen=True, slots=True)
class RedisUrl:
    """Where Redis is: one server, or those that know the primaries.

    Neither ``repr`` nor ``str`` has a password.
    """

    kind: RedisKind
    # The server; or Sentinels, with the credentials for Sentinels; or nodes of the Cluster.
    seeds: tuple[RedisAddress, ...]
    data: RedisAddress  # credentials, TLS and database of the servers that hold the data
    master_name: str = ""  # of the primary, as the Sentinels call it

    @classmethod
    def from_url(cls, url: str) -> "RedisUrl":
        """Read a URL of any kind.

        Raises :exc:`ValueError` for an unknown scheme or option, or an invalid value. The text
        names the option and contains no value.
        """
        scheme, _, rest = url.strip().partition("://")
        scheme = scheme.lower()
        kind = _KINDS.get(scheme)
        if kind is None:
            raise ValueError(
                "must begin with redis://, redis+sentinel:// or redis+cluster:// (rediss… for TLS),"
                " or unix://"
            )
        if kind is RedisKind.SINGLE:
            server = RedisAddress.from_url(url)
            return cls(kind, (server,), server)
        parts = _REST.fullmatch(rest)
        assert parts is not None
        authority, path, options = parts.groups()
        userinfo, at, hosts = authority.rpartition("@")
        path, port, master_name = path.strip("/"), PORT, ""
        if kind is RedisKind.SENTINEL:
            master_name, _, path = path.partition("/")
            port = SENTINEL_PORT
        names = hosts.split(",")
        if any(name.partition(":")[0] == "" for name in names):
            raise ValueError("has no host between two commas, or none at all")
        base = f"{scheme.partition('+')[0]}://{userinfo}{at}"
        found = (
            RedisAddress.from_url(f"{base}{name}/{path}{options}", kind=kind, default_port=port)
            for name in names
        )
        seeds = tuple(dict.fromkeys(found))
        if kind is RedisKind.CLUSTER:
            if seeds[0].db:
                raise ValueError("has a database: a Cluster has only database 0")
            return cls(kind, seeds, seeds[0])
        if not _MASTER_NAME.fullmatch(master_name):
            raise ValueError(
                "must name the primary behind the Sentinels: redis+sentinel://host:26379/mymaster"
            )
        sentinels = tuple(_sentinel(seed, options) for seed in seeds)
        return cls(kind, sentinels, seeds[0], master_name)

    @property
    def ignored(self) -> tuple[str, ...]:
        """The options that have no effect here."""
        return self.data.ignored

    def node(self, host: str, port: int) -> RedisAddress:
        """The address of a server with data: a primary or a replica."""
        return replace(self.data, host=host, port=port)

    def check(self) -> None:
        """Raise :exc:`ValueError` if a file that an option names can't be used."""
        self.data.check()

    def __str__(self) -> str:
        name = f"/{self.master_name}" if self.master_name else ""
        return ",".join(map(str, self.seeds)) + name


def _sentinel(server: RedisAddress, query: str) -> RedisAddress:
    """The address of a Sentinel, with the credentials for Sentinels."""
    options = dict(parse_qsl(query.removeprefix("?"), keep_blank_values=True))
    if _SENTINEL_OPTIONS & options.keys():
        user, password = options.get("sentinel_username"), options.get("sentinel_password")
        return replace(server, db=0, user=user or None, password=password or None)
    # Those of the data, which often are the same.
    return replace(server, db=0, optional_auth=True)


def _options(query: str, kind: RedisKind, *, tls: bool) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, value in parse_qsl(query, keep_blank_values=True):
        if name not in _KNOWN:
            # The rest of a password that contains "?" is read as an option: do not show it.
            if "@" in query or f"{name}=" not in query or not _NAME.fullmatch(name):
                raise ValueError("has an unknown option (write %3F and %40 in a password)")
            close = difflib.get_close_matches(name, _KNOWN, n=1)
            hint = f" (did you mean {close[0]}?)" if close else ""
            raise ValueError(f"has an unknown option: {name}{hint}")
        if name in found:
            raise ValueError(f"has {name} twice")
        if name in TLS_OPTIONS and not tls:
            raise ValueError(f"has {name}, which needs rediss://")
        if name in _SENTINEL_OPTIONS and kind is not RedisKind.SENTINEL:
            raise ValueError(f"has {name}, which needs redis+sentinel://")
        found[name] = value
    return found
