"""Bad clients, many of one kind at a time; ``python -m`` runs them in a process of their own."""

import json
import math
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import trio

from tests.support.gateways import JWT_SECRET, Metrics, metrics
from tests.support.sockets import CONTINUATION, PONG_TEXT, Client, client_frame, dialled, make_head
from trio_gateway.core.frames import TEXT
from trio_gateway.testing import make_jwt

from .relay import Relay, open_relay

TENANT: Final = 2  # of the bad clients alone
PATIENCE: Final = 40.0  # seconds after which a client that was not ended counts as forgotten
_SMALL: Final = 4096  # bytes that a socket of theirs takes unread
_TEN_MB: Final = b"\x81\xff" + (10 << 20).to_bytes(8, "big") + bytes(4)
_EMPTY_FRAGMENTS: Final = client_frame(TEXT, fin=False) + client_frame(CONTINUATION, fin=False) * (
    9000 - 1
)
_BROKEN = (OSError, trio.BrokenResourceError, trio.ClosedResourceError)


@dataclass
class Ends:
    """What became of them: by what they saw, and the seconds it took at most."""

    seen: Counter[str] = field(default_factory=Counter)
    slowest: float = 0.0
    # By the gateway's own count of the closes: how many, and when the last of them was.
    closed: dict[str, float] = field(default_factory=dict)
    closed_at: dict[str, float] = field(default_factory=dict)

    async def of(self, client: Client, since: float | None = None) -> None:
        """Wait for the end of a client, and note it."""
        since = time.monotonic() if since is None else since
        what = "forgotten"
        with trio.move_on_after(PATIENCE):
            try:
                what = str((await client.closed())[0])
            except EOFError:
                what = "ended"
            except trio.BrokenResourceError:
                what = "reset"
        self.note(what, since)

    def note(self, what: str, since: float) -> None:
        self.seen[what] += 1
        self.slowest = max(self.slowest, time.monotonic() - since)


@dataclass
class Place:
    """Where they are bad, and for how long."""

    port: int
    seconds: float
    ends: Ends
    relay: Relay | None = None
    apart: bool = False
    connected: int = 0
    over: trio.Event = field(default_factory=trio.Event)
    began: float = field(default_factory=time.monotonic)

    def branch(self, n: int) -> int:
        return 2 + n if self.apart else 2

    async def enter(self, client: Client, n: int) -> Client:
        claims: dict[str, Any] = {"tenant_id": TENANT, "branch_ids": [self.branch(n)]}
        token = make_jwt(JWT_SECRET, sub=str(n + 1), **claims)
        await client.upgrade(f"/ws/waiter?token={token}")
        await client.say("ping")  # so that it is known to have been let in
        while await client.text() != PONG_TEXT:
            pass
        self.connected += 1
        return client

    async def is_over(self, after: float = math.inf) -> bool:
        """Wait so long, or until the time is over or the gateway has done with them."""
        end = self.began + self.seconds
        with trio.move_on_after(min(after, end - time.monotonic())):
            await self.over.wait()
        return self.over.is_set() or time.monotonic() >= end


async def stop_reading(place: Place, n: int) -> None:
    async with dialled(place.port, receive_buffer=_SMALL) as client:
        await place.enter(client, n)
        await place.is_over()
        await place.ends.of(client)  # reads what has been there for long


async def read_a_byte_a_second(place: Place, n: int) -> None:
    async with dialled(place.port, receive_buffer=_SMALL) as client:
        await place.enter(client, n)
        with suppress(trio.BrokenResourceError):
            while not await place.is_over(after=1):
                await client.stream.receive_some(1)
        since = time.monotonic()
        with trio.fail_after(PATIENCE):
            await client.rest()
        place.ends.note("ended", since)


async def vanish(place: Place, n: int) -> None:
    """Nothing of it arrives any more, no FIN either; nor does anything at it."""
    assert place.relay is not None
    async with dialled(place.relay.port) as client:
        await place.enter(client, n)
        await place.is_over()


async def half_close(place: Place, n: int) -> None:
    async with dialled(place.port) as client:
        await place.enter(client, n)
        await client.half_close()
        await place.ends.of(client)


