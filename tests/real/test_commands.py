"""The gateway as a process, started by the hypercorn command and by ``serve``."""

import json
import re
import signal
import socket
import subprocess
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pytest
import redis
import trio
from websockets.exceptions import ConnectionClosed
from websockets.trio.client import ClientConnection
from websockets.trio.client import connect as connect_with_websockets

from tests.support.gateways import (
    JWT_SECRET,
    TABLE_SECRET,
    Metrics,
    Reachable,
    environment,
    free_port,
    http,
    metrics,
    process,
    until,
    wait,
)
from tests.support.stopwatch import Stopwatch
from trio_gateway.core.tokens import legacy_signature
from trio_gateway.testing import make_jwt, make_table_token

ROOT = Path(__file__).parents[2]
COMMANDS = {
    "hypercorn": ("hypercorn", "-c", "{config}", "trio_gateway.app:app"),
    "serve": ("trio_gateway", "serve", "-c", "{config}"),
}
# The other command runs with the chaos tests.
HYPERCORN_FIRST = pytest.mark.parametrize(
    "how", ["hypercorn", pytest.param("serve", marks=pytest.mark.chaos)]
)
SERVE_FIRST = pytest.mark.parametrize(
    "how", ["serve", pytest.param("hypercorn", marks=pytest.mark.chaos)]
)

# The contract (section 5) names these.
GAUGES = {
    "connections_total", "connections_by_endpoint", "circuit_breaker_state", "event_queue_depth",
}  # fmt: skip
COUNTERS = {
    "connections_rejected", "connections_closed", "broadcasts", "broadcasts_failed",
    "events_received", "events_processed", "events_dropped", "events_invalid", "events_duplicate",
    "events_unheard", "events_unknown_type", "deliveries", "messages_received",
}  # fmt: skip
HISTOGRAMS = {"broadcast_duration_seconds", "event_latency_seconds"}


@dataclass
class Served(Reachable):
    """A gateway process."""

    process: "subprocess.Popen[bytes]"

    async def ready(self) -> bool:
        try:
            return (await http(self.port, "/ws/health/ready")).status == 200
        except (OSError, trio.BrokenResourceError, trio.TooSlowError):
            return False  # Hypercorn listens before it serves


@asynccontextmanager
async def served(
    how: str,
    redis_url: str,
    folder: Path,
    *options: str,
    config: str = "",
    output: IO[bytes] | None = None,
    **settings: str,
) -> AsyncIterator[Served]:
    """Serve with a copy of the repository's hypercorn.toml, on another port and with more lines."""
    port = free_port()
    text = (ROOT / "hypercorn.toml").read_text()
    assert 'bind = ["0.0.0.0:8001"]' in text
    copy = folder / "hypercorn.toml"
    copy.write_text(text.replace("0.0.0.0:8001", f"127.0.0.1:{port}") + config)
    env = environment(redis_url, WS_MAX_CONNECTIONS_PER_USER="1000", **settings)
    words = [word.format(config=copy) for word in COMMANDS[how]]
    pipes = {} if output is None else {"stdout": output, "stderr": output}
    async with process(*words, *options, env=env, port=port, cwd=folder, **pipes) as started:
        gateway = Served(port, started)
        await until(gateway.ready, 30)
        yield gateway


@asynccontextmanager
async def client(url: str, **options: Any) -> AsyncIterator[ClientConnection]:
    """An admitted client of another library."""
    options = {"proxy": None, "compression": None, "ping_interval": None} | options
    async with connect_with_websockets(url, **options) as connection:
        await connection.send("ping")
        with trio.fail_after(5):
            assert await connection.recv() == '{"type":"pong"}'
        yield connection


async def ending(connection: ClientConnection, seconds: float = 5) -> tuple[int, str]:
    with trio.fail_after(seconds):
        try:
            while True:
                await connection.recv()
        except ConnectionClosed as error:
            found = error.rcvd
    assert found is not None
    return found.code, found.reason


def event(marker: object, **keys: Any) -> str:
    found = {"type": "ROUND_READY", "tenant_id": 1, "branch_id": 1, "session_id": 456}
    return json.dumps(found | {"entity": {"marker": marker}} | keys)


