"""The demo's story: a call that nobody confirms goes on to others, and the manager is told."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from shlex import quote
from typing import Final

import msgspec
import trio

from ..client import Client, Event, connect
from ..core.event_path import EventPath
from ..core.printable import printable
from ..publisher import AsyncPublisher
from .credentials import Identity, staff_token
from .demo_processes import TOKEN_LIFE, DemoGateway
from .gateway_http import fetch
from .rendering import Screen, published, summary
from .why import path_lines

WITHIN: Final = 3.0  # seconds until somebody must have confirmed a call
_PAUSE: Final = 2.0  # seconds, for people to read
_CALL: Final = "SERVICE_CALL_CREATED"
_EVENT: Final = {
    "type": _CALL, "tenant_id": 1, "branch_id": 1, "table_id": 10, "session_id": 456,
    "sector_id": 5, "entity": {"call_type": "WAITER_CALL"},
}  # fmt: skip


def routes(within: float) -> str:
    """The routes file: a call is for the waiters of its sector, then for others."""
    then = ", ".join(f'{{to = "{name}", within = {within}}}' for name in ("floor", "admins"))
    return (
        f'[routes.{_CALL}]\nto = ["waiters"]\nmust_reach = "waiters"\nwithin = {within}\n'
        f"then = [{then}]\n"
    )


class _Phone:
    """The phone of a member of staff. It shows and confirms each event, unless it is silent."""

    def __init__(self, name: str, endpoint: str, gateway: DemoGateway, identity: Identity) -> None:
        self.name = name
        self._endpoint = endpoint
        self._gateway = gateway
        self._identity = identity
        self._awake = trio.Event()
        self._awake.set()
        self._reading = trio.CancelScope()
        self._send_shown, self._shown = trio.open_memory_channel[Event](100)

    @property
    def token(self) -> str:
        return staff_token(self._gateway.staff_secret, self._identity)

    def go_silent(self) -> None:
        """Show nothing more. It stays connected, and what it is sent waits."""
        self._awake = trio.Event()
        self._reading.cancel()

    def wake(self) -> None:
        """Show what has waited, and then what comes."""
        self._awake.set()

    async def wait_shown(self, event_type: str) -> Event:
        """Wait until it has shown an event of a type."""
        while (event := await self._shown.receive()).type != event_type:
            pass
        return event

    @asynccontextmanager
    async def connected(self, screen: Screen) -> AsyncIterator[None]:
        """Connect, and show the events while the block runs."""
        url = f"{self._gateway.url}/ws/{self._endpoint}"
        async with connect(url, lambda _: self.token) as client, trio.open_nursery() as nursery:
            await client.wait_open()
            nursery.start_soon(self._show, client, screen)
            yield
            nursery.cancel_scope.cancel()

    async def _show(self, client: Client, screen: Screen) -> None:
        while True:
            await self._awake.wait()
            event = None
            with trio.CancelScope() as self._reading:
                event = await anext(client)  # the client confirms what it has returned
            if event is not None:
                await screen.show(summary(event.text, self.name, places=False))
                self._send_shown.send_nowait(event)


async def tell_story(gateway: DemoGateway, loops: int, screen: Screen, within: float) -> None:
    """Play the story ``loops`` times, or for ever if that is 0."""
    ana = _Phone("Ana", "waiter", gateway, Identity(user=21, life=TOKEN_LIFE))
    ben = _Phone("Ben", "waiter", gateway, Identity(user=22, life=TOKEN_LIFE))
    eva = _Phone("Eva", "admin", gateway, Identity(user=4, roles=("MANAGER",), life=TOKEN_LIFE))
    console = f"http://127.0.0.1:{gateway.port}/ws/console"
    await screen.show(
        f"Open the console in a browser, and there the tab Was it received?: {console}\n\n"
        "Ana and Ben are waiters, of sector 5 and sector 6; Eva is the manager. A call must\n"
        f"reach a waiter of its sector within {within:g} s, then any waiter within {within:g} s,\n"
        "then the manager. Ctrl-C ends everything."
    )
    done = 0
    async with (
        AsyncPublisher(gateway.redis_url) as publisher,
        ana.connected(screen),
        ben.connected(screen),
        eva.connected(screen),
    ):
        while not loops or done < loops:
            await _play(gateway, publisher, ana, ben, eva, screen)
            done += 1
            await trio.sleep(_PAUSE)


async def _play(
    gateway: DemoGateway,
    publisher: AsyncPublisher,
    ana: _Phone,
    ben: _Phone,
    eva: _Phone,
    screen: Screen,
) -> None:
    call = partial(_call, publisher, screen)
    await screen.show("\n1. A guest of sector 5 calls. Ana's phone confirms the call.\n")
    await call()
    await ana.wait_shown(_CALL)
    await trio.sleep(_PAUSE)

    await screen.show(
        "\n2. The phones of Ana and Ben go silent: they stay connected, and confirm nothing.\n"
        "   The guest calls again, and nobody has confirmed the call when its time is over.\n"
    )
    ana.go_silent()
    ben.go_silent()
    await call()
    event = await eva.wait_shown(_CALL)
    await trio.sleep(_PAUSE)

    await screen.show("\n3. The path of that call:\n")
    answer = await trio.to_thread.run_sync(
        fetch, gateway.url, f"/ws/why?event_id={event.event_id}", eva.token
    )
    for line in path_lines(msgspec.convert(answer, EventPath)):
        await screen.show(printable(f"   {line}"))
    await screen.show(
        "\n   The same, from a command:\n"
        f"   REDIS_URL={quote(gateway.redis_url)} WS_ROUTES_FILE={quote(gateway.routes_file)}"
        f" trio-gateway why {event.event_id}\n"
    )
    await trio.sleep(_PAUSE)

    await screen.show("\n4. The phones are back, and show the call that has waited.\n")
    ana.wake()
    ben.wake()
    await ana.wait_shown(_CALL)
    await ben.wait_shown(_CALL)


async def _call(publisher: AsyncPublisher, screen: Screen) -> None:
    payload = msgspec.json.encode(_EVENT)
    await screen.show(published(payload.decode(), "the stream"))
    await publisher.publish(payload)
