"""Redis URLs: address, credentials and TLS options.

The sources, the commands, the publisher and the CLI all read their URL with this module, so that
each option has the same meaning everywhere.
"""

import difflib
import re
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Final
from urllib.parse import parse_qsl, unquote, urlsplit

SCHEMES: Final = frozenset({"redis", "rediss", "unix"})
_TRUE: Final = frozenset({"1", "t", "true", "y", "yes"})
_FALSE: Final = frozenset({"0", "f", "false", "n", "no"})
_VERIFY: Final = {
    "none": ssl.CERT_NONE,
    "optional": ssl.CERT_OPTIONAL,
    "required": ssl.CERT_REQUIRED,
}
_NAME: Final = re.compile(r"[a-z_]{1,40}")
# Options of redis-py that have no effect here: the gateway decides these itself.
_IGNORED: Final = frozenset({
    "socket_timeout", "socket_connect_timeout", "socket_read_size", "socket_keepalive",
    "retry_on_timeout", "retry_on_error", "max_connections", "health_check_interval", "timeout",
    "protocol", "legacy_responses", "encoding", "encoding_errors", "decode_responses",
    "lib_name", "lib_version",
})  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Tls:
    """Certificates and TLS parameters: the ``ssl_*`` options of redis-py."""

    ca_certs: str | None = None
    ca_path: str | None = None
    ca_data: str | None = field(default=None, repr=False)
    certfile: str | None = None
    keyfile: str | None = None
    password: str | None = field(default=None, repr=False)
    cert_reqs: str = "required"
    check_hostname: bool = True
    min_version: ssl.TLSVersion | None = None
    ciphers: str | None = None
    include_verify_flags: tuple[ssl.VerifyFlags, ...] | None = None
    exclude_verify_flags: tuple[ssl.VerifyFlags, ...] | None = None

    def context(self) -> ssl.SSLContext:
        """Build the context.

        Raises :exc:`OSError` or :exc:`ValueError` if a file or a value is invalid.
        """
        context = ssl.create_default_context()
        context.check_hostname = self.check_hostname and self.cert_reqs != "none"
        context.verify_mode = _VERIFY[self.cert_reqs]
        for flag in self.include_verify_flags or ():
            context.verify_flags |= flag
        for flag in self.exclude_verify_flags or ():
            context.verify_flags &= ~flag
        if self.certfile is not None:
            # Without a password OpenSSL would ask for one at the terminal.
            context.load_cert_chain(self.certfile, self.keyfile, self.password or "")
        if self.ca_certs or self.ca_path or self.ca_data:
            context.load_verify_locations(self.ca_certs, self.ca_path, self.ca_data)
        if self.min_version is not None:
            context.minimum_version = self.min_version
        if self.ciphers is not None:
            context.set_ciphers(self.ciphers)
        return context

    def check(self) -> None:
        """Raise :exc:`ValueError` if a file or value is invalid; the text names the option."""
        if self.keyfile is not None and self.certfile is None:
            raise ValueError("ssl_keyfile needs ssl_certfile")
        parts = (
            ("ssl_ca_certs", Tls(ca_certs=self.ca_certs)),
            ("ssl_ca_path", Tls(ca_path=self.ca_path)),
            ("ssl_ca_data", Tls(ca_data=self.ca_data)),
            (
                "ssl_certfile" if self.keyfile is None else "ssl_certfile and ssl_keyfile",
                Tls(certfile=self.certfile, keyfile=self.keyfile, password=self.password),
            ),
            ("ssl_ciphers", Tls(ciphers=self.ciphers)),
            ("ssl_min_version", Tls(min_version=self.min_version)),
        )
        for name, part in parts:
            if part == Tls():
                continue
            try:
                part.context()
            except ssl.SSLError as error:
                reason = (getattr(error, "reason", None) or "").replace("_", " ").lower()
                raise ValueError(f"{name} can't be used ({reason or 'TLS error'})") from None
            except OSError as error:
                raise ValueError(f"{name} can't be read ({error.strerror})") from None
            except ValueError:
                raise ValueError(f"{name} can't be used") from None


