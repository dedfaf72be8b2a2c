"""Room: dead connections lose their places to new ones of the same user or session."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

import trio

from ..core.audiences import Principal
from ..core.capacity import OWNER_LIMITS, Owner
from ..core.close_codes import Close, Rejected
from .connection import Connection
from .hub import Hub, Reservation

ANSWER_TIME: Final = 2.0  # seconds that a connection has to show that it is there
LOOK: Final = 0.1  # seconds between two looks at the answers


class _Probe:
    """The connections of one owner that were pinged to see which are alive."""

    def __init__(self, asked: list[Connection], now: float) -> None:
        self.asked = asked
        self.until = now + ANSWER_TIME
        self.waiting = 0  # newcomers here, and processes that have asked
        for connection in asked:
            connection.ask(now)

    def silent(self, hub: Hub) -> list[Connection]:
        """Those that have not answered, the longest silent first."""
        found = [each for each in self.asked if each in hub.connections and not each.is_there]
        return sorted(found, key=lambda each: each.received_at)


def evict(hub: Hub, connection: Connection) -> None:
    """Close a connection that has not answered; its place is free at once."""
    hub.evict(connection, Close.HEARTBEAT_TIMEOUT, "no answer to a ping")


class Room:
    """Makes room in the hub for a user or a session whose connections may be dead.

    ``given_up`` tells that no client is admitted any more.
    """

    def __init__(self, hub: Hub, given_up: Callable[[], bool] = lambda: False) -> None:
        self._hub = hub
        self.given_up = given_up
        self._probes: dict[Owner, _Probe] = {}  # while newcomers wait for them

    async def find(
        self, principal: Principal, has_left: Callable[[], bool] = lambda: False
    ) -> tuple[Reservation, bool]:
        """Reserve a place in the hub; return it, and whether it had to be waited for.

        At the limit of the user or session its connections are pinged. Of those that do not
        answer within :data:`ANSWER_TIME` one is closed for each newcomer. Newcomers that come
        meanwhile share the probe, at most one for each connection. For one that ``has_left``
        nobody is closed. Raises :exc:`Rejected` if there is no room.
        """
        hub, owner = self._hub, principal.owner
        try:
            return hub.reserve(principal), False
        except Rejected as full:
            if full.label not in OWNER_LIMITS:
                raise
            refusal = full
        if not hub.owned_by(owner):  # the places are reserved by others
            raise refusal
        with self._probing(owner) as probe:
            if probe.waiting > len(probe.asked):
                raise refusal
            return await self._wait(principal, has_left, probe), True

    async def silent(self, owner: Owner) -> list[Connection]:
        """Ping the connections of an owner; return those that do not answer.

        The longest silent is first. Returns after :data:`ANSWER_TIME`, or when all have answered.
        """
        with self._probing(owner) as probe:
            while True:
                left = probe.until - trio.current_time()
                silent = probe.silent(self._hub)
                if left <= 0 or not silent:
                    return silent
                await trio.sleep(min(LOOK, left))

    @contextmanager
    def _probing(self, owner: Owner) -> Iterator[_Probe]:
        """Ping the connections of an owner, unless those who wait have just done so."""
        if (probe := self._probes.get(owner)) is None:
            asked = list(self._hub.owned_by(owner))
            probe = self._probes[owner] = _Probe(asked, trio.current_time())
        probe.waiting += 1
        try:
            yield probe
        finally:
            probe.waiting -= 1
            if not probe.waiting:
                del self._probes[owner]

    async def _wait(
        self, principal: Principal, has_left: Callable[[], bool], probe: _Probe
    ) -> Reservation:
        while True:
            left = probe.until - trio.current_time()
            silent = probe.silent(self._hub)
            if left <= 0 and silent and not has_left():
                # Its place is free at once, so that no two newcomers count on it.
                evict(self._hub, silent[0])
            try:
                return self._hub.reserve(principal)
            except Rejected:
                if left <= 0 or not silent or self.given_up():
                    raise
            await trio.sleep(min(LOOK, left))
