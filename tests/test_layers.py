"""Imports go down only: edges, runtime, core."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import trio_gateway

PACKAGE = Path(trio_gateway.__file__).parent
NETWORK = {"quart", "quart_trio", "hypercorn", "redis", "hiredis", "sqlalchemy", "wsproto"}
FORBIDDEN = {
    "core": NETWORK
    | {"trio", "trio_asyncio", "asyncio", "time", "socket", "ssl", "select", "io", "os",
       "pathlib", "subprocess", "threading", "http", "urllib", "logging", "structlog", "sys"},
    "runtime": NETWORK | {"trio_asyncio", "asyncio", "socket", "ssl", "sqlite3"},
}  # fmt: skip
BELOW = {"core": ["core"], "runtime": ["core", "runtime"], "edges": ["core", "runtime", "edges"]}
MODULES = [path for floor in BELOW for path in sorted((PACKAGE / floor).rglob("*.py"))]


def imported(path: Path) -> Iterator[str]:
    """The full names of what a module imports, wherever in it."""
    here = ("trio_gateway", *path.relative_to(PACKAGE).parent.parts)
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = here[: len(here) - node.level + 1] if node.level else ()
            source = ".".join([*parents, *filter(None, [node.module])])
            yield from (f"{source}.{name.name}" for name in node.names)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: f"{path.parent.name}.{path.stem}")
def test_imports_go_down_only(path: Path) -> None:
    floor = path.relative_to(PACKAGE).parts[0]
    for name in imported(path):
        top, *rest = name.split(".")
        assert top not in FORBIDDEN.get(floor, ())
        if top == "trio_gateway" and floor != "edges":
            assert rest[0] in BELOW[floor]


def test_all_the_floors_were_found() -> None:
    assert {path.parent.name for path in MODULES} >= {"core", "runtime", "edges"}
    assert "trio_gateway.core.events.Event" in imported(PACKAGE / "core" / "routing.py")
    assert "trio_gateway.core.audiences" in imported(PACKAGE / "core" / "routing.py")
