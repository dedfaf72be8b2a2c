"""Presence: who is present in the branches that a client watches, across reconnects."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import trio

from .values import Presence, Refused


@dataclass(frozen=True, slots=True)
class Presences:
    """A message about who is present in a branch: a whole state, or the changes of one."""

    branch_id: int
    whole: bool
    joined: Sequence[Mapping[str, Any]]
    left: Sequence[Mapping[str, Any]]

    @classmethod
    def read(cls, branch_id: int, message: Mapping[str, Any]) -> "Presences":
        """Read the keys of a ``presence`` message."""
        whole = "users" in message
        joined = ("users", "sessions") if whole else ("joined",)
        return cls(branch_id, whole, _items(message, *joined), _items(message, "left"))


class PresenceWatch:
    """Iterate over it for who is present, now and after each change.

    A slow reader gets the newest state, and not every one in between.
    """

    def __init__(self, branch_id: int) -> None:
        self.branch_id = branch_id
        self._present: dict[tuple[Any, ...], Mapping[str, Any]] | None = None
        self._changed = trio.Event()
        self._refused: Refused | None = None

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Presence:
        """Wait for a change, and return who is present.

        Raises :exc:`Refused` when the gateway has refused this client for good.
        """
        await self._changed.wait()
        if self._refused is not None:
            raise self._refused
        assert self._present is not None
        self._changed = trio.Event()
        items = self._present.values()
        return Presence(
            self.branch_id,
            tuple(each for each in items if "session_id" not in each),
            tuple(each for each in items if "session_id" in each),
        )

    def _receive(self, message: Presences) -> None:
        """Apply a message of the gateway. Changes before the first whole state are ignored."""
        if message.whole:
            self._present = {}
        if self._present is None:
            return
        for each in message.left:
            self._present.pop(_key(each), None)
        for each in message.joined:
            self._present[_key(each)] = each
        self._changed.set()

    def _refuse(self, refused: Refused) -> None:
        """End the iteration: there will be no further state."""
        self._refused = refused
        self._changed.set()


class PresenceWatches:
    """The branches that a client watches, for as long as it lives."""

    def __init__(self) -> None:
        self.by_branch: dict[int, PresenceWatch] = {}
        self.changed = trio.Event()  # the branches have changed; replaced by another event then
        self._refused: Refused | None = None

    @contextmanager
    def watching(self, branch_id: int) -> Iterator[PresenceWatch]:
        """Watch a branch until the block is left. One block at a time may watch a branch."""
        if branch_id in self.by_branch:
            raise ValueError(f"branch {branch_id} is watched already")
        watch = self.by_branch[branch_id] = PresenceWatch(branch_id)
        if self._refused is not None:
            watch._refuse(self._refused)
        self._notify()
        try:
            yield watch
        finally:
            del self.by_branch[branch_id]
            self._notify()

    def receive(self, message: Presences) -> None:
        """Give a message to who watches its branch."""
        if (watch := self.by_branch.get(message.branch_id)) is not None:
            watch._receive(message)

    def refuse(self, refused: Refused) -> None:
        """End all iterations."""
        self._refused = refused
        for watch in self.by_branch.values():
            watch._refuse(refused)

    def _notify(self) -> None:
        self.changed.set()
        self.changed = trio.Event()


def _items(message: Mapping[str, Any], *names: str) -> list[Mapping[str, Any]]:
    return [item for name in names for item in message.get(name) or () if isinstance(item, dict)]


def _key(item: Mapping[str, Any]) -> tuple[Any, ...]:
    if "session_id" in item:
        return (item["session_id"],)
    return (item.get("endpoint"), item.get("user_id"))
