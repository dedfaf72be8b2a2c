"""Room over all processes: for whom connections elsewhere are closed; in virtual time."""

from typing import Any

import msgspec
import pytest
import trio
from trio.testing import MockClock

from trio_gateway.broker.commands import Unavailable
from trio_gateway.cluster.questions import Answers
from trio_gateway.cluster.room import ClusterRoom
from trio_gateway.core.audiences import Principal
from trio_gateway.core.capacity import CapacityLimits, Owner, owner_is_full
from trio_gateway.core.close_codes import Close, Rejected
from trio_gateway.runtime.connection import Connection, ConnectionLimits
from trio_gateway.runtime.hub import Hub, Reservation
from trio_gateway.runtime.room import Room
from trio_gateway.testing import FakeSocket, make_principal

LIMITS = ConnectionLimits(stale_after=1e6, receive_timeout=1e6)


class Limits:
    """The limits of a service whose only process with connections is this one."""

    alone = False

    def __init__(self, hub: Hub) -> None:
        self._hub = hub

    async def reserve(self, principal: Principal) -> Reservation:
        await trio.sleep(0.01)
        if self._hub.places_of(principal.owner) >= self.most(principal.owner):
            raise owner_is_full(principal.owner)
        return self._hub.reserve(principal)

    def most(self, _owner: Owner) -> int:
        return 3


class Control:
    """The only other process answers this; nothing if that is None."""

    def __init__(self, answer: bytes | None) -> None:
        self._answer = answer

    def handle(self, *_: Any) -> None: ...

    async def ask(self, *_: Any, timeout: float, **__: Any) -> Answers:
        await trio.sleep(timeout)
        if self._answer is None:
            raise Unavailable("nobody")
        return Answers({"another": msgspec.Raw(self._answer)})


@pytest.mark.parametrize("answer", [None, b'{"of":"another version"}'])
@pytest.mark.parametrize("leaves", [False, True])
async def test_nobody_is_closed_for_a_new_connection_that_has_left(
    nursery: trio.Nursery, autojump_clock: MockClock, leaves: bool, answer: bytes | None
) -> None:
    hub = Hub(CapacityLimits(total=10, per_user=3, per_session=3))
    limits: Any = Limits(hub)
    control: Any = Control(answer)
    room = ClusterRoom(hub, Room(hub), limits, control, "one")
    nursery.start_soon(room.run)
    sockets = [FakeSocket() for _ in range(3)]
    for socket in sockets:
        connection = Connection(make_principal(), LIMITS)
        nursery.start_soon(connection.run, socket, hub)
        await trio.sleep(1)
    if leaves:
        with pytest.raises(Rejected, match="too many connections of this user"):
            await room.find(make_principal(), lambda: trio.current_time() > 4)
    else:
        place, waited = await room.find(make_principal(), lambda: False)
        assert waited
        place.release()
    await trio.sleep(1)
    assert [socket.closed for socket in sockets] == [
        None if leaves else Close.HEARTBEAT_TIMEOUT, None, None,
    ]  # fmt: skip
