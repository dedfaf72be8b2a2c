"""Files of API keys, and requests with them."""

import json
from collections.abc import Iterable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

from .gateways import Reply, http

SCOPES: Final = ("publish", "control", "read")


def write_keys(folder: Path, keys: Mapping[str, Mapping[str, Any]] | None = None) -> Path:
    """Write a file of these keys, by name; the secret of each is :func:`secret_of` its name.

    A key has all scopes, for all tenants, unless it says something else.
    """
    path = folder / "keys.toml"
    lines = []
    for name, fields in (keys or {"all": {}}).items():
        digest = sha256(secret_of(name).encode()).hexdigest()
        values: dict[str, Any] = {"sha256": digest, "scopes": list(SCOPES), "rate": 10_000}
        lines.append(f"[keys.{name}]")
        lines += [
            f"{field} = {json.dumps(value)}" for field, value in (values | dict(fields)).items()
        ]
    path.write_text("\n".join(lines))
    return path


def secret_of(name: str) -> str:
    return f"secret-of-{name}-0123456789"


def bearer_of(name: str) -> dict[str, str]:
    """The header with the secret of a key."""
    return {"Authorization": f"Bearer {secret_of(name)}"}


async def call(port: int, path: str, body: Any = None, *, key: str | None = "all") -> Reply:
    """Call the API: POST if there is a body; JSON as bytes is sent as it is."""
    return await http(
        port,
        f"/ws/api/{path}",
        method="GET" if body is None else "POST",
        headers=bearer_of(key) if key is not None else {},
        json_body=body,
    )


async def publish(
    port: int, events: Iterable[Any], query: str = "", *, key: str = "all"
) -> list[dict[str, Any]]:
    """Publish events, each a mapping or its JSON; return what became of each."""
    texts = [each if isinstance(each, str) else json.dumps(each) for each in events]
    reply = await call(
        port, f"publish{query}", f'{{"events":[{",".join(texts)}]}}'.encode(), key=key
    )
    assert reply.status == 200, reply.text
    found: list[dict[str, Any]] = reply.json["published"]
    assert len(found) == len(texts)
    return found