async def reset_in_the_handshake(place: Place, n: int) -> None:
    token = make_jwt(JWT_SECRET, sub=str(n + 1), tenant_id=TENANT, branch_ids=[2])
    head = make_head(request=f"GET /ws/waiter?token={token} HTTP/1.1")
    async with dialled(place.port) as client:
        place.connected += 1
        await client.send(head[: len(head) * (place.connected % 11) // 10])
        if place.connected % 2:
            await trio.sleep(0.01)
        await client.reset()
        place.ends.seen["left"] += 1


async def send_ten_megabytes(place: Place, n: int) -> None:
    async with dialled(place.port) as client:
        await place.enter(client, n)
        since = time.monotonic()

        async def send() -> None:
            with suppress(*_BROKEN):
                await client.send(_TEN_MB)
                for _ in range(160):
                    await client.send(bytes(65_536))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            await place.ends.of(client, since)
            nursery.cancel_scope.cancel()


async def send_empty_fragments(place: Place, n: int) -> None:
    async with dialled(place.port) as client:
        await place.enter(client, n)
        since = time.monotonic()
        with suppress(*_BROKEN):
            await client.send(_EMPTY_FRAGMENTS)
        await place.ends.of(client, since)


async def come_with_a_dead_token(place: Place, n: int) -> None:
    token = make_jwt(JWT_SECRET, sub=str(n + 1), life=-60)
    async with dialled(place.port) as client:
        since = time.monotonic()
        await client.upgrade(f"/ws/waiter?token={token}")
        place.connected += 1
        await place.ends.of(client, since)


class Kind(NamedTuple):
    """``pause`` is how soon each comes again, in seconds; without one it never does.
    ``receives``: events are published to them, to each its own if they are ``apart``.
    """

    be_bad: Callable[[Place, int], Awaitable[None]]
    pause: float = math.inf
    receives: bool = False
    apart: bool = False


KINDS: Final = {
    "stop reading": Kind(stop_reading, receives=True),
    "stop reading, each apart": Kind(stop_reading, receives=True, apart=True),
    "one byte a second": Kind(read_a_byte_a_second, receives=True),
    "vanish": Kind(vanish),
    "half-close": Kind(half_close, 0.1),
    "reset in the handshake": Kind(reset_in_the_handshake, 0.05),
    "10 MB in one frame": Kind(send_ten_megabytes, 0.5),
    "empty fragments": Kind(send_empty_fragments, 0.5),
    "dead token": Kind(come_with_a_dead_token, 0.1),
    "dead token at once": Kind(come_with_a_dead_token, 0.0),
}


async def be_bad(
    name: str,
    count: int,
    port: int,
    seconds: float,
    redis_port: int,
    until: Callable[[Metrics], bool] = lambda _: False,
) -> Ends:
    """So many clients of this kind for that long, or until the gateway's metrics say that it is
    enough; returns when each has met its end.
    """
    kind, ends = KINDS[name], Ends()
    async with open_relay(port, buffer=_SMALL) as relay, trio.open_nursery() as nursery:
        place = Place(port, seconds, ends, relay, kind.apart)

        async def again_and_again(n: int) -> None:
            while True:
                try:
                    await kind.be_bad(place, n)
                except* (*_BROKEN, EOFError) as faults:
                    ends.seen[f"failed: {type(faults.exceptions[0]).__name__}"] += 1
                if time.monotonic() + kind.pause >= place.began + seconds:
                    return
                await trio.sleep(kind.pause)

        async with trio.open_nursery() as clients:
            for n in range(count):
                clients.start_soon(again_and_again, n)
            if kind.pause == math.inf:
                while place.connected < count:
                    await trio.sleep(0.01)
            relay.vanish()
            place.began = time.monotonic()
            if kind.receives:
                nursery.start_soon(_publish, redis_port, {place.branch(n) for n in range(count)})
            nursery.start_soon(_look, place, until)
        nursery.cancel_scope.cancel()
    return ends


async def _publish(redis_port: int, branches: Iterable[int]) -> None:
    """Twenty events a second in each branch that they ought to read."""
    commands = b"".join(map(_command, branches))
    async with await trio.open_tcp_stream("127.0.0.1", redis_port) as stream:
        while True:
            await stream.send_all(commands)
            await stream.receive_some()
            await trio.sleep(0.05)


def _command(branch: int) -> bytes:
    keys = {"type": "ROUND_READY", "tenant_id": TENANT, "branch_id": branch}
    payload = json.dumps({**keys, "entity": {"note": "x" * 8000}}).encode()
    channel = b"channel:branch:%d:waiters" % branch
    return b"*3\r\n$7\r\nPUBLISH\r\n$%d\r\n%b\r\n$%d\r\n%b\r\n" % (
        len(channel), channel, len(payload), payload,
    )  # fmt: skip


async def _look(place: Place, until: Callable[[Metrics], bool]) -> None:
    while True:
        found = await metrics(place.port)
        if until(found):
            place.over.set()
        for code, number in found.by_label("connections_closed_total").items():
            if number != place.ends.closed.get(code):
                place.ends.closed[code] = number
                place.ends.closed_at[code] = round(time.monotonic() - place.began, 2)
        await trio.sleep(0.25)


def main(arguments: list[str]) -> None:
    """KIND COUNT PORT SECONDS REDIS_PORT: the ends as JSON."""
    name, count, port, seconds, redis_port = arguments
    ends = trio.run(be_bad, name, int(count), int(port), float(seconds), int(redis_port))
    print(json.dumps(vars(ends)))


if __name__ == "__main__":
    main(sys.argv[1:])
