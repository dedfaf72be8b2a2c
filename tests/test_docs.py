"""The pages say what the code does."""

import re
from itertools import pairwise
from pathlib import Path

import pytest
from harness import make_settings

from tools import tables
from trio_gateway.edges.web import HTTP
from trio_gateway.gateway import create_app

PAGE = tables.PAGE.read_text("utf-8")
DOCS = tables.PAGE.parent
PAGES = sorted(DOCS.rglob("*.md"))


def test_tables_of_the_protocol_are_those_of_the_code() -> None:
    assert set(re.findall("<!-- generated: (.*) -->", PAGE)) == set(tables.TABLES)
    assert tables.renewed(PAGE) == PAGE, "run python -m tools.tables"


@pytest.mark.parametrize("name", tables.TABLES)
def test_drift_is_found_in_each_table(name: str) -> None:
    start = PAGE.index(f"<!-- generated: {name} -->")
    cell = PAGE.index("`" if name != "closes" else "1000", start)
    drifted = f"{PAGE[:cell]}X{PAGE[cell:]}"
    assert tables.renewed(drifted) == PAGE


def test_every_path_that_is_answered_is_in_the_protocol() -> None:
    app = create_app(make_settings("redis://127.0.0.1:1"))
    paths = {rule.rule for rule in app.url_map.iter_rules()}
    assert paths > {path for _, path in HTTP}
    assert {path for path in paths if f"{path}`" not in PAGE} == set()


def test_every_page_is_in_the_sites_navigation() -> None:
    named = set(re.findall(r": (\S+\.md)$", (DOCS.parent / "mkdocs.yml").read_text(), re.MULTILINE))
    assert named == {page.relative_to(DOCS).as_posix() for page in PAGES}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.stem))
def test_lists_stand_apart_from_the_text_before_them(page: Path) -> None:
    """Else the site shows them as part of the paragraph, unlike other readers of Markdown."""
    text = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    glued = [
        line
        for before, line in pairwise(text.splitlines())
        if line.startswith("- ") and before.strip() and not before.startswith(("- ", "  "))
    ]
    assert glued == []
