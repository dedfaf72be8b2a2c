"""Publications: events of backends on their way to Redis, and what becomes of each."""

from collections.abc import Iterator, Sequence
from enum import StrEnum
from typing import Final, Literal, NamedTuple

from ..redis_url import RedisAddress
from .connection import Command

_PIECE: Final = 262_144  # bytes that are sent at once: packing them takes a fraction of 1 ms

Confirm = int | Literal["all"]


class Problem(StrEnum):
    """Why an event does not count as published."""

    IN_DOUBT = "in_doubt"  # it may have been published, or is on too few replicas
    REFUSED = "refused"  # Redis has answered with an error
    UNAVAILABLE = "unavailable"  # no server that accepts it could be reached


class Outcome(NamedTuple):
    """What became of an event. ``entry`` is the id of its entry, if it is known to have one.

    ``detail`` is the first word of Redis' error, if it has refused.
    """

    entry: str | None = None
    problem: Problem | None = None
    detail: str = ""


class Publication:
    """One event to be published: an XADD to the stream ``key``, or a PUBLISH on the channel.

    ``again``: the event has an id, so it may be sent twice.
    """

    __slots__ = (
        "again", "asking", "command", "in_doubt", "is_entry", "key", "outcome", "unreached",
    )  # fmt: skip

    def __init__(self, key: str, command: Command, *, is_entry: bool, again: bool) -> None:
        self.key = key
        self.command = command
        self.is_entry = is_entry
        self.again = again
        self.outcome: Outcome | None = None
        self.in_doubt = False  # an earlier try may have published it
        self.asking: RedisAddress | None = None  # the node of a Cluster to ask next, once
        self.unreached: RedisAddress | None = None  # the server that could not be reached

    @classmethod
    def to_stream(cls, stream: str, payload: bytes, most: int, *, again: bool) -> "Publication":
        """Add it to a stream of about ``most`` entries."""
        command = ("XADD", stream, "MAXLEN", "~", most, "*", "data", payload)
        return cls(stream, command, is_entry=True, again=again)

    @classmethod
    def on_channel(cls, channel: str, payload: bytes) -> "Publication":
        """Publish it on a channel."""
        return cls(channel, ("PUBLISH", channel, payload), is_entry=False, again=False)

    @property
    def size(self) -> int:
        """Bytes of its payload, and a little more."""
        return len(self.command[-1]) + 100 if isinstance(self.command[-1], bytes) else 100

    def failed(self, problem: Problem, detail: str = "") -> None:
        """This is the end, unless the event may have been published before."""
        self.outcome = Outcome(None, Problem.IN_DOUBT if self.in_doubt else problem, detail)


def pieces(group: Sequence[Publication]) -> Iterator[list[Publication]]:
    """The group in pieces of about the same size, with one event at least."""
    piece: list[Publication] = []
    size = 0
    for each in group:
        piece.append(each)
        size += each.size
        if size >= _PIECE:
            yield piece
            piece, size = [], 0
    if piece:
        yield piece
