"""The public surface: what may be imported, and that it is documented."""

import ast
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import pytest

import trio_gateway

PAGE: Final = Path(__file__).parents[1] / "docs/api.md"
PUBLIC: Final[dict[str, set[str]]] = {
    "api_client": {
        "ApiClient", "AsyncApiClient", "CallFailed", "ClientReceipt", "Disconnected",
        "EventPath", "EventReceipts", "HistoryPage", "Node", "PathAudience", "PathClient",
        "PathMoment", "PathStep", "PresentSession", "PresentUser", "Presence", "Published",
        "ReceiptStep", "Refreshed", "Slo", "TenantTimes", "Times", "TimesWindow",
    },
    "client": {
        "Client", "Event", "Gap", "NoUpgrade", "Presence", "Refused", "Status", "TokenProvider",
        "connect",
    },
    "gateway": {"Gateway", "create_app"},
    "publisher": {
        "AsyncPublisher", "InDoubt", "InvalidEvent", "InvalidRoutes", "PublishFailed", "Publisher",
        "TIMEOUT", "read_routes",
    },
    "settings": {"InvalidSettings", "Settings", "load_settings"},
    "testing": {
        "Endpoint", "FakeClient", "FakeSocket", "NullAuth", "Principal", "make_event", "make_jwt",
        "make_payload", "make_principal", "make_table_token",
    },
}  # fmt: skip
DOCUMENTED: Final = [(module, name) for module, names in PUBLIC.items() for name in sorted(names)]


def load(module: str) -> ModuleType:
    return importlib.import_module(f"trio_gateway.{module}")


def section(module: str) -> str:
    """The part of the page that is about a module."""
    page = PAGE.read_text("utf-8")
    found = re.search(
        rf"^## `trio_gateway\.{module}`.*?(?=^## |\Z)", page, re.DOTALL | re.MULTILINE
    )
    assert found, f"no section on {module}"
    return found[0]


def methods_of(public: Any) -> list[str]:
    """The public methods and properties that a class defines itself."""
    if not inspect.isclass(public):
        return []
    kinds = (property, classmethod, staticmethod)
    return [
        name
        for name, value in vars(public).items()
        if not name.startswith("_") and (inspect.isfunction(value) or isinstance(value, kinds))
    ]


@pytest.mark.parametrize("module", PUBLIC)
def test_all_lists_the_public_names_and_no_others(module: str) -> None:
    assert set(load(module).__all__) == PUBLIC[module]


@pytest.mark.parametrize("module", PUBLIC)
def test_classes_and_functions_that_are_not_public_have_a_leading_underscore(module: str) -> None:
    found = load(module)
    defined = {
        name
        for name, value in vars(found).items()
        if getattr(value, "__module__", None) == found.__name__
        and (inspect.isclass(value) or inspect.isfunction(value))
        and not name.startswith("_")
    }
    assert defined <= PUBLIC[module]


def test_package_itself_exports_only_its_version() -> None:
    tree = ast.parse(Path(trio_gateway.__file__).read_text("utf-8"))
    assert [type(node) for node in tree.body] == [ast.Expr, ast.Assign]
    assert re.fullmatch(r"\d+\.\d+\.\d+", trio_gateway.__version__)


@pytest.mark.parametrize(("module", "name"), DOCUMENTED)
def test_every_public_name_has_a_docstring_and_is_documented(module: str, name: str) -> None:
    public = getattr(load(module), name)
    assert re.search(rf"`[^`\n]*\b{name}\b", section(module)), f"{name} is not in {PAGE.name}"
    if inspect.isclass(public) or inspect.isfunction(public):
        assert public.__doc__
        for method in methods_of(public):
            assert getattr(public, method).__doc__, method


@pytest.mark.parametrize("module", ["api_client", "client", "gateway", "publisher", "testing"])
def test_every_argument_of_a_public_function_is_documented(module: str) -> None:
    text = section(module)
    for name in PUBLIC[module]:
        public = getattr(load(module), name)
        if inspect.isfunction(public):
            for argument in inspect.signature(public).parameters:
                assert re.search(rf"`[^`]*\b{argument}\b", text), f"{name}({argument})"


def python(code: str, **env: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False
    )


def test_importing_create_app_reads_no_environment() -> None:
    bad = {"WS_NO_SUCH_SETTING": "1", "WS_PING_INTERVAL": "never", "ENVIRONMENT": "production"}
    code = "import os, sys; out = sys.stdout; from trio_gateway.gateway import create_app;"
    code += " assert sys.stdout is out; print('imported', flush=True); import trio_gateway.app"
    found = python(code, **bad)
    assert (found.returncode, found.stdout) == (2, "imported\n")


def test_app_exports_only_app() -> None:
    tree = ast.parse((Path(trio_gateway.__file__).parent / "app.py").read_text("utf-8"))
    exported = [
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    ]
    assert exported == [["app"]]
    assert "`trio_gateway.app:app`" in PAGE.read_text("utf-8")
