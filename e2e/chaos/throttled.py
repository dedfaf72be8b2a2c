"""Clients that read at a given rate, beside ones that read all and ones that read nothing.

Every client is in one branch and sends nothing, so all of them must receive the same bytes: what
each has received is compared with that, and costs next to nothing to check.
"""

import select
import socket
import threading
import time
from dataclasses import dataclass, field
from typing import Final

from bench.crowd import staff
from bench.processes import Cores, Redis, Server, open_redis, serve
from trio_gateway.core.event_ids import tag
from trio_gateway.core.frames import text_frame
from trio_gateway.testing import make_payload

STREAM: Final = "events:critical"
_FIRST: Final = 1_000_000  # the first sequence number: all have as many digits
_TICK: Final = 0.1  # seconds between two reads of a client that is slow
# Bytes in a client's kernel. With less than a segment, which is 64 KB on loopback, the window never
# has room for one, and Linux counts that against TCP_USER_TIMEOUT although bytes go through.
_BUFFER: Final = 131_072
SETTINGS: Final = {"WS_PING_INTERVAL": "36000", "LOG_LEVEL": "warning"}


@dataclass
class Client:
    """``rate`` is in bytes a second; 0 reads nothing."""

    socket: socket.socket
    rate: float
    received: int = 0
    is_broken: bool = False  # it received other bytes than it should
    ended: str = ""
    done_at: float = 0.0  # when it had everything


@dataclass
class Figures:
    """What came of a run. Bytes are in MB, times in seconds."""

    clients: int
    closed: dict[str, int]  # by how a client saw its end
    broken: int
    incomplete: int  # of those that read
    grown: float
    lags: float
    most_lagging: float
    published: float
    last_reader: float  # after the last publish, until those that read all had everything
    all_done: float

    def __str__(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in vars(self).items())


@dataclass
class Events:
    """The events of a run: what is published, and what each client must receive."""

    count: int
    size: int
    payloads: list[bytes] = field(default_factory=list)
    expected: bytes = b""

    def __post_init__(self) -> None:
        milliseconds = int(time.time() * 1000)
        self.ids = [f"{milliseconds}-{_FIRST + n}" for n in range(self.count)]
        self.payloads = [
            make_payload(entity={"n": n}, x="x" * self.size) for n in range(self.count)
        ]
        stream = tag(STREAM)
        self.expected = b"".join(
            text_frame(b'%b,"event_id":"%b-%b"}' % (payload[:-1], i.encode(), stream.encode()))
            for payload, i in zip(self.payloads, self.ids, strict=True)
        )

    def publish(self, redis: Redis, rate: float) -> None:
        """Add all of them, so many a second."""
        began = time.monotonic()
        for first in range(0, self.count, 200):
            time.sleep(max(0.0, began + first / rate - time.monotonic()))
            with redis.client.pipeline(transaction=False) as pipe:
                for n in range(first, min(first + 200, self.count)):
                    pipe.xadd(STREAM, {"data": self.payloads[n]}, id=self.ids[n])
                pipe.execute()


def run(
    *,
    slow: int,
    rate: float,
    fast: int = 1,
    frozen: int = 0,
    finish: int | None = None,
    events: int = 40_000,
    size: int = 900,
    published_at: float = 8000,
    slow_for: float = 30.0,
    settle: float = 120.0,
    **settings: str,
) -> Figures:
    """Publish to these clients. After ``slow_for`` seconds ``finish`` of the slow ones, by default
    all, read the rest as fast as they can, and the others leave. The frozen ones never read.
    """
    cores, stream = Cores(), Events(events, size)
    with (
        open_redis(cores) as redis,
        serve("gateway", redis, cores, **SETTINGS, **settings) as server,
    ):
        rates = [float("inf")] * fast + [rate] * slow + [0.0] * frozen
        clients = [_connect(server.port, n, each) for n, each in enumerate(rates)]
        try:
            time.sleep(1.0)  # they are live
            leaving = clients[fast + slow if finish is None else fast + finish : fast + slow]
            return _measure(server, redis, clients, leaving, stream, published_at, slow_for, settle)
        finally:
            for client in clients:
                client.socket.close()


