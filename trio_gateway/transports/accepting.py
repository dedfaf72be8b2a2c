"""Accepting: which of several workers on one listener takes the next client.

The kernel wakes all of them for a new connection, and the first to ask has it: mostly the same
one. Here each posts how many clients it has where its siblings can read it, and a worker that has
more than they have leaves the next client to them for a moment. One that is full, or is being
replaced, leaves it to them as long as one of them has room.
"""

import mmap
import os
import struct
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final, NamedTuple, NoReturn, cast

import hypercorn.trio.run
import trio

_POST: Final = struct.Struct("=ddd")  # when (monotonic seconds, 0: never), clients, most clients
_EVERY: Final = 0.1  # seconds between two posts
_STALE: Final = 1.0  # seconds after which a post says nothing: its worker is stuck or dead
_TICK: Final = 0.002  # seconds between two looks at what a sibling does
_TURN: Final = 0.05  # seconds that one with fewer clients has to take the next
_RESTLESS: Final = 0.05  # seconds without such waits after one that was in vain
_PATIENCE: Final = 2.0  # seconds that one with room has, if this one has none


class Load(NamedTuple):
    """How many clients a worker has, those included that are arriving, and how many it may have."""

    clients: float
    most: float

    @property
    def full(self) -> bool:
        return self.clients >= self.most


def patience(own: Load, others: Sequence[Load]) -> float:
    """Seconds for which a worker leaves a new client to its siblings. Four clients more than a
    sibling has, or two in a hundred, count as the same number.
    """
    with_room = [other for other in others if not other.full]
    if own.full and with_room:
        return _PATIENCE
    alike = own.clients - max(4.0, own.clients * 0.02)
    return _TURN if any(other.clients < alike for other in with_room) else 0.0


class Board:
    """The posts of a supervisor's workers, in memory that all of them have; a place for each."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._memory = mmap.mmap(descriptor, 0)

    @classmethod
    def create(cls, places: int) -> "Board":
        """A new one. Raises :exc:`OSError`."""
        if hasattr(os, "memfd_create"):
            descriptor = os.memfd_create("trio-gateway-board")
        else:  # not Linux
            with tempfile.TemporaryFile() as file:
                descriptor = os.dup(file.fileno())
        os.ftruncate(descriptor, places * _POST.size)
        return cls(descriptor)

    def post(self, place: int, load: Load) -> None:
        _POST.pack_into(self._memory, place * _POST.size, time.monotonic(), *load)

    def clear(self, place: int) -> None:
        """Nothing is to be expected of this one."""
        _POST.pack_into(self._memory, place * _POST.size, 0.0, 0.0, 0.0)

    def others(self, place: int) -> list[Load]:
        """What the workers at the other places have posted lately."""
        since = time.monotonic() - _STALE
        return [
            Load(clients, most)
            for at, (when, clients, most) in enumerate(_POST.iter_unpack(self._memory))
            if at != place and when > since
        ]


class Turns:
    """One worker at the board. ``load`` is asked for its own; None: it takes no more clients."""

    def __init__(self, board: Board, place: int, load: Callable[[], Load | None]) -> None:
        self._board = board
        self._place = place
        self._load = load

    def patience(self) -> float:
        """As the function, with what is posted now; posts the own load."""
        return patience(self._post() or Load(0, 0), self._board.others(self._place))

    async def keep_posted(self) -> NoReturn:
        """Post the load at intervals; returns only when cancelled."""
        try:
            while True:
                self._post()
                await trio.sleep(_EVERY)
        finally:
            self._board.clear(self._place)

    def _post(self) -> Load | None:
        load = self._load()
        if load is None:
            self._board.clear(self._place)
        else:
            self._board.post(self._place, load)
        return load

    def install(self) -> None:
        """Let Hypercorn's Trio worker accept in turn; it makes its listeners by this name."""
        vars(hypercorn.trio.run)["trio"] = _Trio(partial(_Listener, self))


class _Trio:
    """The module as Hypercorn sees it, with another listener."""

    def __init__(self, listener: Callable[[Any], "_Listener"]) -> None:
        self.SocketListener = listener

    def __getattr__(self, name: str) -> Any:
        return getattr(trio, name)


class _Listener(trio.abc.Listener[trio.SocketStream]):
    def __init__(self, turns: Turns, socket: trio.socket.SocketType) -> None:
        self._turns = turns
        self._listener = trio.SocketListener(socket)
        self._restless_until = 0.0
        self.socket = socket

    async def accept(self) -> trio.SocketStream:
        waiting_since: float | None = None
        while True:
            await trio.lowlevel.wait_readable(cast("Any", self.socket))
            now, patience = trio.current_time(), self._turns.patience()
            if patience == _TURN and now < self._restless_until:
                patience = 0.0
            if waiting_since is None:
                waiting_since = now
            if now < waiting_since + patience:
                await trio.sleep(_TICK)
                if not self.socket.is_readable():  # a sibling took it
                    waiting_since = None
                continue
            if patience:
                self._restless_until = now + _RESTLESS
            # A sibling may be quicker still; then this one must not wait here for the next.
            with trio.move_on_after(_TICK):
                return await self._listener.accept()
            waiting_since = None

    async def aclose(self) -> None:
        await self._listener.aclose()