@dataclass(frozen=True, slots=True)
class RedisAddress:
    """Address and credentials of a Redis, from its URL. The ``repr`` has no password."""

    host: str = "localhost"
    port: int = 6379
    path: str | None = None  # of a unix socket
    tls: Tls | None = None
    db: int = 0
    user: str | None = None
    password: str | None = field(default=None, repr=False)
    client_name: str | None = None
    ignored: tuple[str, ...] = ()  # options that have no effect here

    @classmethod
    def from_url(cls, url: str) -> "RedisAddress":
        """Read a ``redis://``, ``rediss://`` or ``unix://`` URL.

        Raises :exc:`ValueError` for any other URL, an unknown option or an invalid value. The
        text names the option and contains no value.
        """
        try:
            parts = urlsplit(url)
        except ValueError:  # its text contains parts of the URL
            raise ValueError("is not a URL: write %5B and %5D for [ and ] in a password") from None
        if parts.scheme not in SCHEMES:
            raise ValueError("must begin with redis://, rediss:// or unix://")
        try:
            port = parts.port or 6379
        except ValueError:
            raise ValueError("has an invalid port") from None
        if parts.fragment:
            raise ValueError("contains a #: write %23 in a password")
        options = _options(parts.query, tls=parts.scheme == "rediss")
        in_path = "" if parts.scheme == "unix" else unquote(parts.path).strip("/")
        db = options.pop("db", in_path) or "0"
        if not (db.isascii() and db.isdigit()):
            raise ValueError("has a database that is not a number")
        user, password = options.pop("username", None), options.pop("password", None)
        found = cls(
            host=unquote(parts.hostname or "localhost"),
            port=port,
            path=unquote(parts.path) if parts.scheme == "unix" else None,
            tls=_tls(options) if parts.scheme == "rediss" else None,
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
        return self.path or f"{self.host}:{self.port}"


def _text(value: str) -> str:
    return value


def _bool(value: str) -> bool:
    if value.lower() not in _TRUE | _FALSE:
        raise ValueError("must be true or false")
    return value.lower() in _TRUE


def _cert_reqs(value: str) -> str:
    if value not in _VERIFY:
        raise ValueError(f"must be one of {', '.join(_VERIFY)}")
    return value


def _min_version(value: str) -> ssl.TLSVersion:
    known = {"771": ssl.TLSVersion.TLSv1_2, "772": ssl.TLSVersion.TLSv1_3}
    if value not in known:
        raise ValueError("must be 771 (TLS 1.2) or 772 (TLS 1.3)")
    return known[value]


def _flags(value: str) -> tuple[ssl.VerifyFlags, ...]:
    names = [name.strip() for name in value.strip("[]").split(",") if name.strip()]
    try:
        return tuple(ssl.VerifyFlags[name] for name in names)
    except KeyError:
        raise ValueError("must be names of ssl.VerifyFlags") from None


_TLS: Final[Mapping[str, Callable[[str], Any]]] = {
    "ssl_ca_certs": _text,
    "ssl_ca_path": _text,
    "ssl_ca_data": _text,
    "ssl_certfile": _text,
    "ssl_keyfile": _text,
    "ssl_password": _text,
    "ssl_cert_reqs": _cert_reqs,
    "ssl_check_hostname": _bool,
    "ssl_min_version": _min_version,
    "ssl_ciphers": _text,
    "ssl_include_verify_flags": _flags,
    "ssl_exclude_verify_flags": _flags,
}
_KNOWN: Final = frozenset({"db", "username", "password", "client_name"}) | _IGNORED | set(_TLS)


def _options(query: str, *, tls: bool) -> dict[str, str]:
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
        if name in _TLS and not tls:
            raise ValueError(f"has {name}, which needs rediss://")
        found[name] = value
    return found


def _tls(options: Mapping[str, str]) -> Tls:
    found: dict[str, Any] = {}
    for name, read in _TLS.items():
        if name in options:
            if not options[name]:
                raise ValueError(f"has an empty {name}")
            try:
                found[name.removeprefix("ssl_")] = read(options[name])
            except ValueError as error:
                raise ValueError(f"has {name}, which {error}") from None
    return Tls(**found)
