"""TLS options of Redis URLs: the ``ssl_*`` options of redis-py."""

import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

_TRUE: Final = frozenset({"1", "t", "true", "y", "yes"})
_FALSE: Final = frozenset({"0", "f", "false", "n", "no"})
_VERIFY: Final = {
    "none": ssl.CERT_NONE,
    "optional": ssl.CERT_OPTIONAL,
    "required": ssl.CERT_REQUIRED,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Tls:
    """Certificates and TLS parameters."""

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

    @classmethod
    def from_options(cls, options: Mapping[str, str]) -> "Tls":
        """Read the options of a URL; those of other names are ignored.

        Raises :exc:`ValueError`; the text names the option and contains no value.
        """
        found: dict[str, Any] = {}
        for name, read in _READERS.items():
            if name in options:
                if not options[name]:
                    raise ValueError(f"has an empty {name}")
                try:
                    found[name.removeprefix("ssl_")] = read(options[name])
                except ValueError as error:
                    raise ValueError(f"has {name}, which {error}") from None
        return cls(**found)

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


_READERS: Final[Mapping[str, Callable[[str], Any]]] = {
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
TLS_OPTIONS: Final = frozenset(_READERS)