@pytest.mark.parametrize(("how", "number"), [
    ("hypercorn", signal.SIGTERM),
    ("serve", signal.SIGINT),
    pytest.param("hypercorn", signal.SIGINT, marks=pytest.mark.chaos),
    pytest.param("serve", signal.SIGTERM, marks=pytest.mark.chaos),
])  # fmt: skip
async def test_command_serves_the_four_endpoints_and_at_a_signal_ends_after_its_clients(
    backend: "redis.Redis", redis_url: str, tmp_path: Path, how: str, number: signal.Signals
) -> None:
    """Also the clients of the ASGI transport; each gets a hint when to come back."""
    async with served(how, redis_url, tmp_path) as gateway, AsyncExitStack() as stack:
        urls = {
            "waiter": gateway.staff_url("waiter"),
            "kitchen": gateway.staff_url("kitchen"),
            "admin": gateway.staff_url("admin"),
            "diner": gateway.diner_url(),
        }
        clients = {who: await stack.enter_async_context(client(url)) for who, url in urls.items()}
        text = event("🙏")
        backend.publish("branch:1:waiters", text)
        for connection in clients.values():
            with trio.fail_after(5):
                assert await connection.recv() == text
        await _check_health(gateway.port)
        _check_names(await metrics(gateway.port))

        used = await _used(gateway.port)
        second = await stack.enter_async_context(client(urls["waiter"], stream=used))
        # The shutdown must not wait for a client that has left.
        async with client(urls["diner"], stream=await _used(gateway.port)):
            pass
        watch = Stopwatch()
        gateway.process.send_signal(number)
        for connection in (*clients.values(), second):
            code, reason = await ending(connection, 2)
            assert code == 1001
            assert re.fullmatch(r"retry in \d+\.\d+s", reason)
        status, _, errors = await wait(gateway.process)
        assert watch.net < 4  # of Hypercorn's 5 s of patience
        assert status == 0
        assert b"Traceback" not in errors


async def _check_health(port: int) -> None:
    """Of a gateway with a client on each endpoint."""
    health = await http(port, "/ws/health")
    assert health.status == 200
    assert health.json == {
        "status": "healthy",
        "connections": {
            "total": 4,
            "by_endpoint": dict.fromkeys(("waiter", "kitchen", "admin", "diner"), 1),
        },
    }
    detailed = await http(port, "/ws/health/detailed")
    assert detailed.status == 200
    assert detailed.json.keys() >= {
        "status", "connections", "redis_async", "redis_sync", "circuit_breaker",
        "database", "rate_limiter", "event_queue", "stream",
    }  # fmt: skip
    assert detailed.json["rate_limiter"]["tracked_connections"] == 4
    assert detailed.json["circuit_breaker"].keys() >= {"state", "failures"}
    # Only of Pub/Sub: events of streams are never dropped.
    assert detailed.json["event_queue"] == {"depth": 0, "capacity": 5000, "dropped": 0}
    assert detailed.json["stream"].keys() >= {"cursor", "lag"}


def _check_names(figures: Metrics) -> None:
    kinds = {
        name.removeprefix("wsgateway_"): family.type for name, family in figures.families.items()
    }
    assert {name for name, kind in kinds.items() if kind == "gauge"} >= GAUGES
    assert {name for name, kind in kinds.items() if kind == "counter"} >= COUNTERS
    assert {name for name, kind in kinds.items() if kind == "histogram"} >= HISTOGRAMS
    assert figures["connections_total"] == 4
    assert figures.by_label("connections_by_endpoint") == dict.fromkeys(
        ("waiter", "kitchen", "admin", "diner"), 1
    )
    assert set(figures.by_label("circuit_breaker_state").values()) == {0}
    assert figures["deliveries_total"] == 4
    assert figures["broadcasts_total"] == 1
    assert figures["messages_received_total"] == 4
    assert figures["event_latency_seconds_count"] == 1
    assert figures["broadcast_duration_seconds_count"] == 1


