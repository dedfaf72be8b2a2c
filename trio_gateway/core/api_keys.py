"""API keys: which backends may call the HTTP API, and for which tenants."""

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from hashlib import sha256
from typing import Any, Final

from .events import MAX_ID

DEFAULT_RATE: Final = 100.0  # requests per second
_NAME: Final = re.compile(r"[A-Za-z0-9_.-]{1,64}")  # it stands in logs
_DIGEST: Final = re.compile(r"[0-9a-fA-F]{64}")
_EMPTY: Final = sha256(b"").digest()
_FIELDS: Final = ("sha256", "scopes", "tenants", "rate")


class Scope(StrEnum):
    """What a key may do."""

    PUBLISH = "publish"
    CONTROL = "control"  # disconnect clients, refresh sectors
    READ = "read"


@dataclass(frozen=True, slots=True)
class ApiKey:
    """One key. ``tenants`` is None if it is for all tenants; ``rate`` is in requests per second."""

    name: str
    digest: bytes = field(repr=False)  # SHA-256 of the secret
    scopes: frozenset[Scope]
    tenants: frozenset[int] | None = None
    rate: float = DEFAULT_RATE

    def may_act_for(self, tenant: int) -> bool:
        """Whether this key is for that tenant."""
        return self.tenants is None or tenant in self.tenants


class InvalidApiKeys(ValueError):  # noqa: N818 - reads better where it is raised
    """A file of API keys is invalid. The text names the key and the field, and has no value."""


def read_api_keys(text: str) -> tuple[ApiKey, ...]:
    """Read a TOML text with a table ``[keys.NAME]`` for each key.

    Raises :exc:`InvalidApiKeys`, also if there is no key: an empty file is a file that is being
    written.
    """
    try:
        document = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise InvalidApiKeys(f"not TOML: {_place(error)}") from None
    if document.keys() - {"keys"}:
        raise InvalidApiKeys("unknown table or key at the top: only [keys.NAME] is known")
    tables = document.get("keys", {})
    if not isinstance(tables, dict) or not tables:
        raise InvalidApiKeys("no key: add a table for each one, like [keys.orders]")
    names: dict[bytes, str] = {}
    found = []
    for name, table in tables.items():
        key = _read(name, table)
        if (other := names.setdefault(key.digest, name)) != name:
            raise InvalidApiKeys(f"keys.{name}.sha256: the same as that of keys.{other}")
        found.append(key)
    return tuple(found)


def _place(error: Exception) -> str:
    """Where in the text it is invalid; the rest of the error's text may quote a secret."""
    place = re.search(r"\(at [^()]*\)$", str(error))
    return place[0].strip("()") if place else "invalid"


def _read(name: str, table: Any) -> ApiKey:
    if not _NAME.fullmatch(name):
        raise InvalidApiKeys("keys: a name has letters, digits and . _ - only, 64 at most")
    where = f"keys.{name}"
    if not isinstance(table, dict):
        raise InvalidApiKeys(f"{where}: must be a table")
    if unknown := sorted(table.keys() - set(_FIELDS)):
        # The field may be a secret that stands in the wrong place.
        shown = f" {unknown[0]}" if _NAME.fullmatch(unknown[0]) and len(unknown[0]) < 16 else ""
        raise InvalidApiKeys(f"{where}: unknown field{shown} (known: {', '.join(_FIELDS)})")
    return ApiKey(
        name, _digest(where, table), _scopes(where, table), _tenants(where, table),
        _rate(where, table),
    )  # fmt: skip


def _digest(where: str, table: Mapping[str, Any]) -> bytes:
    text = table.get("sha256")
    if not isinstance(text, str) or not _DIGEST.fullmatch(text):
        raise InvalidApiKeys(f"{where}.sha256: must be 64 hex digits, the secret's SHA-256")
    if (digest := bytes.fromhex(text)) == _EMPTY:
        raise InvalidApiKeys(f"{where}.sha256: it is that of an empty secret")
    return digest


def _scopes(where: str, table: Mapping[str, Any]) -> frozenset[Scope]:
    known = ", ".join(Scope)
    names = table.get("scopes")
    if not isinstance(names, list) or not names or not all(each in list(Scope) for each in names):
        raise InvalidApiKeys(f"{where}.scopes: must be a list of one or more of {known}")
    return frozenset(map(Scope, names))


def _tenants(where: str, table: Mapping[str, Any]) -> frozenset[int] | None:
    if "tenants" not in table:
        return None
    numbers = table["tenants"]
    # An empty list could be taken for all tenants, and for none.
    if not isinstance(numbers, list) or not numbers or not all(map(_is_tenant, numbers)):
        raise InvalidApiKeys(
            f"{where}.tenants: must be a list of one or more positive integers; leave it out for"
            " all tenants"
        )
    return frozenset(numbers)


def _is_tenant(number: Any) -> bool:
    return type(number) is int and 0 < number <= MAX_ID


def _rate(where: str, table: Mapping[str, Any]) -> float:
    rate = table.get("rate", DEFAULT_RATE)
    if type(rate) not in (int, float) or not 0 < rate < float("inf"):
        raise InvalidApiKeys(f"{where}.rate: must be a number above 0 (requests per second)")
    return float(rate)
