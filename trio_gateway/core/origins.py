"""Origins: read and compare them as browsers do (RFC 6454, section 4), and check them."""

import ipaddress
import re
from collections.abc import Sequence
from typing import Final

import idna

from .close_codes import Close, Rejected

_ORIGIN: Final = re.compile(
    r"(?P<scheme>[a-z][a-z0-9+.-]*)://"
    r"(?:\[(?P<six>[0-9a-f:.]+)\]|(?P<host>[a-z0-9._~%-]+))(?::(?P<port>[0-9]{1,5}))?",
    re.ASCII | re.IGNORECASE,
)
_WITH_NAME: Final = re.compile(r"(?P<before>[^:/]+://)(?P<host>[^:/?#@\[\]]+)(?P<after>(?::.*)?)")
_DEFAULT_PORTS: Final = {"http": 80, "https": 443, "ws": 80, "wss": 443}


def normalise(text: str) -> str:
    """Return an origin as a browser writes it: lower case, no default port, short IPv6.

    Two origins are the same if their normal forms are equal. Raises :exc:`ValueError` for
    anything that is not ``scheme://host[:port]``, including ``null``.
    """
    if (match := _ORIGIN.fullmatch(text)) is None:
        raise ValueError("not scheme://host[:port]")
    scheme, host = match["scheme"].lower(), match["host"]
    host = f"[{ipaddress.IPv6Address(match['six'])}]" if host is None else host.lower()
    if match["port"] is None:
        return f"{scheme}://{host}"
    port = int(match["port"])
    if not 0 < port < 1 << 16:
        raise ValueError("no such port")
    return f"{scheme}://{host}" + (f":{port}" if _DEFAULT_PORTS.get(scheme) != port else "")


def read_origin(text: str) -> str:
    """Read an origin from a configuration, into the form of :func:`normalise`.

    Its host may be a name in any script, which browsers send as Punycode (UTS 46). Raises
    :exc:`ValueError`.
    """
    if not text.isascii() and (match := _WITH_NAME.fullmatch(text)) is not None:
        # IDNAError is a ValueError.
        host = idna.encode(match["host"], uts46=True).decode("ascii")
        text = match["before"] + host + match["after"]
    return normalise(text)


def is_loopback(host: str) -> bool:
    """Whether this is a loopback address or ``localhost``."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def host_of(text: str) -> str:
    """Return a name or an address without its port and without brackets."""
    host = text.partition("]")[0].removeprefix("[") if text.startswith("[") else text
    return host.partition(":")[0] if host.count(":") == 1 else host


def check_origin(origin: str | None, allowed: Sequence[str], *, required: bool) -> None:
    """Raise :exc:`Rejected` unless a browser on this origin may connect (RFC 6455, 10.2).

    ``allowed`` are origins in the form of :func:`normalise`, or ``*``.
    """
    if origin is None:
        if required:
            raise Rejected(Close.POLICY_VIOLATION, "origin required", "origin")
        return
    try:
        origin = normalise(origin)
    except ValueError:
        raise Rejected(Close.FORBIDDEN, "origin malformed", "origin") from None
    if "*" not in allowed and origin not in allowed:
        raise Rejected(Close.POLICY_VIOLATION, "origin not allowed", "origin")


def is_own_page(origin: str | None, host: str) -> bool:
    """Whether a browser on this machine shows a page that this gateway has served.

    ``host`` is the request's Host header. A name that anybody can point to this machine does not
    count (DNS rebinding).
    """
    if origin is None or not is_loopback(host_of(host)):
        return False
    try:
        return normalise(origin) in {normalise(f"http://{host}"), normalise(f"https://{host}")}
    except ValueError:
        return False
