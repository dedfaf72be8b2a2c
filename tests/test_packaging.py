"""What the distributions declare is what their modules import."""

import re
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any, Final

import pytest

from tests.test_layers import MODULES, PACKAGE, imported, name_of, own_modules

ROOT: Final = PACKAGE.parent
LIGHT: Final = ROOT / "clients/python"
EXTRAS: Final = ("demo", "http", "otel", "postgres")  # what the package imports only if it is used


def project(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = tomllib.loads((folder / "pyproject.toml").read_text("utf-8"))
    return found


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def names(requirements: list[str]) -> set[str]:
    """The distributions that requirements name."""
    return {normalised(re.split(r"[^\w.-]", each)[0]) for each in requirements}


def third_party(paths: list[Path]) -> set[str]:
    """The top-level modules of others that these files import."""
    tops = {name.split(".")[0] for path in paths for name in imported(path)}
    return tops - sys.stdlib_module_names - {"trio_gateway"}


@cache
def providers(module: str) -> set[str]:
    """The installed distributions that contain a top-level module."""
    return {normalised(name) for name in _distributions().get(module, ())}


@cache
def _distributions() -> Mapping[str, list[str]]:
    return packages_distributions()


@cache
def light_modules() -> set[str]:
    """The modules that the three libraries import, directly or not."""
    paths = {name_of(path): path for path in MODULES}
    found: set[str] = set()
    libraries = ("api_client.", "client.", "publisher.")
    todo = {name for name in paths if name.startswith(libraries)}
    while todo:
        name = todo.pop()
        found.add(name)
        todo |= set(own_modules(paths[name])) - found
        parents = name.split(".")[:-1]
        todo |= {".".join([*parents[:end], "__init__"]) for end in range(len(parents) + 1)} - found
    return found


def test_every_import_is_of_a_declared_dependency() -> None:
    about = project(ROOT)["project"]
    extras = [each for extra in EXTRAS for each in about["optional-dependencies"][extra]]
    declared = names(about["dependencies"] + extras)
    missing = {each for each in third_party(MODULES) if not providers(each) & declared}
    assert missing == set()


@pytest.mark.parametrize("folder", [ROOT, LIGHT], ids=["gateway", "client"])
def test_constraints_pin_every_dependency(folder: Path) -> None:
    pinned = names((ROOT / "constraints.txt").read_text("utf-8").splitlines())
    about = project(folder)["project"]
    http = about["optional-dependencies"]["http"]
    assert names(about["dependencies"] + http) - pinned == set()


def test_light_wheel_contains_the_modules_that_its_own_import() -> None:
    included = project(LIGHT)["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    for source, target in included.items():
        assert (LIGHT / source).resolve() == ROOT / target
    files = {ROOT / target for target in included.values()}
    contained = {
        name_of(path) for path in MODULES if path in files or not files.isdisjoint(path.parents)
    }
    assert contained == light_modules()


def test_light_wheel_declares_what_its_modules_import() -> None:
    paths = [path for path in MODULES if name_of(path) in light_modules()]
    about = project(LIGHT)["project"]
    declared = about["dependencies"] + about["optional-dependencies"]["http"]
    assert {next(iter(providers(each))) for each in third_party(paths)} == names(declared)


def test_both_distributions_require_the_same_versions() -> None:
    light, main = project(LIGHT)["project"], project(ROOT)["project"]
    assert light["optional-dependencies"]["http"] == main["optional-dependencies"]["http"]
    required = [re.sub(r"\s", "", each) for each in main["dependencies"]]
    assert set(light["dependencies"]) <= set(required)


@pytest.mark.parametrize(
    ("module", "allowed"),
    [
        ("api_client", {"anyio", "httpx", "msgspec", "redis", "sniffio"}),
        ("client", {"trio", "wsproto"}),
        ("publisher", {"msgspec", "redis", "sniffio"}),
    ],
)
def test_import_needs_only_the_dependencies_of_its_wheel(module: str, allowed: set[str]) -> None:
    code = f"import sys, trio_gateway.{module}; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.split(".")[0] for name in run.stdout.split()}
    other = names(project(ROOT)["project"]["dependencies"]) - allowed
    assert {each for each in loaded if providers(each) & other} <= _needed_by(allowed)


def _needed_by(modules: set[str]) -> set[str]:
    code = f"import sys, {', '.join(sorted(modules))}; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {name.split(".")[0] for name in run.stdout.split()}
