"""The load client: many WebSockets on one epoll, with frames checked in bulk.

It must cost less than the server that it measures. All event frames have one size, so two strided
slices and two comparisons check a whole buffer (see :mod:`.crowd`). Only if they fail, the buffer
is read frame by frame, to find what is missing, doubled or out of order.
"""

import gc
import select
import socket
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt

from .crowd import RECEIVE, Expected, Template
from .publish import Pace, Publisher

_clock = time.monotonic_ns
_MASK: Final = bytes(4)  # a mask of zeros is valid
_READY: Final = b'{"type":"pong"}'
_PER_SOURCE: Final = 5000  # connections from one address: it has 28,000 ports to give
_CLOSE: Final = b"\x88\x82" + _MASK + b"\x03\xe8"


def text_frame(text: bytes) -> bytes:
    """A client's text frame (RFC 6455, 5.2)."""
    size = bytes((0x80 | len(text),)) if len(text) < 126 else b"\xfe" + len(text).to_bytes(2, "big")
    return b"\x81" + size + _MASK + text


_PING: Final = text_frame(b"ping")


class Client:
    """One WebSocket. ``place`` is its offset in its stream of events, in bytes."""

    __slots__ = (
        "began_at", "code", "expects", "expects_from", "lost", "number", "place", "ready",
        "ready_at", "reason", "receive", "request", "socket", "tail", "texts", "upgraded",
    )  # fmt: skip

    def __init__(self, number: int, target: str, expects: Expected | None) -> None:
        self.number = number
        self.expects = expects
        self.request = (
            f"GET {target} HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\n"
            "Connection: Upgrade\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
            "Sec-WebSocket-Version: 13\r\n\r\n"
        ).encode()
        self.socket = socket.socket()
        self.receive = self.socket.recv_into
        self.upgraded = self.ready = False
        self.began_at = self.ready_at = 0
        self.place = -1  # until its first event
        self.expects_from = 0  # the number of the first event that it must receive
        self.tail = b""
        self.lost: set[int] = set()
        self.code: int | None = None  # the close code
        self.reason = b""
        self.texts: list[bytes] = []  # other messages than events, without the first pong


@dataclass
class Faults:
    missing: int = 0
    duplicate: int = 0
    out_of_order: int = 0
    strange: int = 0  # events that this client must never receive


@dataclass
class Latencies:
    """Milliseconds from the publish: to each client, and to the last one of each event."""

    each: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    last: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))


