from trio.testing import MockClock

from tests.support.gateways import make_settings
from trio_gateway.gateway import create_app
from trio_gateway.stats import snapshot
from trio_gateway.telemetry.metrics import METRICS


async def test_snapshot_has_exactly_the_documented_metrics() -> None:
    found = snapshot(create_app(make_settings("redis://127.0.0.1:1")).parts)

    assert found.numbers.keys() | found.histograms.keys() == METRICS.keys()


async def test_close_code_with_a_label_keeps_it(autojump_clock: MockClock) -> None:
    """However many other codes clients send, and however often."""
    app = create_app(make_settings("redis://127.0.0.1:1"))
    before: dict[str, float] = {}
    for code in [*range(3000, 3100), *[3099] * 50, *range(3050, 3200), 1001, 4001]:
        app.parts.hub.closed[code] += 1
        found = snapshot(app.parts).numbers["wsgateway_connections_closed_total"]
        assert all(found[label] >= number for label, number in before.items())
        assert sum(found.values()) == app.parts.hub.closed.total()
        before = found
    assert len(before) < 100
