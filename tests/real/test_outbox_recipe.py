"""The recipe of docs/outbox.md, run as it is written there."""

import re
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from tests.support.gateways import connect, make_settings, received, running, settle
from trio_gateway.publisher import Publisher, PublishFailed

DOCUMENT = Path(__file__).parents[2] / "docs" / "outbox.md"
ORDER = {"type": "ROUND_READY", "tenant_id": 1, "branch_id": 1}


@pytest.fixture
def recipe() -> dict[str, Any]:
    [code] = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text("utf-8"), re.DOTALL)
    found: dict[str, Any] = {}
    exec(compile(code, str(DOCUMENT), "exec"), found)
    return found


@pytest.fixture
def database(recipe: dict[str, Any]) -> Any:
    connection = sqlite3.connect(":memory:")
    connection.execute(recipe["SCHEMA"])
    yield connection
    connection.close()


async def test_committed_events_are_delivered_once_although_the_relay_dies(
    redis_url: str, recipe: dict[str, Any], database: sqlite3.Connection
) -> None:
    async with (
        running(make_settings(redis_url)) as gateway,
        connect(gateway.staff_url("waiter")) as waiter,
    ):
        await received(waiter)
        with database:
            for n in range(3):
                recipe["emit"](database, ORDER | {"n": n})
        recipe["emit"](database, ORDER | {"n": "rolled back"})
        database.rollback()

        with Publisher(redis_url) as publisher:
            recipe["relay"](database, publisher, most=2)
            # It died after it had published the second event and before it had recorded that.
            with database:
                database.execute("update outbox set published_at = null where id = 2")
            assert recipe["relay"](database, publisher) == 2
            assert recipe["relay"](database, publisher) == 0
        await settle(gateway)

        assert [event["n"] for event in await received(waiter)] == [0, 1, 2]


def test_event_that_cannot_be_published_stays_in_the_outbox(
    recipe: dict[str, Any], database: sqlite3.Connection
) -> None:
    with database:
        recipe["emit"](database, ORDER)

    with Publisher("redis://127.0.0.1:1") as publisher:
        assert recipe["relay"](database, publisher) == 0
        with pytest.raises(PublishFailed):
            publisher.publish(ORDER)

    assert database.execute("select published_at from outbox").fetchall() == [(None,)]
