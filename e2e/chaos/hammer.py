"""Clients that come and go at several processes, and how many of one owner are there at a time."""

import random
from collections import Counter
from collections.abc import Callable, Sequence

import trio

from tests.support.gateways import JWT_SECRET
from tests.support.sockets import Client, client_frame, close_payload
from trio_gateway.core.frames import CLOSE, PING, PONG, TEXT
from trio_gateway.testing import make_jwt


class Hammer:
    """Visits of users of one tenant.

    A visit counts from its first pong until just before it says that it leaves, so what is
    counted here is never more than there is.
    """

    def __init__(self, ports: Sequence[int], users: int) -> None:
        self.ports = list(ports)  # of the processes that run
        self._targets = {
            user: f"/ws/waiter?token={make_jwt(JWT_SECRET, sub=str(user), roles=['WAITER'])}"
            for user in range(1, users + 1)
        }
        self._choose = random.Random(7)
        self.here: Counter[int] = Counter()
        self.most = 0  # of one user at a time
        self.most_in_all = 0
        self.codes: Counter[int] = Counter()  # of those that were refused or closed
        self.visits = 0  # of those that were admitted
        self.lost = 0  # the process ended

    async def visit(self, stay: float) -> None:
        """Connect to any process as any user, and leave after a while if it is admitted."""
        user, target = self._choose.choice(list(self._targets.items()))
        port = self._choose.choice(self.ports)
        try:
            stream = await trio.open_tcp_stream("127.0.0.1", port)
        except OSError:
            await trio.sleep(0.05)
            return
        async with stream:
            client = Client(stream)
            try:
                await client.upgrade(target)
                await client.say("ping")
                await self._stay(client, user, stay)
            except (EOFError, trio.BrokenResourceError):
                self.lost += 1

    async def _stay(self, client: Client, user: int, stay: float) -> None:
        if not await self._read(client, until_text=True):
            return
        self.here[user] += 1
        self.visits += 1
        self.most = max(self.most, self.here[user])
        self.most_in_all = max(self.most_in_all, self.here.total())
        try:
            with trio.move_on_after(stay):
                await self._read(client)
                return
        finally:
            self.here[user] -= 1
        await client.send(client_frame(CLOSE, close_payload(1000)))
        await client.rest()

    async def _read(self, client: Client, *, until_text: bool = False) -> bool:
        """Answer pings until a text (True) or the close frame (False) comes."""
        while True:
            kind, payload = await client.frame()
            if kind == PING:
                await client.send(client_frame(PONG, payload))
            elif kind == TEXT and until_text:
                return True
            elif kind == CLOSE:
                self.codes[int.from_bytes(payload[:2], "big")] += 1
                return False

    async def run(self, visitors: int, is_over: Callable[[], bool], stay: float = 0.2) -> None:
        """Let so many visit at a time, again and again."""

        async def come() -> None:
            while not is_over():
                await self.visit(self._choose.uniform(0, 2 * stay))

        async with trio.open_nursery() as nursery:
            for _ in range(visitors):
                nursery.start_soon(come)
