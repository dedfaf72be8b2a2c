"""The Python client over gateways that are drained and killed in turn while events come."""

import json
import signal
from collections import Counter

import pytest
import redis
import trio

from tests.support import gateways as harness
from tests.support.gateways import JWT_SECRET, until, valkey
from trio_gateway.client import Status, connect, connection
from trio_gateway.testing import make_jwt

pytestmark = pytest.mark.chaos
ROUNDS = 6
EVERY = 0.01  # seconds between two events


async def test_no_event_is_lost_or_doubled_however_the_gateway_ends(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "STABLE", 0.5)  # each end is one of its own, not a row of them
    port, statuses, gaps = harness.free_port(), list[Status](), list[str]()
    published, found = 0, list[int]()
    done = trio.Event()

    async def run_gateways(redis_url: str) -> None:
        for number in range(ROUNDS + 1):
            async with harness.process(
                "trio_gateway", "serve", "-b", f"127.0.0.1:{port}",
                env=harness.environment(redis_url), port=port,
            ) as process:  # fmt: skip
                await until(lambda: bool(statuses) and statuses[-1].state == "open", 60)
                await trio.sleep(1)
                if number == ROUNDS:
                    done.set()
                    await trio.sleep_forever()
                process.send_signal(signal.SIGTERM if number % 2 else signal.SIGKILL)
                with trio.move_on_after(10):
                    await harness.wait(process)

    async def publish(backend: "redis.Redis") -> None:
        nonlocal published
        while not done.is_set():
            event = {"type": "ROUND_READY", "tenant_id": 1, "branch_id": 1, "n": published}
            backend.xadd("events:critical", {"data": json.dumps(event)})
            published += 1
            await trio.sleep(EVERY)

    with valkey() as server, redis.Redis.from_url(server.connection_url) as backend:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run_gateways, server.connection_url)
            async with connect(
                f"ws://127.0.0.1:{port}/ws/waiter",
                make_jwt(JWT_SECRET),
                on_gap=gaps.append,
                on_state=statuses.append,
            ) as client:
                with trio.fail_after(60):
                    await client.wait_open()
                nursery.start_soon(publish, backend)
                with trio.move_on_after(300):
                    while not done.is_set() or len(found) < published:
                        found.append((await anext(client)).data["n"])
            nursery.cancel_scope.cancel()
    codes = Counter(status.code for status in statuses if status.state == "waiting")
    with capsys.disabled():
        print(
            f"\n{published} events over {ROUNDS} ends of the gateway; sockets ended: {dict(codes)}"
        )
    assert found == list(range(published))
    assert gaps == []
    assert codes[1001] == ROUNDS // 2
    assert codes[1006] >= ROUNDS // 2
    for status in statuses:
        if status.code == 1001:
            assert status.reason == f"retry in {status.retry_in}s"
