"""Gateways for the tests: with a real Redis-compatible server, real sockets, both transports."""

import inspect
import io
import json
import logging
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Hashable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal

import h11
import hypercorn.trio
import hypercorn.trio.run
import redis
import trio
import trustme
from hypercorn.config import Config
from hypercorn.trio.tcp_server import TCPServer
from prometheus_client.parser import text_string_to_metric_families
from trio_websocket import ConnectionClosed, WebSocketConnection, open_websocket_url

from trio_gateway.access.admission import default_auth
from trio_gateway.access.auth import Auth
from trio_gateway.broker.commands import Commands
from trio_gateway.broker.topologies import make_topology
from trio_gateway.broker.topology_watch import watch
from trio_gateway.core.audiences import Endpoint
from trio_gateway.core.resilience import Breaker
from trio_gateway.gateway import Gateway, create_app
from trio_gateway.redis_url import RedisKind, RedisUrl
from trio_gateway.settings import Settings
from trio_gateway.testing import make_jwt, make_table_token
from trio_gateway.transports import tcp

from .ports import free_port as free_port
from .redis_server import RedisServer as RedisServer
from .redis_server import valkey as valkey
from .stopwatch import Stopwatch

JWT_SECRET = "0123456789abcdef" * 4
TABLE_SECRET = "fedcba9876543210" * 4
Transport = Literal["direct", "asgi"]
_STUCK = 30  # seconds; no claim: what takes longer will never end


def make_settings(redis_url: str, **changes: Any) -> Settings:
    """Settings with secrets, high limits, and short deadlines for Redis."""
    values: dict[str, Any] = {
        "redis_url": redis_url,
        "jwt_secret": JWT_SECRET,
        "table_token_secret": TABLE_SECRET,
        "ws_max_connections_per_user": 1000,
        "ws_max_connections_per_session": 1000,
        "log_format": "json",
    }
    values |= changes
    if not all(isinstance(value, Hashable) for value in values.values()):
        return Settings(**values)
    return _make_settings(frozenset(os.environ.items()), Path.cwd(), **values)


@lru_cache(typed=True)
def _make_settings(environ: frozenset[tuple[str, str]], folder: Path, **values: Any) -> Settings:
    """Settings are immutable: hundreds of tests share them, and reading them takes 5 ms."""
    return Settings(**values)


@dataclass
class Reachable:
    """A gateway that serves on a real socket."""

    port: int

    @property
    def url(self) -> str:
        return f"ws://127.0.0.1:{self.port}"

    def staff_url(self, endpoint: str, **claims: Any) -> str:
        """Where to connect as staff: WAITER on the waiter endpoint, and so on."""
        token = make_jwt(JWT_SECRET, **{"roles": [endpoint.upper()]} | claims)
        return f"{self.url}/ws/{endpoint}?token={token}"

    def diner_url(self, **claims: Any) -> str:
        return f"{self.url}/ws/diner?table_token={make_table_token(TABLE_SECRET, **claims)}"


@dataclass
class Running(Reachable):
    """A gateway in this process."""

    app: Gateway
    stop: trio.Event


@asynccontextmanager
async def running(
    settings: Settings,
    *,
    transport: Transport = "direct",
    auth: Mapping[Endpoint, Auth] | None = None,
    wait_ready: bool = True,
    config: Config | None = None,
    clock: Callable[[], float] = time.time,
) -> AsyncIterator[Running]:
    """Serve a gateway in this process, with the direct transport or with ASGI alone.

    Fails if Hypercorn logs an error: a client may have a whole answer although the app has raised.
    """
    tcp.install(settings.ws_write_timeout)
    if transport == "asgi":
        vars(hypercorn.trio.run)["TCPServer"] = TCPServer
    app = create_app(settings, auth=auth, clock=clock)
    config = config or Config()
    config.bind = ["127.0.0.1:0"]
    errors = io.StringIO()
    config.errorlog = logger = logging.Logger("hypercorn.error", logging.ERROR)
    logger.addHandler(logging.StreamHandler(errors))
    config.websocket_max_message_size = 65536
    stop = trio.Event()

    async def shutdown_trigger() -> None:
        await stop.wait()
        await app.drain()

    try:
        async with trio.open_nursery() as nursery:
            binds = await nursery.start(
                partial(
                    hypercorn.trio.serve,
                    app,
                    config,
                    shutdown_trigger=shutdown_trigger,
                    mode="asgi",
                )
            )
            if wait_ready:
                with trio.fail_after(5):
                    while not app.ready:
                        await trio.sleep(0.005)
            yield Running(int(binds[0].rsplit(":", 1)[1]), app, stop)
            stop.set()
    finally:
        tcp.install(settings.ws_write_timeout)
    assert not errors.getvalue(), errors.getvalue()


def with_certificate(config: Config, folder: Path) -> ssl.SSLContext:
    """Serve TLS for ``localhost``; returns the context of a client that trusts it."""
    authority = trustme.CA()
    certificate = authority.issue_cert("localhost")
    config.certfile, config.keyfile = str(folder / "cert.pem"), str(folder / "key.pem")
    certificate.cert_chain_pems[0].write_to_path(config.certfile)
    certificate.private_key_pem.write_to_path(config.keyfile)
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    return trusting


