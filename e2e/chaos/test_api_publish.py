"""What the API says of an event is true, while primaries are killed, frozen and replaced."""

import itertools
import json
import random
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Final

import httpx
import pytest
import trio

from tests.support.api_keys import bearer_of, write_keys
from tests.support.processes import GatewayProcess
from trio_gateway.core.event_ids import entry_id, read_cursor
from trio_gateway.redis_sets import Node, RedisSet, cluster_set, sentinel_set

pytestmark = pytest.mark.chaos

STREAM: Final = "events:critical"
SETS: Final[dict[str, Any]] = {"Sentinel": sentinel_set, "Cluster": cluster_set}
BACKENDS: Final = 4
BATCH: Final = 20
PAUSE: Final = 0.02  # seconds from one request of a backend to the next


class Backends:
    """Programs that publish in batches, again and again until each event is published.

    Each attempt to publish an event has a number of its own, so that what became of it can be
    looked up in the stream later.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._numbers = itertools.count()
        self.published: dict[int, str] = {}  # the entry's id, by attempt
        self.denied: set[int] = set()  # told as not published
        self.outcomes: Counter[str] = Counter()
        self.is_over = False

    async def run(self, backend: int) -> None:
        chooser = random.Random(backend)
        async with httpx.AsyncClient(base_url=self._url, timeout=30) as client:
            left = [f"{backend}-{n}" for n in range(BATCH)]
            while not self.is_over or left:
                left = await self._publish(client, left)
                if not left and not self.is_over:
                    left = [f"{backend}-{chooser.getrandbits(60):x}" for _ in range(BATCH)]
                await trio.sleep(PAUSE)

    async def _publish(self, client: httpx.AsyncClient, ids: list[str]) -> list[str]:
        """Publish events with these ids; return those to be published again."""
        attempts = {next(self._numbers): each for each in ids}
        events = [
            {"type": "ROUND_READY", "tenant_id": 1, "branch_id": 1, "id": each, "attempt": number}
            for number, each in attempts.items()
        ]
        reply = await client.post(
            "/ws/api/publish?confirm=all", json={"events": events}, headers=bearer_of("all")
        )
        if reply.status_code == 503:
            assert "retry-after" in reply.headers
            self.denied |= attempts.keys()
            self.outcomes["503"] += len(attempts)
            return ids
        assert reply.status_code == 200, reply.text
        again = []
        for (number, its_id), answer in zip(
            attempts.items(), reply.json()["published"], strict=True
        ):
            error = answer.get("error")
            self.outcomes[str(error)] += 1
            if error is None:
                ((_, position),) = read_cursor(answer["event_id"]).items()
                self.published[number] = entry_id(position)
            elif error != "in_doubt":
                self.denied.add(number)
            if error is not None:
                again.append(its_id)
        return again


def kill(servers: RedisSet, primary: Node) -> Callable[[], None]:
    primary.kill()
    return lambda: servers.rejoin(primary)


def freeze(servers: RedisSet, primary: Node) -> Callable[[], None]:
    primary.freeze()
    return primary.thaw


def plan(servers: RedisSet, primary: Node) -> Callable[[], None]:
    servers.failover(STREAM)
    return lambda: None


@pytest.mark.parametrize("kind", SETS)
@pytest.mark.parametrize("fault", [kill, freeze, plan], ids=lambda fault: str(fault.__name__))
async def test_an_event_told_as_published_is_there_and_one_told_as_not_published_is_not(
    kind: str,
    fault: Callable[[RedisSet, Node], Callable[[], None]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with SETS[kind]() as servers:
        keys = str(write_keys(tmp_path))
        process = GatewayProcess(servers.url, tmp_path, WS_API_KEYS_FILE=keys)
        await process.start()
        backends = Backends(process.url)
        try:
            async with trio.open_nursery() as nursery:
                for number in range(BACKENDS):
                    nursery.start_soon(backends.run, number)
                for _ in range(3):
                    await trio.sleep(1)
                    before = await trio.to_thread.run_sync(servers.primary, STREAM)
                    mend = await trio.to_thread.run_sync(fault, servers, before)
                    writable = partial(servers.wait_writable, STREAM, other_than=before)
                    await trio.to_thread.run_sync(writable)
                    await trio.sleep(1)
                    await trio.to_thread.run_sync(mend)
                    await trio.to_thread.run_sync(servers.wait_healthy)
                await trio.sleep(1)
                backends.is_over = True
                nursery.cancel_scope.deadline = trio.current_time() + 60
        finally:
            process.kill()
        with servers.primary(STREAM).client(timeout=10) as client:
            entries: Any = client.xrange(STREAM)
    there = {json.loads(fields["data"])["attempt"]: number for number, fields in entries}
    with capsys.disabled():
        print(f"\n{kind}, {fault.__name__}: {dict(backends.outcomes)}")
    assert len(backends.published) > 1000
    if fault is not plan:  # which a Cluster hands over without a failure
        assert backends.outcomes.keys() - {"None"}, "no fault was noticed"
    lost = {n: number for n, number in backends.published.items() if there.get(n) != number}
    assert not lost
    assert not backends.denied & there.keys()
