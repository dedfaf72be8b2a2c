"""A tenant that publishes more than can be delivered, and the clients that receive it.

A process of its own, so that its work delays no other process: ``python flood.py PORT
REDIS_PORT CLIENTS``. A line ``RATE SECONDS`` on its input is a flood; when that is over it answers
with a line of JSON. In between it takes what comes.
"""

import json
import os
import select
import socket
import sys
import time
from contextlib import suppress
from typing import Final

from tests.support.gateways import JWT_SECRET
from tests.support.sockets import client_frame, make_head
from trio_gateway.core.frames import TEXT
from trio_gateway.testing import make_jwt

BRANCH: Final = 9  # of tenant 1
_CHANNEL: Final = b"channel:branch:9:waiters"
_PAYLOAD: Final = b'{"type":"ROUND_READY","tenant_id":1,"branch_id":9,"n":%10d}'
_COMMAND: Final = b"*3\r\n$7\r\nPUBLISH\r\n$%d\r\n%b\r\n$%d\r\n%b\r\n" % (
    len(_CHANNEL), _CHANNEL, len(_PAYLOAD % 0), _PAYLOAD,
)  # fmt: skip
_PING: Final = client_frame(TEXT, "ping")
_TICK: Final = 0.002  # seconds between two bursts of a flood


class Flood:
    """The clients on one epoll, and the publisher between them."""

    def __init__(self, port: int, redis_port: int, clients: int) -> None:
        self._epoll = select.epoll()
        self._clients: dict[int, socket.socket] = {}
        self._buffer = bytearray(1 << 18)
        self._redis = socket.create_connection(("127.0.0.1", redis_port))
        self._redis.setblocking(False)
        self._out = bytearray()
        self._epoll.register(self._redis, select.EPOLLIN)
        self._epoll.register(sys.stdin, select.EPOLLIN)
        self.published = 0
        self.received = 0  # bytes
        self.closed = 0
        self._pinged_at = time.monotonic()
        for n in range(clients):
            self._connect(port, make_jwt(JWT_SECRET, sub=str(1000 + n), branch_ids=[BRANCH]))

    def _connect(self, port: int, token: str) -> None:
        client = socket.create_connection(("127.0.0.1", port))
        client.sendall(make_head(request=f"GET /ws/waiter?token={token} HTTP/1.1") + _PING)
        answer = b""
        while b'"pong"' not in answer:
            answer += client.recv(4096)
        client.setblocking(False)
        self._clients[client.fileno()] = client
        self._epoll.register(client, select.EPOLLIN)

    def run(self) -> None:
        """Do what the input says, until it ends."""
        commands = b""
        while True:
            if self._pump(0.2):
                commands += (data := os.read(sys.stdin.fileno(), 4096))
                if not data:
                    return
            while b"\n" in commands:
                line, _, commands = commands.partition(b"\n")
                self._flood(*map(float, line.split()))

    def _flood(self, rate: float, seconds: float) -> None:
        before = self.published, self.received, self.closed
        began = time.monotonic()
        while (passed := time.monotonic() - began) < seconds:
            for _ in range(int(rate * passed) - self.published + before[0]):
                self._out += _COMMAND % self.published
                self.published += 1
            self._send()
            self._pump(_TICK)
        while self._out:
            self._send()
            self._pump(_TICK)
        after = self.published, self.received, self.closed
        names = ("published", "received", "closed")
        print(json.dumps({k: b - a for k, a, b in zip(names, before, after, strict=True)}))
        sys.stdout.flush()

    def _send(self) -> None:
        with suppress(BlockingIOError):
            while self._out:
                del self._out[: self._redis.send(self._out[:65_536])]

    def _pump(self, timeout: float) -> bool:
        """Read what has arrived; return whether there is a command on the input."""
        commanded = False
        for fd, _ in self._epoll.poll(timeout, 1024):
            if (client := self._clients.get(fd)) is not None:
                try:
                    size = client.recv_into(self._buffer)
                except OSError:
                    size = 0
                if not size:
                    del self._clients[fd]
                    client.close()
                    self.closed += 1
                self.received += size
            elif fd == self._redis.fileno():
                self._redis.recv_into(self._buffer)
            else:
                commanded = True
        if time.monotonic() - self._pinged_at > 20:
            self._pinged_at = time.monotonic()
            for client in self._clients.values():
                client.send(_PING)
        return commanded


if __name__ == "__main__":
    port, redis_port, clients = map(int, sys.argv[1:])
    flood = Flood(port, redis_port, clients)
    print("ready", flush=True)
    flood.run()
