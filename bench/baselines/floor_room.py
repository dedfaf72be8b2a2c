"""The floor: one send to the kernel for each frame and client, with minimal Python around it."""

import select
import socket
import sys
from collections.abc import Callable
from functools import partial

import hiredis

from . import CHANNEL, PONG


def frame(payload: bytes) -> bytes:
    if len(payload) < 126:
        return b"\x81" + bytes((len(payload),)) + payload
    return b"\x81\x7e" + len(payload).to_bytes(2, "big") + payload


def main(port: int, redis_port: int) -> None:
    epoll = select.epoll()
    heads: dict[int, Callable[[], None]] = {}
    clients: dict[int, socket.socket] = {}
    upgraded: set[int] = set()

    redis = socket.create_connection(("127.0.0.1", redis_port))
    redis.sendall(f"SUBSCRIBE {CHANNEL}\r\n".encode())
    reader = hiredis.Reader()

    def write(client: socket.socket, data: bytes) -> None:
        while data:
            try:
                data = data[client.send(data) :]
            except BlockingIOError:
                select.select([], [client], [], 1)  # the floor has no outbox
            except OSError:
                return

    def read_redis() -> None:
        reader.feed(redis.recv(1 << 18))
        while (reply := reader.gets()) is not False:
            if reply[0] == b"message":
                data = frame(reply[2])
                for client in clients.values():
                    try:
                        sent = client.send(data)
                    except OSError:
                        sent = 0
                    if sent != len(data):
                        write(client, data[sent:])

    def take(client: socket.socket) -> None:
        fd = client.fileno()
        try:
            data = client.recv(65536)
        except OSError:
            data = b""
        if not data:
            clients.pop(fd, None)
            upgraded.discard(fd)
            del heads[fd]
            client.close()
        elif fd in upgraded:
            client.send(frame(PONG.encode()))
        else:
            client.send(
                b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n"
                b"Connection: Upgrade\r\nSec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n"
            )
            upgraded.add(fd)
            clients[fd] = client

    def accept() -> None:
        client, _ = listener.accept()
        client.setblocking(False)
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        heads[client.fileno()] = partial(take, client)
        epoll.register(client.fileno(), select.EPOLLIN)

    listener = socket.create_server(("127.0.0.1", port), backlog=4096)
    heads[listener.fileno()], heads[redis.fileno()] = accept, read_redis
    epoll.register(listener.fileno(), select.EPOLLIN)
    epoll.register(redis.fileno(), select.EPOLLIN)
    while True:
        for fd, _ in epoll.poll():
            if fd in heads:
                heads[fd]()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
