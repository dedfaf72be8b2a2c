"""What clients say, and what they are answered."""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any, Final

import msgspec

from .audiences import SectorId


class Command(Enum):
    """The messages without content."""

    PING = auto()
    REFRESH_SECTORS = auto()  # the word alone: answered in the word's own form
    REFRESH_SECTORS_JSON = auto()
    WATCH = auto()  # an admin wants figures once a second
    UNWATCH = auto()
    INTERVALS = auto()  # how often it must be heard from, and how often it hears from us
    NOTHING = auto()  # anything else that is text: activity, and no more


@dataclass(frozen=True, slots=True)
class Reauthenticate:
    """A new credential for this connection; None if the message brought no string."""

    token: str | None


@dataclass(frozen=True, slots=True)
class Resume:
    """Replay from here; None if the message brought no string."""

    last_event_id: str | None


Message = Command | Reauthenticate | Resume

_WORDS: Final = {"ping": Command.PING, "refresh_sectors": Command.REFRESH_SECTORS}


class _Object(msgspec.Struct, gc=False):
    type: str
    token: Any = None
    last_event_id: Any = None


_decode: Final = msgspec.json.Decoder(_Object).decode
_encode: Final = msgspec.json.encode


def read_message(text: str) -> Message:
    """What the client means. Never fails: what is not understood is :attr:`Command.NOTHING`."""
    if (word := _WORDS.get(text)) is not None:
        return word
    if not text.lstrip().startswith("{"):
        return Command.NOTHING
    try:
        said = _decode(text)
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        # msgspec refuses half an emoji and 1e999 in keys that are not read; browsers send both.
        try:
            said = msgspec.convert(json.loads(text), _Object)
        except (ValueError, RecursionError):
            return Command.NOTHING
    match said.type:
        case "ping":
            return Command.PING
        case "refresh_sectors":
            return Command.REFRESH_SECTORS_JSON
        case "watch":
            return Command.WATCH
        case "unwatch":
            return Command.UNWATCH
        case "intervals":
            return Command.INTERVALS
        case "auth":
            return Reauthenticate(said.token if isinstance(said.token, str) else None)
        case "resume":
            last = said.last_event_id
            return Resume(last if isinstance(last, str) else None)
    return Command.NOTHING


PONG: Final = b'{"type":"pong"}'
GAP: Final = b'{"type":"gap"}'  # events were lost and can't be replayed: refetch


def auth_ok(expires_at: float) -> bytes:
    return _encode({"type": "auth_ok", "expires_at": int(expires_at)})


def sectors_updated(sectors: Collection[SectorId], form: Command) -> bytes:
    if form is Command.REFRESH_SECTORS:
        return b"sectors_updated:" + ",".join(map(str, sorted(sectors))).encode()
    return _encode({"type": "sectors_updated", "sector_ids": sorted(sectors)})


def statistics(figures: Mapping[str, Any], slow: Sequence[Mapping[str, Any]]) -> bytes:
    return _encode({"type": "statistics", **figures, "slow": slow})


def intervals(*, heartbeat_timeout: float, receive_timeout: float, ping_interval: float) -> bytes:
    """What the gateway measures silence by, in seconds (``WS_HEARTBEAT_TIMEOUT`` and so on)."""
    return _encode(
        {
            "type": "intervals",
            "heartbeat_timeout": heartbeat_timeout,
            "receive_timeout": receive_timeout,
            "ping_interval": ping_interval,
        }
    )


def resumed(*, recovered: bool, count: int, last_event_id: str) -> bytes:
    return _encode(
        {"type": "resumed", "recovered": recovered, "count": count, "last_event_id": last_event_id}
    )