@HYPERCORN_FIRST
async def test_stuck_client_delays_the_shutdown_by_a_few_seconds_at_most(
    backend: "redis.Redis", redis_url: str, tmp_path: Path, how: str
) -> None:
    async with (
        served(how, redis_url, tmp_path, WS_OUTBOX_BYTES="100000000") as gateway,
        client(gateway.staff_url("waiter"), max_size=None) as reader,
        _stuck_client(gateway.staff_url("waiter").removeprefix(gateway.url), gateway.port),
    ):
        await until(lambda: _connections(gateway, 2))
        for n in range(150):
            backend.publish("branch:1:waiters", event(n, data="x" * 60_000))
        for n in range(150):  # the other client is not delayed
            with trio.fail_after(10):
                assert json.loads(await reader.recv())["entity"]["marker"] == n
        watch = Stopwatch()
        gateway.process.send_signal(signal.SIGTERM)
        assert (await ending(reader, 2))[0] == 1001
        status, _, _ = await wait(gateway.process)
        assert status == 0
        assert watch.net < 5


async def _connections(gateway: Served, number: int) -> bool:
    return (await metrics(gateway.port))["connections_total"] == number


async def _used(port: int) -> trio.SocketStream:
    """A connection after a request: an upgrade on it uses the ASGI transport."""
    stream = await trio.open_tcp_stream("127.0.0.1", port)
    await stream.send_all(b"GET /ws/health HTTP/1.1\r\nHost: localhost\r\n\r\n")
    answer = b""
    while not answer.endswith(b"}\n"):
        answer += await stream.receive_some()
    return stream


def _upgrade(target: str, headers: Sequence[str] = ()) -> bytes:
    lines = [
        f"GET {target} HTTP/1.1", "Host: localhost", "Upgrade: websocket", "Connection: Upgrade",
        "Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==", *headers,
    ]  # fmt: skip
    return "\r\n".join([*lines, "", ""]).encode()


@asynccontextmanager
async def _stuck_client(target: str, port: int) -> AsyncIterator[None]:
    """A client that never reads, not even the answer to its handshake."""
    with socket.socket() as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.connect(("127.0.0.1", port))
        deaf.sendall(_upgrade(target))
        yield


