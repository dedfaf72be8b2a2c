"""The npm package beside the Python package."""

import json
from pathlib import Path

import pytest

import trio_gateway

PACKAGE = Path(__file__).parents[2] / "clients/js"


@pytest.mark.parametrize("name", ["package.json", "package-lock.json"])
def test_javascript_client_has_the_version_of_the_gateway(name: str) -> None:
    assert json.loads((PACKAGE / name).read_text())["version"] == trio_gateway.__version__
