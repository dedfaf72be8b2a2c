"""What `deploy/` names is there: metrics, labels, settings, runbooks."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from string import Template
from typing import Any

import pytest
import redis
from prometheus_client.parser import text_string_to_metric_families

from tests.support.api_keys import bearer_of, write_keys
from tests.support.gateways import admitted, http, serving, valkey
from trio_gateway.settings import NAMES
from trio_gateway.telemetry.metrics import METRICS

ROOT = Path(__file__).parent.parent
ALERTS = (ROOT / "deploy/prometheus/alerts.yml").read_text()
DASHBOARD = json.loads((ROOT / "deploy/grafana/dashboard.json").read_text())
SUFFIX = re.compile(r"_(bucket|sum|count)$")


def expressions() -> Iterator[str]:
    """Of the alerts, and of the dashboard."""
    for found in re.finditer(r"expr: (>-\n(?:          .*\n)+|.*\n)", ALERTS):
        yield " ".join(found[1].removeprefix(">-").split())
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", []):
            if "expr" in target:
                yield target["expr"]


def named(expression: str) -> Iterator[tuple[str, set[str]]]:
    """The metrics of an expression, each with the labels that are asked of it."""
    for found in re.finditer(r"(wsgateway_\w+)(?:\{([^}]*)\})?", expression):
        labels = set(re.findall(r"(\w+)\s*=~?", found[2] or ""))
        yield SUFFIX.sub("", found[1]), labels - {"instance"}


async def test_every_metric_in_a_query_is_exposed_with_its_labels() -> None:
    with valkey() as server:
        async with serving(server.connection_url, "direct", ws_cluster=True) as gateway:
            backend = redis.Redis.from_url(server.connection_url)
            backend.close()
            reply = await http(gateway.port, "/ws/metrics")
    exposed = {
        name
        for family in text_string_to_metric_families(reply.text)
        for name in (family.name, f"{family.name}_total")
    }
    found = list(expressions())

    assert len(found) > 40
    for expression in found:
        assert "wsgateway_" in expression or "up{" in expression
        for metric, labels in named(expression):
            assert metric in exposed, expression
            known = getattr(METRICS[metric], "label", None) or ""
            assert labels <= set(known.split(",")), expression
        for grouped in re.findall(r"by \(([^)]*)\)", expression):
            allowed = {"job", "instance", "le"}
            for metric, _ in named(expression):
                allowed |= set((getattr(METRICS[metric], "label", None) or "").split(","))
            assert set(re.split(r",\s*", grouped)) <= allowed, expression


def tables() -> Iterator[dict[str, Any]]:
    """What the dashboard asks of the HTTP API, for its tables and its variables."""
    for variable in DASHBOARD["templating"]["list"]:
        if variable["type"] == "query" and "infinityQuery" in variable["query"]:
            yield variable["query"]["infinityQuery"]
    for panel in DASHBOARD["panels"]:
        yield from (each for each in panel.get("targets", []) if each.get("source") == "url")


async def test_every_column_of_a_table_is_in_the_answer_of_the_http_api(tmp_path: Path) -> None:
    keys = write_keys(tmp_path, {"grafana": {"scopes": ["read"], "tenants": [1]}})
    with valkey() as server:
        async with (
            serving(
                server.connection_url, "direct", ws_cluster=True, ws_api_keys_file=keys
            ) as gateway,
            admitted(gateway.staff_url("waiter")),
            admitted(gateway.diner_url()),
        ):
            assert gateway.app.parts.cluster is not None
            [process] = gateway.app.parts.cluster.registry.nodes
            paths = set()
            for table in tables():
                for chosen in ("*", process):  # "*" is what the variable has for all
                    values = {"tenant": "1", "branch": "1", "process": chosen}
                    path = Template(table["url"]).substitute(values)
                    paths.add(path)
                    reply = await http(gateway.port, path, headers=bearer_of("grafana"))
                    assert reply.status == 200, reply.text
                    root = table["root_selector"]
                    rows = reply.json[root] if root else [reply.json]
                    assert rows
                    for row in rows:
                        assert {column["selector"] for column in table["columns"]} <= row.keys()

    assert len(paths) == 3


def test_every_alert_has_its_page() -> None:
    headings = re.findall(r"^## (\w+)$", (ROOT / "docs/alerts.md").read_text(), re.MULTILINE)
    alerts = re.findall(r"- alert: (\w+)", ALERTS)
    books = re.findall(r"runbook: docs/alerts\.md#(\w+)", ALERTS)

    assert alerts == headings
    assert books == [alert.lower() for alert in alerts]


@pytest.mark.parametrize("name", ["compose.yaml", "deploy/trio-gateway.service", "Dockerfile"])
def test_every_setting_in_the_samples_exists(name: str) -> None:
    text = (ROOT / name).read_text()
    found = re.findall(r"\b((?:WS|JWT|TABLE|REDIS|LOG|SECTOR|SHIFT|CIRCUIT)_[A-Z_]+)\b", text)

    assert set(found) <= NAMES, set(found) - NAMES
