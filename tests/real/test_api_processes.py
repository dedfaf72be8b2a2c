"""The API acts for the whole service: what it says while one of the processes is frozen."""

import signal
from pathlib import Path

import redis
import trio

from tests.support.api_keys import call, write_keys
from tests.support.gateways import Reachable, admitted, closed, serving, until
from tests.support.processes import GatewayProcess
from tests.support.stopwatch import Stopwatch

WAITER = {"tenant_id": 1, "user_id": "21"}


async def test_a_process_that_does_not_answer_is_named_within_two_seconds_and_acts_later(
    redis_url: str, backend: "redis.Redis", tmp_path: Path
) -> None:
    other = GatewayProcess(redis_url, tmp_path, WS_CLUSTER="true")
    changes = {"ws_api_keys_file": write_keys(tmp_path), "ws_cluster": True}
    try:
        async with serving(redis_url, "direct", **changes) as gateway:
            await other.start()
            assert other.process is not None
            url = Reachable(other.port).staff_url("waiter", sub="21")
            async with admitted(url) as client:
                mark = f"-{other.process.pid}-"
                names: list[str] = []

                async def is_known() -> bool:
                    nodes = (await call(gateway.port, "nodes")).json["nodes"]
                    names[:] = [each["name"] for each in nodes if mark in each["name"]]
                    return bool(names)

                await until(is_known, 10)
                other.process.send_signal(signal.SIGSTOP)
                watch = Stopwatch()
                answers = {}

                async def ask(path: str, body: object = None) -> None:
                    answers[path.partition("?")[0]] = (await call(gateway.port, path, body)).json

                async with trio.open_nursery() as nursery:
                    nursery.start_soon(ask, "disconnect", WAITER)
                    nursery.start_soon(ask, "refresh", {"tenant_id": 1, "waiter_id": 21})
                    nursery.start_soon(ask, "presence?tenant_id=1&branch_id=1")
                assert watch.net < 2.5
                for answer in answers.values():
                    assert (answer["complete"], answer["missing"]) == (False, names)
                assert answers["disconnect"]["closed"] == 0
                other.process.send_signal(signal.SIGCONT)
                assert (await closed(client))[0] == 4001
    finally:
        other.kill()
