"""Bugs: in a background task they end the process, with a log line; in a connection, that alone."""

import ast
from pathlib import Path
from typing import Any, Final

import pytest
import structlog
import trio
from hypercorn.config import Config
from hypercorn.utils import LifespanFailureError

import trio_gateway
from tests.support.api_keys import write_keys
from tests.support.gateways import (
    Reachable,
    admitted,
    closed,
    connect,
    free_port,
    make_settings,
    metrics,
    received,
    running,
    until,
)
from tests.support.stopwatch import Stopwatch
from trio_gateway import serve
from trio_gateway.core.close_codes import Close
from trio_gateway.core.exception_groups import leaves
from trio_gateway.gateway import create_app
from trio_gateway.reception import Reception
from trio_gateway.runtime.connection import Connection
from trio_gateway.runtime.resume import Replays

from . import faults
from .tasks import CALLS, GATEWAY, SERVE, SERVICE, write_routes

SOON: Final = 5.0  # seconds
AT_ONCE: Final = 0.5  # seconds, net of the machine's


def test_table_of_tasks_is_complete() -> None:
    package = Path(trio_gateway.__file__).parent
    found = set()
    for path in package.rglob("*.py"):
        where = path.relative_to(package).as_posix()
        if where.startswith(("cli/", "client/")):  # no gateway
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(".start_soon"):
                found.add(f"{where}: {', '.join(map(ast.unparse, node.args))}")

    assert found == CALLS


def everything(tmp_path: Path) -> dict[str, Any]:
    """Settings with which every task is started."""
    return {
        "redis_dlq_stream": "events:dlq",
        "redis_stream_shards": 2,
        "database_url": f"sqlite:///{tmp_path}/restaurant.db",
        "ws_operations_bind": f"127.0.0.1:{free_port()}",
        "ws_routes_file": write_routes(tmp_path),
        "ws_cluster": True,
        "ws_api_keys_file": write_keys(tmp_path),
    }


# In this process: Hypercorn's server raises, and its clients get 1001.


@pytest.mark.parametrize("task", [*GATEWAY, *SERVICE])
async def test_bug_in_a_background_task_ends_the_server_after_its_clients(
    redis_url: str, tmp_path: Path, task: str
) -> None:
    """It waits for no task that has ended: not for events to be delivered, nor to tell others."""
    came = Stopwatch()

    async def serve_until_it_ends() -> None:
        nonlocal came
        async with running(make_settings(redis_url, **everything(tmp_path))) as gateway:
            async with admitted(gateway.staff_url("waiter")) as client:
                came = Stopwatch()
                (tmp_path / "now").touch()
                assert (await closed(client, SOON))[0] == Close.GOING_AWAY
            await trio.sleep(SOON)

    undo = faults.inject(task, tmp_path / "now")
    try:
        with structlog.testing.capture_logs() as logs, pytest.raises(ExceptionGroup) as raised:
            await serve_until_it_ends()
        assert came.net < AT_ONCE
    finally:
        undo()
    (failure,) = leaves(raised.value)
    assert isinstance(failure, LifespanFailureError)
    (logged,) = [line for line in logs if line["event"] == "stopped by a bug"]
    assert logged["log_level"] == "critical"
    assert [type(leaf) for leaf in leaves(logged["exc_info"])] == [faults.Injected]


@pytest.mark.parametrize("task", SERVE)
async def test_bug_in_a_task_beside_the_gateway_closes_its_clients_with_1001(
    redis_url: str, tmp_path: Path, task: str
) -> None:
    undo = faults.inject(task, tmp_path / "now")
    app, config, port = create_app(make_settings(redis_url)), Config(), free_port()
    config.bind, config.errorlog = [f"127.0.0.1:{port}"], None
    with structlog.testing.capture_logs() as logs:
        try:
            with pytest.RaisesGroup(LifespanFailureError):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(serve._serve, app, config, None)
                    await until(lambda: app.ready)
                    async with admitted(Reachable(port).staff_url("waiter")) as client:
                        (tmp_path / "now").touch()
                        assert (await closed(client, SOON))[0] == Close.GOING_AWAY
        finally:
            undo()
    (logged,) = [line for line in logs if line["event"] == "stopped by a bug"]
    assert logged["log_level"] == "critical"


# In a connection


@pytest.mark.parametrize("where", ["admission", "opening", "message", "resume", "writer"])
async def test_bug_in_one_connection_is_1011_for_that_client_only(
    redis_url: str, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    async with running(make_settings(redis_url)) as gateway:
        app = gateway.app
        owner, name = {
            "admission": (app.parts.admission, "try_admit"),
            "opening": (Reception, "_on_trios_clock"),
            "message": (Connection, "_hear"),
            "resume": (Replays, "_resume"),
            "writer": (Connection, "_write_out"),
        }[where]

        async def breaks(*_: object) -> None:
            raise faults.Injected

        def breaks_at_once(*_: object) -> None:
            raise faults.Injected

        async with admitted(gateway.staff_url("kitchen")) as bystander:
            monkeypatch.setattr(owner, name, breaks_at_once if where == "opening" else breaks)
            with structlog.testing.capture_logs() as logs:
                async with connect(gateway.staff_url("waiter") + "&last_event_id=") as client:
                    if where == "message":
                        await client.send_message("ping")
                    assert await closed(client) == (Close.INTERNAL_ERROR, "internal error")
            monkeypatch.undo()
            assert await received(bystander) == []
        async with admitted(gateway.staff_url("waiter")):
            pass
        assert [line["exc_info"] for line in logs if line["log_level"] == "error"] == [True]
        assert (await metrics(gateway.port))["connections_closed_total{1011}"] == 1
