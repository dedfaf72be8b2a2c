"""Gateways behind nginx and HAProxy, with the configurations of ``deploy/``."""

import json
import os
import shutil
import subprocess
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import redis
import trio

from tests.support.gateways import (
    JWT_SECRET,
    environment,
    free_port,
    http,
    metrics,
    process,
    until,
)
from tests.support.ports import free_ports
from trio_gateway.testing import make_jwt

DEPLOY = Path(__file__).parents[2] / "deploy"
IDLE = 2  # seconds of silence after which the proxies close a connection
PING = "0.5"


@dataclass
class Behind:
    """Gateways behind a proxy."""

    port: int
    ports: list[int]
    gateways: "list[subprocess.Popen[bytes]]"
    backend: "redis.Redis"
    log: Path
    _stack: AsyncExitStack
    env: dict[str, str]

    async def start(self, number: int) -> None:
        """Start this gateway, in place of one that has ended."""
        port = self.ports[number]
        command = ("trio_gateway", "serve", "--bind", f"127.0.0.1:{port}")
        started = await self._stack.enter_async_context(process(*command, env=self.env, port=port))
        self.gateways[number:] = [started, *self.gateways[number + 1 :]]

    async def start_workers(self) -> None:
        """Start a supervisor with a worker for each port."""
        bind, count = f"127.0.0.1:{self.ports[0]}", str(len(self.ports))
        command = ("trio_gateway", "serve", "--bind", bind, "--workers", count, "--own-ports")
        supervisor = await self._stack.enter_async_context(process(*command, env=self.env))
        self.gateways = [supervisor]
        for port in self.ports:
            await until(lambda port=port: _is_ready(port), 30)  # type: ignore[misc]

    async def closed(self, number: int, code: int) -> float:
        """How many connections this gateway has closed with the code."""
        return (await metrics(self.ports[number]))[f"connections_closed_total{{{code}}}"]

    async def connections(self) -> list[int]:
        """How many each gateway has; -1 for one that does not answer."""
        return [await _connections(port) for port in self.ports]

    def url(self, **claims: Any) -> str:
        token = make_jwt(JWT_SECRET, **claims)
        return f"ws://127.0.0.1:{self.port}/ws/waiter?token={token}"

    def publish(self, marker: int) -> None:
        event = {"type": "ROUND_READY", "tenant_id": 1, "branch_id": 1, "marker": marker}
        self.backend.xadd("events:critical", {"data": json.dumps(event)})


async def _is_ready(port: int) -> bool:
    try:
        return (await http(port, "/ws/health/ready")).status == 200
    except (OSError, trio.TooSlowError):
        return False


async def _connections(port: int) -> int:
    try:
        reply = await http(port, "/ws/health")
    except (OSError, trio.BrokenResourceError):
        return -1
    return int(reply.json["connections"]["total"])


def nginx(folder: Path, port: int, ports: list[int]) -> list[str]:
    text = (DEPLOY / "nginx.conf").read_text()
    text = text.replace("listen 8080;", f"listen 127.0.0.1:{port};")
    for before, now in zip((8001, 8002), ports, strict=False):
        text = text.replace(f"127.0.0.1:{before}", f"127.0.0.1:{now}")
    text = text.replace("75s", f"{IDLE}s").replace("/var/log/nginx/gateway", f"{folder}/access")
    places = "".join(
        f"{kind}_temp_path {folder}/{kind};\n"
        for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    own = "user root;\n" if os.geteuid() == 0 else ""  # who can write to the folder
    config = folder / "nginx.conf"
    config.write_text(
        f"{own}daemon off; pid {folder}/pid; error_log {folder}/error.log;\n"
        f"events {{}}\nhttp {{\n{places}{text}\n}}\n"
    )
    return ["nginx", "-p", str(folder), "-c", str(config)]


def haproxy(folder: Path, port: int, ports: list[int]) -> list[str]:
    text = (DEPLOY / "haproxy.cfg").read_text()
    for number, each in enumerate(ports[2:], 3):
        text += f"    server gateway-{number} 127.0.0.1:{each}\n"
    text = text.replace("bind :8080", f"bind 127.0.0.1:{port}")
    for before, now in zip((8001, 8002), ports, strict=False):
        text = text.replace(f"127.0.0.1:{before}", f"127.0.0.1:{now}")
    text = text.replace("75s", f"{IDLE}s").replace("maxconn 50000", "maxconn 500")
    text = text.replace("log /dev/log local0", "log stdout format raw local0")
    config = folder / "haproxy.cfg"
    config.write_text(text)
    return ["haproxy", "-db", "-f", str(config)]


def haproxy_with_shards(folder: Path, port: int, ports: list[int]) -> list[str]:
    """HAProxy with the lines of the sample that place tenants by their shard, of 64."""
    command = haproxy(folder, port, ports)
    config = folder / "haproxy.cfg"
    text = config.read_text()
    for line in ("lua-load", "http-request set-var", "use-server"):
        assert f"# {line}" in text
        text = text.replace(f"# {line}", line)
    second = next(line for line in text.splitlines() if "use-server two" in line)
    lines = [second]
    for n in range(3, len(ports) + 1):
        line = second.replace("use-server two", f"use-server gateway-{n}")
        lines.append(line.replace("(two)", f"(gateway-{n})").replace("int 1 }", f"int {n - 1} }}"))
    text = text.replace(second, "\n".join(lines)).replace("home(64,2)", f"home(64,{len(ports)})")
    config.write_text(text.replace("/etc/haproxy/shard.lua", str(DEPLOY / "shard.lua")))
    return command


PROXIES = {"nginx": nginx, "haproxy": haproxy, "haproxy with shards": haproxy_with_shards}


def require(proxy: str) -> None:
    """Fail the test if the program is not there."""
    if shutil.which(proxy, path="/usr/sbin:/usr/bin:/usr/local/sbin") is None:
        pytest.fail(f"{proxy} is not installed")


@asynccontextmanager
async def behind(
    proxy: str,
    redis_url: str,
    folder: Path,
    changes: Mapping[str, str] | None = None,
    count: int = 2,
    *,
    workers: bool = False,
) -> AsyncIterator[Behind]:
    """Start gateways, or workers of one supervisor, and the proxy in front of them."""
    async with AsyncExitStack() as stack:
        first = free_ports(count)
        ports = [first + number if workers else free_port() for number in range(count)]
        settings = {"WS_PROXY_HOPS": "1", "WS_PING_INTERVAL": PING, "WS_CLEANUP_INTERVAL": "0.2"}
        env = environment(redis_url, **settings | dict(changes or {}))
        backend = stack.enter_context(redis.Redis.from_url(redis_url))
        log, port = folder / "access.log", free_port()
        found = Behind(port, ports, [], backend, log, stack, env)
        if workers:
            await found.start_workers()
        else:
            for number in range(count):
                await found.start(number)
        with log.open("ab") as out:
            program = PROXIES[proxy](folder, port, ports)
            paths = {"PATH": "/usr/sbin:/usr/bin:/bin:/usr/local/sbin"}
            running = subprocess.Popen(program, stdout=out, stderr=out, env=paths)
        stack.callback(end, running)
        await until(lambda: _is_ready(port), 10)
        yield found


def end(running: "subprocess.Popen[bytes]") -> None:
    """With its workers, which nginx's master ends and a kill would leave behind."""
    running.terminate()
    try:
        running.wait(10)
    except subprocess.TimeoutExpired:
        running.kill()
        running.wait()
