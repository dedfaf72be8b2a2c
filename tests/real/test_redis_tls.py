"""Sentinels and Clusters are reached with TLS, and a password, on each connection."""

from pathlib import Path
from typing import Any, Final

import pytest

from tests.support.tls_fronts import tls_fronts
from trio_gateway.publisher import Publisher, PublishFailed
from trio_gateway.redis_sets import cluster_set, sentinel_set

SETS: Final[dict[str, Any]] = {"sentinel": sentinel_set, "cluster": cluster_set}
EVENT: Final = {"type": "ROUND_READY", "tenant_id": 1, "branch_id": 1}


@pytest.mark.parametrize("kind", SETS)
def test_every_connection_to_a_set_has_tls(kind: str, tmp_path: Path) -> None:
    with (
        tls_fronts(tmp_path) as fronts,
        SETS[kind](password="a /word@1", front=fronts.front) as found,
    ):
        with Publisher(fronts.url(found.url), confirm=1) as publisher:
            publisher.publish(EVENT)
        assert fronts.encrypted >= 2
        untrusting = Publisher(fronts.url(found.url).partition("?")[0])
        with untrusting, pytest.raises(PublishFailed, match="certificate"):
            untrusting.publish(EVENT)
