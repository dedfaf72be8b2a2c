"""The feed: parses the gateway's messages and removes duplicate events, across reconnects."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from ..core.newest import Newest
from .presence import Presences
from .values import Event, Gap

REMEMBERED: Final = 1000  # event ids, to find duplicates


@dataclass(frozen=True, slots=True)
class Missed:
    """Events may be missing here."""

    reason: Gap


@dataclass(frozen=True, slots=True)
class Repeated:
    """An event that was received before."""

    type: str
    event_id: str


@dataclass(frozen=True, slots=True)
class Resumed:
    """The gateway has admitted this client; resume after this id."""

    last_event_id: str


@dataclass(frozen=True, slots=True)
class Renewed:
    """The gateway has accepted the offered credential, which expires at this unix time."""

    expires_at: float


@dataclass(frozen=True, slots=True)
class Intervals:
    """The gateway closes the connection after ``silence`` seconds, and tracks the events of
    ``receipts``.
    """

    silence: float
    receipts: frozenset[str]


@dataclass(frozen=True, slots=True)
class Sectors:
    """The answer to a request for the waiter's sectors."""

    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Pong:
    """The answer to a ping."""


Item = Event | Repeated | Missed | Resumed | Renewed | Intervals | Sectors | Presences | Pong


class Feed:
    """Reads messages."""

    def __init__(self, last_event_id: str) -> None:
        self._newest = Newest(last_event_id)
        self._received: dict[str, None] = {}

    @property
    def last_event_id(self) -> str:
        """The id to resume after: that of the newest event read."""
        return self._newest.event_id

    def read(self, text: str) -> list[Item]:
        """Parse a message into items, in order; none for an unknown message."""
        try:
            message = json.loads(text)
        except (ValueError, RecursionError):
            return []
        match message:
            # Events name their tenant; the gateway's own messages do not.
            case {"tenant_id": _, "type": str(name)}:
                return self._read_event(name, message, text)
            case {"type": "resumed", "recovered": recovered, "last_event_id": str(last_event_id)}:
                self._newest = Newest(last_event_id)
                gap: list[Item] = [] if recovered else [Missed("not_recovered")]
                return [*gap, Resumed(last_event_id)]
            case {"type": "pong"}:
                return [Pong()]
            case {"type": "gap"}:
                return [Missed("lost")]
            case {"type": "auth_ok", "expires_at": int(expires_at)}:
                return [Renewed(expires_at)]
            case {
                "type": "intervals",
                "heartbeat_timeout": int() | float() as heartbeat,
                "receive_timeout": int() | float() as receive,
            }:
                tracked = message.get("receipts")
                names = tracked if isinstance(tracked, list) else []
                types = frozenset(each for each in names if isinstance(each, str))
                return [Intervals(min(heartbeat, receive), types)]
            case {"type": "sectors_updated", "sector_ids": list(ids)}:
                return [Sectors(tuple(ids))]
            case {"type": "presence", "branch_id": int(branch_id)}:
                return [Presences.read(branch_id, message)]
        return []

    def _read_event(self, name: str, data: Mapping[str, Any], text: str) -> list[Item]:
        event_id = data.get("event_id")
        if not isinstance(event_id, str):
            return [Event(name, data, text, None)]
        self._newest.advance(event_id)
        if event_id in self._received:
            return [Repeated(name, event_id)]
        self._received[event_id] = None
        if len(self._received) > REMEMBERED:
            del self._received[next(iter(self._received))]
        return [Event(name, data, text, event_id)]