@asynccontextmanager
async def serving(redis_url: str, transport: Transport, **changes: Any) -> AsyncIterator[Running]:
    """Serve a gateway with these settings changed, over this transport."""
    async with running(make_settings(redis_url, **changes), transport=transport) as gateway:
        yield gateway


@asynccontextmanager
async def connect(url: str, **kwargs: Any) -> AsyncIterator[WebSocketConnection]:
    """A client of trio-websocket, which leaves its socket open when the gateway closes first."""
    async with open_websocket_url(url, **kwargs) as client:
        try:
            yield client
        finally:
            if client.closed:
                await trio.aclose_forcefully(client._stream)


@asynccontextmanager
async def admitted(url: str, **kwargs: Any) -> AsyncIterator[WebSocketConnection]:
    """A client that has been admitted, and receives what is published from now on.

    A connected client need not be admitted yet, because the upgrade is accepted first.
    """
    async with connect(url, **kwargs) as client:
        assert await received(client) == []
        yield client


@asynccontextmanager
async def with_waiter(redis_url: str) -> AsyncIterator[tuple[Running, WebSocketConnection]]:
    """A gateway with one client, a waiter."""
    async with (
        running(make_settings(redis_url)) as gateway,
        admitted(gateway.staff_url("waiter")) as waiter,
    ):
        yield gateway, waiter


async def receive_event(client: WebSocketConnection, seconds: float = 2) -> Any:
    """The next message, decoded."""
    with trio.fail_after(seconds):
        return json.loads(await client.get_message())


async def received_texts(client: WebSocketConnection) -> list[str]:
    """The messages so far: everything before the answer to a ping."""
    found: list[str] = []
    await client.send_message('{"type":"ping"}')
    with trio.fail_after(_STUCK):
        while (message := await client.get_message()) != '{"type":"pong"}':
            found.append(str(message))
    return found


async def received(client: WebSocketConnection) -> list[Any]:
    """The messages so far, decoded."""
    return [json.loads(text) for text in await received_texts(client)]


async def closed(client: WebSocketConnection, seconds: float = 5) -> tuple[int, str]:
    """The code and reason with which the gateway closes; events before it are skipped.

    Fails after this many seconds, net of the machine's.
    """
    watch = Stopwatch()
    ending = None
    while ending is None:
        with trio.move_on_after(max(0.1, seconds - watch.net)) as waiting:
            try:
                while True:
                    await client.get_message()
            except ConnectionClosed as error:
                ending = error.reason
                break
        if waiting.cancelled_caught and watch.net >= seconds:
            raise trio.TooSlowError
    assert ending is not None
    return ending.code, ending.reason or ""


async def settle(running: Running) -> None:
    """Wait until everything that was published before is delivered."""
    app, client = running.app, redis.Redis.from_url(running.app.settings.redis_url)
    marker = f"tests:{os.urandom(8).hex()}".encode()
    seen = trio.Event()
    assert app.parts.pubsub is not None
    assert app.parts.streams is not None
    # Redis sends in order: when the marker arrives, everything published before it has arrived.
    listeners = app.parts.pubsub.listeners
    channel = next(iter(listeners))
    before = listeners[channel]
    listeners[channel] = lambda payload: seen.set() if payload == marker else before(payload)
    try:
        client.publish(channel, marker)
        with trio.fail_after(5):
            await seen.wait()
            for stream in app.parts.streams.cursors:
                last: Any = client.xrevrange(stream, count=1)
                while last and app.parts.streams.cursors[stream] != last[0][0].decode():
                    await trio.sleep(0.002)
            await app.parts.pubsub_queue.wait_idle()
            await app.parts.stream_queue.wait_idle()
    finally:
        listeners[channel] = before
        client.close()


@dataclass(frozen=True)
class Reply:
    """The response to an HTTP request."""

    status: int
    text: str
    headers: Mapping[str, str] = field(default_factory=dict)  # names in lower case

    @property
    def json(self) -> Any:
        return json.loads(self.text)


async def http(
    port: int,
    path: str,
    *,
    method: str = "GET",
    headers: Mapping[str, str] | None = None,
    json_body: Any = None,
) -> Reply:
    """Send one request on a new connection. A body of bytes is sent as it is."""
    if isinstance(json_body, bytes):
        sent = json_body
    else:
        sent = b"" if json_body is None else json.dumps(json_body).encode()
    length = {"Content-Length": str(len(sent))} if sent else {}
    request = h11.Request(
        method=method,
        target=path,
        headers=[("Host", "localhost"), *length.items(), *(headers or {}).items()],
    )
    client = h11.Connection(h11.CLIENT)
    status, body, event = 0, b"", None
    received: dict[str, str] = {}
    with trio.fail_after(5):
        async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
            parts = [request, *([h11.Data(sent)] if sent else []), h11.EndOfMessage()]
            await stream.send_all(b"".join(client.send(part) or b"" for part in parts))
            while not isinstance(event, h11.EndOfMessage):
                event = client.next_event()
                if event is h11.NEED_DATA:
                    client.receive_data(await stream.receive_some())
                elif isinstance(event, h11.Response):
                    status = event.status_code
                    for name, value in event.headers:
                        key, text = name.decode(), value.decode()
                        received[key] = f"{received[key]}, {text}" if key in received else text
                elif isinstance(event, h11.Data):
                    body += event.data
    return Reply(status, body.decode(), received)


