"""What `deploy/` names is there: metrics, labels, settings, runbooks."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from prometheus_client.parser import text_string_to_metric_families

from tests.support.gateways import http, serving, valkey
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
