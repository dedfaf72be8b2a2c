"""The pages say what the code does."""

import ast
import copy
import re
from collections.abc import Collection
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest

import tools.performance
from bench import published
from tests.support.gateways import make_settings
from tools import tables
from trio_gateway.gateway import create_app
from trio_gateway.settings import NAMES
from trio_gateway.telemetry.metrics import METRICS
from trio_gateway.transports.sse import PATHS
from trio_gateway.web.routes import HTTP
from trio_gateway.web.static import ASYNCAPI, FILES, OPENAPI

PAGE = tables.PAGE.read_text("utf-8")
DOCS = tables.PAGE.parent
PAGES = sorted(DOCS.rglob("*.md"))


def test_tables_of_the_protocol_match_the_code() -> None:
    assert set(re.findall("<!-- generated: (.*) -->", PAGE)) == set(tables.TABLES)
    assert tables.renewed(PAGE) == PAGE, "run python -m tools.tables"


@pytest.mark.parametrize("page", [*PAGES, DOCS.parent / "README.md"], ids=lambda page: page.stem)
def test_http_paths_that_a_page_names_exist(page: Path) -> None:
    named = re.findall(r"(GET|POST) (/ws/[a-z/.]+)", page.read_text("utf-8"))
    files = {("GET", path) for path in (*PATHS, *FILES, ASYNCAPI, OPENAPI)}
    assert set(named) <= HTTP.keys() | files


@pytest.mark.parametrize("name", tables.TABLES)
def test_drift_is_found_in_each_table(name: str) -> None:
    start = PAGE.index(f"<!-- generated: {name} -->")
    cell = PAGE.index("`" if name != "closes" else "1000", start)
    drifted = f"{PAGE[:cell]}X{PAGE[cell:]}"
    assert tables.renewed(drifted) == tables.renewed(PAGE)
    assert tables.renewed(PAGE) != drifted


def test_tables_of_figures_match_the_results() -> None:
    made = tools.performance.tables()
    used = set()
    for path in tables.FIGURES:
        page = path.read_text("utf-8")
        assert tables.renewed(page, made) == page, "run python -m tools.tables"
        used |= set(re.findall("<!-- generated: (.*) -->", page))
    assert used == set(made)


def test_figure_that_changes_in_the_results_changes_both_pages() -> None:
    results = copy.deepcopy(published.read())
    for row in results["idle"]["figures"]:
        row["gateway"] = 987.0
    made = tools.performance.tables(results)
    for path in tables.FIGURES:
        page = path.read_text("utf-8")
        assert "987" not in page
        assert "987" in tables.renewed(page, made)


@pytest.mark.parametrize("page", tables.FIGURES, ids=lambda page: str(page.stem))
def test_no_measured_figure_is_written_by_hand(page: Path) -> None:
    text = page.read_text("utf-8")
    text = re.sub("<!-- generated: .*?<!-- end -->", "", text, flags=re.DOTALL)
    unit = r"(?:µs|ms|[KM]B|million|M|a second|/s)"
    assert re.findall(rf"\d[\d.,]*\s?{unit}\b.*", text) == []


def test_default_channel_patterns_are_in_the_protocol() -> None:
    patterns = make_settings("redis://127.0.0.1:1").redis_channel_patterns
    named = {word for word in PAGE.split() if word.startswith("channel:") and "*" in word}
    bare = {pattern.removeprefix("channel:") for pattern in named} | {"sector:*:waiters"}
    assert set(patterns) == named | bare


def test_every_http_path_is_in_the_protocol() -> None:
    app = create_app(make_settings("redis://127.0.0.1:1"))
    paths = {rule.rule for rule in app.url_map.iter_rules()}
    assert paths > {path for _, path in HTTP}
    assert {path for path in paths if f"{path}`" not in PAGE} == set()


def test_every_page_is_in_the_sites_navigation() -> None:
    named = set(re.findall(r": (\S+\.md)$", (DOCS.parent / "mkdocs.yml").read_text(), re.MULTILINE))
    assert named == {page.relative_to(DOCS).as_posix() for page in PAGES}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.stem))
def test_lists_are_separated_from_the_text_before_them(page: Path) -> None:
    """Else the site shows them as part of the paragraph, unlike other readers of Markdown."""
    text = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    glued = [
        line
        for before, line in pairwise(text.splitlines())
        if line.startswith("- ") and before.strip() and not before.startswith(("- ", "  "))
    ]
    assert glued == []


@pytest.mark.parametrize("page", ["docs/design.md", "CONTRIBUTING.md"])
def test_modules_that_a_page_names_exist(page: str) -> None:
    root = DOCS.parent
    named = re.findall(r"`([\w./]+(?:\.py|\.js|\.yml|/))`", (root / page).read_text("utf-8"))
    places = (root, root / "trio_gateway")
    assert len(named) > 20
    assert [name for name in named if not any((place / name).exists() for place in places)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.stem))
def test_tests_that_a_page_names_exist(page: Path) -> None:
    named = re.findall(r"\b(?:tests|e2e)/[\w/]+\.py", page.read_text("utf-8"))
    assert [name for name in named if not (DOCS.parent / name).exists()] == []


@cache
def selectable(path: Path) -> str:
    """What the names of a file's tests are made of: functions, decorators and tables of cases."""
    parts = [path.stem]
    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            parts += [node.name, *map(ast.unparse, node.decorator_list)]
        elif isinstance(node, ast.Assign | ast.AnnAssign | ast.ClassDef):
            parts.append(ast.unparse(node))
    return "\n".join(parts)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.stem))
def test_tests_that_a_page_selects_by_name_exist(page: Path) -> None:
    root = DOCS.parent
    for command in re.findall("`([^`]* -k [^`]*)`", page.read_text("utf-8")):
        (expression,) = re.findall(r'-k ("[^"]+"|\w+)', command)
        named = re.findall(r"(?:tests|e2e)(?:/[\w./]+)?", command)
        session = re.search(r"nox -s (\w+)", command)
        folders = named or [f"e2e/{session[1]}" if session else "e2e/chaos"]
        if session and session[1] == "clients":
            continue  # of JavaScript
        files = [
            file
            for folder in folders
            for file in (
                [root / folder] if folder.endswith(".py") else (root / folder).rglob("*.py")
            )
        ]
        for choice in expression.strip('"').split(" or "):
            words = choice.split(" and ")
            found = [file for file in files if all(word in selectable(file) for word in words)]
            assert found, f"{command}: no test is named {choice}"


@pytest.mark.parametrize("names", [NAMES, METRICS], ids=["settings", "metrics"])
def test_every_setting_and_metric_is_in_the_docs(names: Collection[str]) -> None:
    text = "".join(page.read_text("utf-8") for page in PAGES)
    tails = tuple(set(re.findall("…(_\\w+)", text)))  # of names in a row, `…_like_this`
    assert len(names) > 20
    assert [name for name in names if name not in text and not name.endswith(tails)] == []


def test_hooks_run_the_ruff_that_ci_runs() -> None:
    config = (DOCS.parent / ".pre-commit-config.yaml").read_text("utf-8")
    (pinned,) = re.findall(r"\bruff==[\d.]+", config)
    assert pinned in (DOCS.parent / "constraints.txt").read_text("utf-8").splitlines()