async def test_metrics_are_right_with_two_workers(
    backend: "redis.Redis", redis_url: str, tmp_path: Path
) -> None:
    clients = 24
    async with (
        served("hypercorn", redis_url, tmp_path, "--workers", "2") as gateway,
        AsyncExitStack() as stack,
    ):
        totals: set[int] = set()

        async def both_ready() -> bool:  # the figures of a worker are there once it has started
            return (
                (await metrics(gateway.port)).by_label("circuit_breaker_state") != {}
                and len(await _workers(gateway.process.pid)) == 2
                and (await _ready_everywhere(gateway))
            )

        await until(both_ready, 10)
        connected = [
            await stack.enter_async_context(client(gateway.staff_url("waiter")))
            for _ in range(clients)
        ]
        with trio.fail_after(1):
            while not await _connections(gateway, clients):
                await trio.sleep(0.05)

        async def spread() -> bool:  # each worker reports its own clients
            health = await http(gateway.port, "/ws/health")
            totals.add(health.json["connections"]["total"])
            return (sum(totals) == clients and len(totals) == 2) or totals == {clients // 2}

        await until(spread)
        backend.publish("branch:1:waiters", event("for all"))
        for connection in connected:
            with trio.fail_after(5):
                assert json.loads(await connection.recv())["entity"]["marker"] == "for all"

        async def summed() -> bool:
            figures = await metrics(gateway.port)
            return (
                figures["deliveries_total"] == clients
                and figures["messages_received_total"] == clients
                and figures["events_received_total{pubsub}"] == 2  # each of them received it
                and figures["connections_by_endpoint{waiter}"] == clients
            )

        await until(summed, 2)
        await connected.pop().aclose()
        with trio.fail_after(1.5):
            while not await _connections(gateway, clients - 1):
                await trio.sleep(0.05)
        gateway.process.send_signal(signal.SIGTERM)
        for connection in connected:
            assert (await ending(connection))[0] == 1001
        status, _, _ = await wait(gateway.process)
        assert status == 0


async def _workers(master: int) -> list[int]:
    children = Path(f"/proc/{master}/task/{master}/children").read_text().split()
    return [
        int(pid) for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]


async def _ready_everywhere(gateway: Served) -> bool:
    return all([await gateway.ready() for _ in range(20)])


_BROKEN = """
import trio
import trio_gateway.gateway

async def reap(*args, **kwargs):
    await trio.sleep(0.5)
    raise ZeroDivisionError("the reaper has a bug")

trio_gateway.gateway.reap = reap
"""


@pytest.mark.chaos  # tests/real/test_output.py has a short one
@pytest.mark.parametrize("how", COMMANDS)
async def test_bug_in_a_background_task_ends_the_process_with_an_error(
    redis_url: str, tmp_path: Path, how: str
) -> None:
    """Otherwise a gateway without its sources would go on answering 200."""
    (tmp_path / "sitecustomize.py").write_text(_BROKEN)
    async with served(how, redis_url, tmp_path, PYTHONPATH=str(tmp_path)) as gateway:
        status, _, errors = await wait(gateway.process)
        assert status == 1
        lines = [json.loads(line) for line in errors.splitlines() if line.startswith(b"{")]
        (bug,) = [line for line in lines if line["event"] == "stopped by a bug"]
        assert bug["level"] == "critical"
        assert "ZeroDivisionError: the reaper has a bug" in bug["exception"]


@SERVE_FIRST
async def test_second_signal_ends_the_process_at_once(
    redis_url: str, tmp_path: Path, how: str
) -> None:
    async with (
        served(how, redis_url, tmp_path, WS_OUTBOX_BYTES="100000000") as gateway,
        _stuck_client(gateway.staff_url("waiter").removeprefix(gateway.url), gateway.port),
    ):
        await until(lambda: _connections(gateway, 1))
        with redis.Redis.from_url(redis_url) as backend:
            for n in range(150):
                backend.publish("branch:1:waiters", event(n, data="x" * 60_000))
        gateway.process.send_signal(signal.SIGTERM)
        await until(lambda: _drains(gateway))
        watch = Stopwatch()
        gateway.process.send_signal(signal.SIGTERM)
        status, _, _ = await wait(gateway.process)
        assert status == 0
        assert watch.net < 1.5


async def _drains(gateway: Served) -> bool:
    return (await http(gateway.port, "/ws/health/ready")).status == 503


async def test_hypercorn_command_reports_invalid_settings(redis_url: str, tmp_path: Path) -> None:
    config = str(ROOT / "hypercorn.toml")
    bind = f"127.0.0.1:{free_port()}"
    env = environment(redis_url, WS_PING_INTERVAL="often", WS_UNHEARD_OF="1")
    words = ("hypercorn", "-c", config, "-b", bind, "trio_gateway.app:app")
    async with process(*words, env=env, cwd=tmp_path) as started:
        status, _, errors = await wait(started)
    assert status == 2
    assert len(errors.splitlines()) == 2
    assert b"WS_UNHEARD_OF" in errors
    assert b"Traceback" not in errors


# Secrets in the output


def _tokens() -> dict[str, str]:
    """Valid and invalid tokens of every kind, by name."""
    fields = "1:1:10:456:4102444800"
    return {
        "staff": make_jwt(JWT_SECRET, jti="7d1f5c0e"),
        "expired": make_jwt(JWT_SECRET, life=-100),
        "other secret": make_jwt("another secret of thirty-two bytes"),
        "table": make_table_token(TABLE_SECRET),
        "legacy": f"{fields}:{legacy_signature(fields, TABLE_SECRET)}",
        "wrong legacy": f"{fields}:{legacy_signature(fields, JWT_SECRET)}",
        "cut": make_jwt(JWT_SECRET, sub="77")[:90],
        "junk": "Zm9vYmFyLW5vdC1hLXRva2Vu-malformed",
        "escaped": make_jwt(JWT_SECRET, sub="78").replace(".", "%2E"),
    }


ACCESS_LOG = (
    "\naccesslog = \"-\"\nerrorlog = \"-\"\naccess_log_format = "
    "'%(h)s \"%(R)s\" \"%(r)s\" %(q)s %(U)s %(s)s "
    "%({authorization}i)s %({sec-websocket-protocol}i)s %({referer}i)s'\n"
)  # fmt: skip


@SERVE_FIRST
async def test_no_output_shows_a_token_or_a_part_of_one(
    backend: "redis.Redis", redis_url: str, tmp_path: Path, how: str
) -> None:
    tokens = _tokens()
    with (tmp_path / "output").open("wb") as output:
        async with served(
            how,
            redis_url,
            tmp_path,
            config=ACCESS_LOG,
            output=output,
            LOG_LEVEL="debug",
            ALLOW_LEGACY_TABLE_TOKENS="true",
        ) as gateway:
            for n in range(3):  # tickets that are used, and one that is not
                reply = await http(
                    gateway.port,
                    "/ws/ticket",
                    method="POST",
                    headers={"Authorization": f"Bearer {tokens['staff']}"},
                )
                tokens[f"ticket {n}"] = reply.json["ticket"]
            for token in tokens.values():
                async with trio.open_nursery() as nursery:
                    for target, headers in _ways(token):
                        upgrade = _upgrade(target, headers)
                        nursery.start_soon(_visit, gateway.port, upgrade, False)
                        nursery.start_soon(_visit, gateway.port, upgrade, True)
                    nursery.start_soon(_ask, gateway.port, token)
            gateway.process.send_signal(signal.SIGTERM)
            await wait(gateway.process)
    shown = (tmp_path / "output").read_text()
    assert '"GET /ws/health?token=[redacted]' in shown.replace("'", '"')  # the access log was on
    for event in ("rejected", "upgrade refused", "closed"):  # one line a second of each kind
        assert f'"event":"{event}"' in shown
    anywhere = _parts(shown)
    assert not [what for what, token in tokens.items() if _parts(token) & anywhere]


def _ways(token: str) -> list[tuple[str, list[str]]]:
    """The places of a handshake that may contain a token, wrong ones included."""
    return [
        (f"/ws/waiter?token={token}", []),
        (f"/ws/waiter?x=1&token={token}&last_event_id=1", []),
        (f"/ws/diner?table_token={token}", []),
        (f"/ws/diner?token={token}", []),
        (f"/ws/kitchen?ticket={token}", []),
        (f"/ws/waiter?Token={token}", []),
        (f"/ws/nowhere?token={token}", []),
        ("/ws/waiter", [f"Authorization: Bearer {token}"]),
        ("/ws/diner", [f"Authorization: bearer  {token}"]),
        ("/ws/admin", [f"Sec-WebSocket-Protocol: gateway.v1, bearer.{token}"]),
        ("/ws/waiter", [f"Sec-WebSocket-Protocol: bearer.{token}"]),
        (f"/ws/waiter?token={token}", [f"Sec-WebSocket-Key: {token}"]),
        (f"/ws/waiter?token={token}", [f"Origin: https://evil.example/?token={token}"]),
        (f"/ws/waiter?token={token}", [f"Referer: https://a.example/?table_token={token}"]),
    ]


async def _ask(port: int, token: str) -> None:
    """Plain requests that contain a token."""
    bearer = {"Authorization": f"Bearer {token}"}
    for path in ("/ws/waiter", "/ws/health", "/ws/nowhere", "/ws/catchup", "/"):
        for name in ("token", "ticket", "table_token"):
            await http(port, f"{path}?{name}={token}", headers=bearer)
    await http(port, "/ws/ticket", method="POST", headers=bearer)


async def _visit(port: int, upgrade: bytes, over_asgi: bool) -> None:
    """Request an upgrade and disconnect at once; over ASGI as a second request."""
    with trio.fail_after(5):
        stream = await (_used(port) if over_asgi else trio.open_tcp_stream("127.0.0.1", port))
        async with stream:
            renewal = b'{"type":"auth","token":"Zm9vYmFyLW5vdC1hLXRva2Vu-malformed"}'
            frame = b"\x81" + bytes([0x80 | len(renewal)]) + bytes(4) + renewal
            await stream.send_all(upgrade)
            await stream.receive_some()
            with trio.move_on_after(2):
                try:
                    await stream.send_all(frame + b"\x88\x80" + bytes(4))
                    while await stream.receive_some():
                        pass
                except trio.BrokenResourceError:
                    pass


def _parts(text: str) -> set[str]:
    """All substrings of twelve characters."""
    return {text[i : i + 12] for i in range(len(text) - 11)}