class Metrics:
    """The samples of ``/ws/metrics`` by name and by the value of their label."""

    def __init__(self, text: str) -> None:
        self.families = {family.name: family for family in text_string_to_metric_families(text)}
        self._samples = {
            (sample.name, *sample.labels.values()): sample.value
            for family in self.families.values()
            for sample in family.samples
        }

    def __getitem__(self, name: str) -> float:
        """The sample ``wsgateway_<name>``; ``name{value}`` for one with a label, 0 if absent."""
        bare, _, label = name.partition("{")
        key = (f"wsgateway_{bare}", label[:-1]) if label else (f"wsgateway_{bare}",)
        return self._samples.get(key, 0.0)

    def by_source_and_reason(self, name: str) -> dict[tuple[str, str], float]:
        """The values of a metric with these two labels."""
        found = self.families[f"wsgateway_{name}".removesuffix("_total")].samples
        return {
            (sample.labels["source"], sample.labels["reason"]): sample.value for sample in found
        }

    def by_label(self, name: str) -> dict[str, float]:
        """The values of a metric by the value of its label."""
        return {
            key[1]: value
            for key, value in self._samples.items()
            if key[0] == f"wsgateway_{name}" and len(key) == 2
        }


async def metrics(port: int) -> Metrics:
    return Metrics((await http(port, "/ws/metrics")).text)


async def until(true: Callable[[], Any], seconds: float = 5) -> None:
    """Wait until a condition is true; fail after this many seconds, net of the machine's."""
    watch = Stopwatch()
    with trio.fail_after(seconds + _STUCK):
        while True:
            found = true()
            if await found if inspect.isawaitable(found) else found:
                return
            if watch.net > seconds:
                raise trio.TooSlowError
            await trio.sleep(0.01)


def environment(redis_url: str, **settings: str) -> dict[str, str]:
    """The environment of a gateway process."""
    names = ("PATH", "HOME", "LANG", "PYTHONPATH")  # the last one: the same code as in this process
    inherited = {name: os.environ[name] for name in names if name in os.environ}
    measured = {name: value for name, value in os.environ.items() if name.startswith("COV")}
    return {
        **inherited,
        **measured,
        "REDIS_URL": redis_url,
        "JWT_SECRET": JWT_SECRET,
        "TABLE_TOKEN_SECRET": TABLE_SECRET,
        "LOG_FORMAT": "json",
        **settings,
    }


@asynccontextmanager
async def process(
    *arguments: str, env: Mapping[str, str], port: int | None = None, **options: Any
) -> AsyncIterator[subprocess.Popen[bytes]]:
    """Run ``python -m`` with these arguments; wait until it accepts on ``port``, if one is given.

    It is killed at the end.
    """
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    started = subprocess.Popen(
        [sys.executable, "-m", *arguments], env=dict(env), start_new_session=True, **pipes | options
    )
    try:
        if port is not None:
            with trio.fail_after(60):  # a loaded machine starts slowly
                while not accepts(port):
                    if started.poll() is not None:
                        raise AssertionError(
                            started.stderr.read() if started.stderr else "it ended"
                        )
                    await trio.sleep(0.02)
        yield started
    finally:
        with suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGKILL)
        started.communicate(timeout=60)  # its workers end by themselves, and close the pipes


def accepts(port: int) -> bool:
    """Whether something on this machine accepts connections on the port."""
    try:
        socket.create_connection(("127.0.0.1", port), timeout=2).close()
    except OSError:
        return False
    return True


async def wait(started: "subprocess.Popen[bytes]", seconds: float = 10) -> tuple[int, bytes, bytes]:
    """Exit status, output and errors of a process that is about to end."""
    with trio.fail_after(seconds):
        while started.poll() is None:
            await trio.sleep(0.02)
    out, err = started.communicate()
    return started.returncode, out, err


@asynccontextmanager
async def open_commands(
    url: str, reads: Breaker, writes: Breaker, *, max_connections: int
) -> AsyncIterator[Commands]:
    """Running commands without a gateway."""
    where = RedisUrl.from_url(url)
    topology = make_topology(where)
    commands = Commands(topology, reads, writes, max_connections=max_connections)
    async with commands_running(commands), trio.open_nursery() as nursery:
        sentinels = where.seeds if where.kind is RedisKind.SENTINEL else ()
        nursery.start_soon(watch, topology, sentinels)
        yield commands
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def commands_running(commands: Commands) -> AsyncIterator[None]:
    """Run the commands of a gateway that does not serve."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(commands.run)
        yield
        nursery.cancel_scope.cancel()


def make_idle_app(settings: Settings) -> Gateway:
    """An app that does not serve: it authenticates, and looks up no revocation in Redis."""
    return create_app(settings, auth=default_auth(settings))