def _connect(port: int, number: int, rate: float) -> Client:
    sock = socket.socket()
    if rate < float("inf"):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER)
    sock.connect(("127.0.0.1", port))
    path = staff("waiter", number + 1, 1, [1], "WAITER")
    sock.sendall(
        f"GET {path} HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
    )
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        head += sock.recv(1)
    assert head.startswith(b"HTTP/1.1 101"), head
    sock.setblocking(False)
    return Client(sock, rate)


def _measure(
    server: Server,
    redis: Redis,
    clients: list[Client],
    leaving: list[Client],
    events: Events,
    published_at: float,
    slow_for: float,
    settle: float,
) -> Figures:
    before = most = server.rss()
    lagging = published = 0.0

    def publish() -> None:
        nonlocal published
        events.publish(redis, published_at)
        published = time.monotonic()

    publisher = threading.Thread(target=publish)
    began = time.monotonic()
    publisher.start()
    next_look = began
    reading = [client for client in clients if client.rate]
    while time.monotonic() < began + slow_for + settle:
        now = time.monotonic()
        if now >= next_look:
            next_look = now + 1.0
            most = max(most, server.rss())
            lagging = max(lagging, server.metrics()["wsgateway_connections_lagging"])
        is_free = now > began + slow_for
        if is_free and leaving:
            left = set(map(id, leaving))
            reading = [client for client in reading if id(client) not in left]
            leaving = []
        _read(reading, events.expected, free=is_free)
        is_over = is_free or all(client.rate for client in clients)
        if is_over and not publisher.is_alive() and all(e.done_at or e.ended for e in reading):
            break
    publisher.join()
    most = max(most, server.rss())
    for client in clients:
        if not client.rate:
            _see_its_end(client)
    done = [client.done_at for client in reading if client.done_at]
    fast = [client.done_at for client in reading if client.rate == float("inf")]
    return Figures(
        clients=len(clients),
        closed=_count([client.ended for client in clients if client.ended]),
        broken=sum(client.is_broken for client in clients),
        incomplete=sum(not client.done_at for client in reading),
        grown=(most - before) / 1e6,
        lags=server.metrics()["wsgateway_lags_total"],
        most_lagging=lagging,
        published=published - began,
        last_reader=max(fast, default=0.0) - published,
        all_done=max(done, default=0.0) - began,
    )


def _read(clients: list[Client], expected: bytes, *, free: bool) -> None:
    """Let each client read what it may now."""
    waiting = [client for client in clients if not (client.done_at or client.ended)]
    is_free = [free or client.rate == float("inf") for client in waiting]
    for client, reads_all in zip(waiting, is_free, strict=True):
        if not reads_all:
            _take(client, expected, int(client.rate * _TICK) or 1)
    poll = select.poll()
    by_fd = {
        client.socket.fileno(): client
        for client, reads_all in zip(waiting, is_free, strict=True)
        if reads_all
    }
    for fd in by_fd:
        poll.register(fd, select.POLLIN)
    until = time.monotonic() + _TICK
    while (left := until - time.monotonic()) > 0:
        if not by_fd:
            time.sleep(left)
            break
        for fd, _ in poll.poll(left * 1000):
            if not _take(by_fd[fd], expected, 1 << 18):
                poll.unregister(fd)
                del by_fd[fd]


def _take(client: Client, expected: bytes, most: int) -> bool:
    """Receive once; return whether the client reads on."""
    try:
        data = client.socket.recv(most)
    except BlockingIOError:
        return True
    except OSError:
        client.ended = "reset"
        return False
    if not data:
        client.ended = "closed"
        return False
    end = client.received + len(data)
    client.is_broken |= data != expected[client.received : end]
    client.received = end
    if end >= len(expected):
        client.done_at = time.monotonic()
        return False
    return True


def _see_its_end(client: Client) -> None:
    """Read a client that never did, to see whether it was closed."""
    try:
        while data := client.socket.recv(1 << 18):
            client.received += len(data)
        client.ended = "closed"
    except BlockingIOError:
        pass
    except OSError:
        client.ended = "reset"


def _count(ends: list[str]) -> dict[str, int]:
    return {end: ends.count(end) for end in set(ends)}