class Load:
    """The clients and their publisher, in one loop."""

    def __init__(self, port: int, template: Template | None = None) -> None:
        self._port = port
        self._template = template
        self._epoll = select.epoll()
        self._by_fd: dict[int, Client] = {}
        self._others: dict[int, Callable[[], None]] = {}
        self._waiting: deque[Client] = deque()
        self._opening = 0
        self._at_once = 0
        self._buffer = bytearray(RECEIVE)
        self._log: list[tuple[int, int, int, int]] = []  # now, client, place before, bytes
        self.logging = True
        self.clients: list[Client] = []
        self.faults = Faults()
        self.closed: Counter[int] = Counter()
        self.failed: Counter[str] = Counter()  # clients that never became ready, by reason
        self.ready = 0
        self.pongs = 0
        self.received = 0  # bytes, of the clients that are ready
        self.expects_from: Callable[[], int] = lambda: 0
        self.progress: Callable[[], None] = lambda: None

    # Opening

    def open(self, clients: Iterable[Client], *, at_once: int = 256, seconds: float = 60) -> float:
        """Open all and wait until each has its first pong; return the seconds it took."""
        clients = list(clients)
        self._at_once = at_once
        began, before = _clock(), self.ready + self.failed.total()
        for client in clients:
            self.start(client)
        while self.ready + self.failed.total() < before + len(clients):
            self.pump(0.2)
            self.progress()
            if _clock() - began > seconds * 1e9:
                break
        return (_clock() - began) / 1e9

    def start(self, client: Client) -> None:
        """Open one, as soon as fewer than ``at_once`` others are opening."""
        self.clients.append(client)
        if self._opening < max(1, self._at_once):
            self._connect(client)
        else:
            self._waiting.append(client)

    def _connect(self, client: Client) -> None:
        self._opening += 1
        client.began_at = _clock()
        sock = client.socket
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # Choose the port at connect: then only the pair of addresses must be free, not the port.
        sock.setsockopt(socket.IPPROTO_IP, 24, 1)  # IP_BIND_ADDRESS_NO_PORT
        sock.bind((f"127.0.{1 + client.number // _PER_SOURCE % 200}.1", 0))
        with suppress(BlockingIOError):
            sock.connect(("127.0.0.1", self._port))
        self._by_fd[sock.fileno()] = client
        self._epoll.register(sock.fileno(), select.EPOLLOUT)

    def _open(self, client: Client, data: bytes) -> None:
        """Handle data of a client that is not ready yet."""
        if client.request:
            if error := client.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                self._gone(client, f"errno {error}")
                return
            client.socket.send(client.request)
            client.request = b""
            self._epoll.modify(client.socket.fileno(), select.EPOLLIN)
            return
        data = client.tail + data
        if not client.upgraded:
            end = data.find(b"\r\n\r\n")
            if end < 0:
                client.tail = data
                return
            if not data.startswith(b"HTTP/1.1 101"):
                self._gone(client, data[9:12].decode(errors="replace"))
                return
            client.upgraded = True
            client.socket.send(_PING)
            data = data[end + 4 :]
        client.tail = b""
        self._read(client, data)

    def _is_ready(self, client: Client) -> None:
        client.ready = True
        client.ready_at = _clock()
        client.expects_from = self.expects_from()
        self.ready += 1
        self._opened()

    def _opened(self) -> None:
        self._opening -= 1
        if self._waiting:
            self._connect(self._waiting.popleft())

    def _gone(self, client: Client, why: str) -> None:
        fd = client.socket.fileno()
        if fd < 0:
            return
        self._by_fd.pop(fd, None)
        client.socket.close()
        if client in self._waiting:  # it never began to connect
            self._waiting.remove(client)
            self.failed[why] += 1
        elif client.ready:
            self.ready -= 1
            self.closed[1006 if client.code is None else client.code] += 1
        else:
            self.failed[why if client.code is None else str(client.code)] += 1
            self._opened()

    def close(self, client: Client) -> None:
        """Close with a close frame."""
        with suppress(OSError):
            client.socket.send(_CLOSE)
        client.code = 1000
        self._gone(client, "left")

    def drop(self, clients: Iterable[Client]) -> None:
        """Close the sockets without a close frame."""
        for client in clients:
            self._gone(client, "dropped")

    def stop_reading(self, client: Client) -> None:
        self._epoll.unregister(client.socket.fileno())

    def ping(self, client: Client) -> None:
        client.socket.send(_PING)

    # Running

    def attend(self, publisher: Publisher) -> None:
        self._others[publisher.fileno()] = publisher.read_replies
        self._epoll.register(publisher.fileno(), select.EPOLLIN)
        self.expects_from = lambda: publisher.sent

    def drive(self, publisher: Publisher, pace: Pace, seconds: float) -> None:
        """Publish at that pace, and receive."""
        end = _clock() + int(seconds * 1e9)
        gc.disable()
        try:
            while (now := _clock()) < end:
                count, wait = pace(now)
                if count:
                    publisher.publish(count)
                self.pump(min(wait, 0.1))
                self.progress()
        finally:
            gc.enable()

    def settle(self, done: Callable[[], bool], quiet: float = 2.0) -> None:
        """Receive until ``done``, or until nothing has arrived for ``quiet`` seconds."""
        last, since = -1, _clock()
        while not done():
            if self.received != last:
                last, since = self.received, _clock()
            elif _clock() - since > quiet * 1e9:
                return
            self.pump(0.05)

    def pump(self, timeout: float) -> None:
        """Wait for data, and receive it."""
        by_fd, buffer, log = self._by_fd, self._buffer, self._log
        if self._template is not None:
            size, at = self._template.frame_size, self._template.code_at
        else:
            size, at = 1, 0
        received = 0
        for fd, _ in self._epoll.poll(timeout, 1024):
            client = by_fd.get(fd)
            if client is None:
                if fd in self._others:
                    self._others[fd]()
                continue
            if client.request:
                self._open(client, b"")
                continue
            try:
                n = client.receive(buffer)
            except BlockingIOError:
                continue
            except OSError:
                n = 0
            if not n:
                if client.tail and client.upgraded:
                    self._read(client, b"")
                self._gone(client, "closed")
                continue
            if not client.ready:
                self._open(client, bytes(buffer[:n]))
                continue
            received += n
            now, place, expects = _clock(), client.place, client.expects
            if place < 0 or expects is None or not expects.size:
                self._read(client, bytes(buffer[:n]), now)
                continue
            # The codes are at k * size + at in its stream.
            k = (place - at + size - 1) // size
            k1 = (place - at + size - 2) // size
            start = k * size + at - place
            start1 = k1 * size + at + 1 - place
            if not expects.first.startswith(
                buffer[start:n:size], k % expects.size
            ) or not expects.second.startswith(buffer[start1:n:size], k1 % expects.size):
                self._read(client, bytes(buffer[:n]), now)
                continue
            log.append((now, client.number, place, n))
            client.place = place = place + n
            if rest := place % size:
                client.tail = bytes(buffer[n - rest : n]) if rest <= n else client.tail + buffer[:n]
            else:
                client.tail = b""
        self.received += received
        if not self.logging:
            log.clear()

    def _read(self, client: Client, data: bytes, now: int = 0) -> None:
        """Read the received data frame by frame."""
        expects, template = client.expects, self._template
        place, before = client.place, len(client.tail)
        k = -1 if place < 0 or template is None else (place - before) // template.frame_size
        data = client.tail + data
        start = 0
        while True:
            frame = _frame(data, start)
            if frame is None:
                break
            opcode, body, end = frame
            if opcode == 0x1 and (
                expects is not None
                and template is not None
                and end - start == template.frame_size
                and data[body : body + 5] == b'{"t":'
            ):
                number = start + template.number_at
                n = int(data[number : number + 10])
                was = k
                k = self._check(client, expects, n, k)
                if k > was >= 0 or was < 0 <= k:
                    place_of = (k - 1) * template.frame_size
                    self._log.append((now or _clock(), client.number, place_of, end - start))
            elif opcode == 0x8:
                client.code = int.from_bytes(data[body : body + 2], "big") if end > body else 1005
                client.reason = data[body + 2 : end]
            elif opcode == 0x9 and client.ready:
                client.socket.send(b"\x8a\x80" + _MASK)
            elif opcode == 0x1:
                text = data[body:end]
                if text == _READY:
                    self.pongs += 1
                    if not client.ready:
                        self._is_ready(client)
                else:
                    client.texts.append(text)
            start = end
        client.tail = data[start:]
        if k >= 0 and template is not None:
            client.place = k * template.frame_size + len(client.tail)

    def _check(self, client: Client, expects: Expected, n: int, k: int) -> int:
        """Check event ``n`` of a client that expects its k-th; return the next one it expects."""
        if not expects.includes(n):
            self.faults.strange += 1
            return k
        got = expects.before(n)
        if k < 0:  # its first one; a client that is not ready yet may miss events
            k = min(got, expects.before(client.expects_from)) if client.ready else got
        if got >= k:
            self.faults.missing += got - k
            client.lost.update(range(k, got))
            return got + 1
        if got in client.lost:
            client.lost.remove(got)
            self.faults.missing -= 1
            self.faults.out_of_order += 1
        else:
            self.faults.duplicate += 1
        return k

    # Looking back

    def missed(self, client: Client, published: int) -> int:
        """How many of the last published events the client has not received."""
        if client.expects is None or self._template is None:
            return 0
        expected = client.expects.before(published)
        if client.place < 0:
            return expected - client.expects.before(client.expects_from)
        return expected - client.place // self._template.frame_size

    def count_missing(self, clients: Iterable[Client], published: int) -> None:
        self.faults.missing += sum(self.missed(client, published) for client in clients)

    def latencies(
        self, publisher: Publisher, first: int, last: int, clients: Iterable[Client]
    ) -> Latencies:
        """The latencies of the events ``first`` to ``last`` at these clients."""
        assert self._template is not None
        size = self._template.frame_size
        counted = {client.number: client for client in clients}
        log = np.array(self._log, dtype=np.int64).reshape(-1, 4)
        log = log[np.argsort(log[:, 1], kind="stable")]
        numbers, starts = np.unique(log[:, 1], return_index=True)
        sent = np.array(publisher.sent_at, dtype=np.int64)
        arrived = np.zeros(len(sent), dtype=np.int64)
        each = []
        for number, rows in zip(numbers, np.split(log, starts[1:]), strict=True):
            client = counted.get(int(number))
            if client is None or client.expects is None:
                continue
            begin, end = rows[:, 2] // size, (rows[:, 2] + rows[:, 3]) // size
            count = end - begin
            when = np.repeat(rows[:, 0], count)
            # begin, begin + 1, …, end - 1 of each row
            k = np.arange(len(when)) - np.repeat(np.cumsum(count) - count, count)
            k += np.repeat(begin, count)
            indices = np.array(client.expects.indices, dtype=np.int64)
            n = k // client.expects.size * client.expects.period + indices[k % client.expects.size]
            wanted = (n >= first) & (n < last)
            n, when = n[wanted], when[wanted]
            np.maximum.at(arrived, n, when)
            each.append(((when - sent[n]) / 1e6).astype(np.float32))
        came = np.flatnonzero(arrived)
        return Latencies(
            np.concatenate(each) if each else np.zeros(0),
            (arrived[came] - sent[came]) / 1e6,
        )

    def arrivals(self) -> list[tuple[int, int]]:
        """When (monotonic ns) which client received events; one entry for each read."""
        return [(now, client) for now, client, _, _ in self._log]

    def forget(self) -> None:
        """Forget the recorded times."""
        self._log.clear()

    def shut(self) -> None:
        for client in self.clients:
            client.socket.close()
        self._epoll.close()


def _frame(data: bytes, start: int) -> tuple[int, int, int] | None:
    """The frame at this offset: opcode, start of the payload, end; None if incomplete."""
    if len(data) < start + 2:
        return None
    size, body = data[start + 1] & 0x7F, start + 2
    if size >= 126:
        length = 2 if size == 126 else 8
        if len(data) < body + length:
            return None
        size, body = int.from_bytes(data[body : body + length], "big"), body + length
    if len(data) < body + size:
        return None
    return data[start] & 0x0F, body, body + size
