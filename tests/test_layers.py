"""Imports go one way. One table says which; imports for type checking count, too."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Final

import pytest

import trio_gateway

PACKAGE: Final = Path(trio_gateway.__file__).parent
NETWORK: Final = {"quart", "quart_trio", "hypercorn", "redis", "hiredis", "sqlalchemy", "wsproto"}
FORBIDDEN: Final = {
    "core": NETWORK
    | {"trio", "trio_asyncio", "asyncio", "time", "socket", "ssl", "select", "io", "os",
       "pathlib", "subprocess", "threading", "http", "urllib", "logging", "structlog", "sys"},
    "runtime": NETWORK | {"trio_asyncio", "asyncio", "socket", "ssl", "sqlite3"},
}  # fmt: skip
# What each package, or module at the top, may import of the others.
MAY_IMPORT: Final[dict[str, set[str]]] = {
    "__init__": set(),
    "core": set(),
    "runtime": {"core"},
    # For several: no state, and no part of the gateway.
    "keys": set(),
    "redis_errors": set(),
    "redis_tls": set(),
    "redis_url": {"redis_tls"},
    "settings": {"core", "keys", "redis_url"},
    # The six wings. They do not know each other, but two give commands to Redis.
    "transports": {"core", "runtime"},
    "broker": {"core", "runtime", "redis_errors", "redis_url"},
    "access": {"core", "runtime", "settings", "keys", "broker"},
    "telemetry": {"core", "runtime", "settings", "__init__"},
    "cluster": {"core", "runtime", "settings", "broker"},
    # What is put together from them.
    "parts": {"core", "runtime", "settings", "redis_url", "transports", "broker", "access",
              "telemetry", "cluster", "__init__"},
    "stats": {"core", "runtime", "telemetry", "parts"},
    "stats_feed": {"core", "runtime", "parts", "stats"},
    "reception": {"core", "runtime", "access", "transports", "parts", "stats_feed"},
    "web": {"core", "runtime", "settings", "access", "broker", "telemetry", "transports",
            "cluster", "parts", "stats", "stats_feed", "reception", "__init__"},
    "gateway": {"core", "runtime", "settings", "access", "telemetry", "transports", "web",
                "parts", "stats", "stats_feed", "reception"},
    "worker_listeners": {"transports"},
    "workers": {"core", "telemetry", "worker_listeners"},
    "serve": {"core", "telemetry", "transports", "gateway", "worker_listeners", "workers"},
    "app": {"settings", "telemetry", "transports", "gateway", "serve"},
    # For backends, clients and tests of applications.
    "publisher": {"core", "redis_errors", "redis_url"},
    "api_client": {"core", "publisher"},
    "client": {"core"},
    "testing": {"core", "runtime"},
    "redis_sets": set(),
}  # fmt: skip
ANYTHING: Final = {"cli", "__main__"}
MODULES: Final = sorted(PACKAGE.rglob("*.py"))


def package_of(path: Path) -> str:
    """The package, or the module at the top, that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def name_of(path: Path) -> str:
    """The dotted name of a file below the package."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


NAMES: Final = {name_of(path) for path in MODULES}


@cache
def imported(path: Path) -> tuple[str, ...]:
    """The full names of what a module imports, wherever in it."""
    return tuple(_imports(path))


def _imports(path: Path) -> Iterator[str]:
    here = ("trio_gateway", *path.relative_to(PACKAGE).parent.parts)
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = here[: len(here) - node.level + 1] if node.level else ()
            source = ".".join([*parents, *filter(None, [node.module])])
            yield from (f"{source}.{name.name}" for name in node.names)


def own_modules(path: Path) -> Iterator[str]:
    """The modules of this package that a module imports."""
    for name in imported(path):
        top, *rest = name.split(".")
        if top != "trio_gateway":
            continue
        for end in range(len(rest), -1, -1):
            found = ".".join(rest[:end])
            inside = f"{found}.__init__".removeprefix(".")
            if found in NAMES or inside in NAMES:
                yield found if found in NAMES else inside
                break


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_follow_the_table(path: Path) -> None:
    package = package_of(path)
    for name in imported(path):
        assert name.split(".")[0] not in FORBIDDEN.get(package, ())
    if package not in ANYTHING:
        others = {name.split(".")[0] for name in own_modules(path)} - {package}
        assert others <= MAY_IMPORT[package]


def test_no_modules_import_each_other_in_a_circle() -> None:
    left = {name_of(path): set(own_modules(path)) for path in MODULES}
    while free := {name for name, others in left.items() if not (others & left.keys()) - {name}}:
        left = {name: others for name, others in left.items() if name not in free}
    assert not left


def test_the_table_has_no_unused_arrow() -> None:
    used: dict[str, set[str]] = {}
    for path in MODULES:
        others = {name.split(".")[0] for name in own_modules(path)} - {package_of(path)}
        used.setdefault(package_of(path), set()).update(others)
    assert {name: used[name] for name in MAY_IMPORT} == MAY_IMPORT
