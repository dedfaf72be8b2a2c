"""Origins: where a page comes from, compared as browsers compare it (RFC 6454, section 4)."""

import ipaddress
import re
from typing import Final

import idna

_ORIGIN: Final = re.compile(
    r"(?P<scheme>[a-z][a-z0-9+.-]*)://"
    r"(?:\[(?P<six>[0-9a-f:.]+)\]|(?P<host>[a-z0-9._~%-]+))(?::(?P<port>[0-9]{1,5}))?",
    re.ASCII | re.IGNORECASE,
)
_WITH_NAME: Final = re.compile(r"(?P<before>[^:/]+://)(?P<host>[^:/?#@\[\]]+)(?P<after>(?::.*)?)")
_DEFAULT_PORTS: Final = {"http": 80, "https": 443, "ws": 80, "wss": 443}


def normalise(text: str) -> str:
    """An origin as a browser writes it: lower case, no default port, IPv6 in its short form.

    Two origins are the same if this is equal. Raises :exc:`ValueError` for anything that is not
    ``scheme://host[:port]``, ``null`` included.
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


def is_origin(text: str) -> bool:
    """Whether this is ``scheme://host[:port]`` and nothing more (RFC 6454, 6.2)."""
    try:
        normalise(text)
    except ValueError:
        return False
    return True


def read_origin(text: str) -> str:
    """An origin that a person wrote, as :func:`normalise` does; its host may be a name in any
    script, which browsers send as Punycode (UTS 46). Raises :exc:`ValueError`.
    """
    if not text.isascii() and (match := _WITH_NAME.fullmatch(text)) is not None:
        # IDNAError is a ValueError.
        host = idna.encode(match["host"], uts46=True).decode("ascii")
        text = match["before"] + host + match["after"]
    return normalise(text)


def is_loopback(host: str) -> bool:
    """Whether this is a name or an address of this machine, and nobody else's."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"
