"""The messages that clients send, and the messages that answer them."""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any, Final

import msgspec

from .audiences import BranchId, SectorId
from .presence import Item, Items


class Command(Enum):
    """The messages that carry no data."""

    PING = auto()
    REFRESH_SECTORS = auto()  # the bare word, which has an answer of its own form
    REFRESH_SECTORS_JSON = auto()
    WATCH = auto()  # an admin asks for statistics once a second
    UNWATCH = auto()
    INTERVALS = auto()  # a client asks for the timeouts and the ping interval
    UNKNOWN = auto()  # any other text: it counts as a heartbeat only


@dataclass(frozen=True, slots=True)
class Reauthenticate:
    """A new credential for this connection; ``token`` is None if the message had no string."""

    token: str | None


@dataclass(frozen=True, slots=True)
class Resume:
    """Replay the events after this id; None if the message had no string.

    Unless it ``confirms``, the client has the events up to this id, but nobody who is to have them.
    """

    last_event_id: str | None
    confirms: bool = True


@dataclass(frozen=True, slots=True)
class WatchPresence:
    """Tell this admin who is present in a branch, or no more; None: no more of any."""

    branch: BranchId | None
    on: bool = True


@dataclass(frozen=True, slots=True)
class Confirm:
    """The client has everything up to this event; with ``is_ping`` it is a ping, too."""

    last_event_id: str
    is_ping: bool


@dataclass(frozen=True, slots=True)
class Seen:
    """The application of the client confirms this event."""

    event_id: str


Message = Command | Reauthenticate | Resume | WatchPresence | Confirm | Seen

_WORDS: Final = {"ping": Command.PING, "refresh_sectors": Command.REFRESH_SECTORS}


class _Object(msgspec.Struct, gc=False):
    type: str
    token: Any = None
    last_event_id: Any = None
    branch_id: Any = None
    event_id: Any = None
    confirm: Any = None


_decode: Final = msgspec.json.Decoder(_Object).decode
_encode: Final = msgspec.json.encode


def read_message(text: str) -> Message:
    """Parse a message of a client. Never fails: an unknown one is :attr:`Command.UNKNOWN`."""
    if (word := _WORDS.get(text)) is not None:
        return word
    if not text.lstrip().startswith("{"):
        return Command.UNKNOWN
    try:
        said = _decode(text)
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        # msgspec rejects lone surrogates and 1e999 even in unused keys; browsers send both.
        try:
            said = msgspec.convert(json.loads(text), _Object)
        except (ValueError, RecursionError):
            return Command.UNKNOWN
    match said.type:
        case "ping":
            if isinstance(said.last_event_id, str):
                return Confirm(said.last_event_id, is_ping=True)
            return Command.PING
        case "ack":
            last = said.last_event_id
            return Confirm(last if isinstance(last, str) else "", is_ping=False)
        case "seen":
            return Seen(said.event_id if isinstance(said.event_id, str) else "")
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
            return Resume(last if isinstance(last, str) else None, said.confirm is not False)
        case "watch_presence" if _is_id(said.branch_id):
            return WatchPresence(BranchId(said.branch_id))
        case "unwatch_presence" if said.branch_id is None or _is_id(said.branch_id):
            return WatchPresence(said.branch_id, on=False)
    return Command.UNKNOWN


def _is_id(said: Any) -> bool:
    return type(said) is int and said > 0  # True is not a number here


PONG: Final = b'{"type":"pong"}'
GAP: Final = b'{"type":"gap"}'  # events were lost, or skipped for a slow client


def auth_ok(expires_at: float) -> bytes:
    """The answer to a valid new token; ``expires_at`` is unix time."""
    return _encode({"type": "auth_ok", "expires_at": int(expires_at)})


def sectors_updated(sectors: Collection[SectorId], form: Command) -> bytes:
    """The answer to a request for sectors, in the form of the request: text or JSON."""
    if form is Command.REFRESH_SECTORS:
        return b"sectors_updated:" + ",".join(map(str, sorted(sectors))).encode()
    return _encode({"type": "sectors_updated", "sector_ids": sorted(sectors)})


def statistics(
    stats: Mapping[str, Any], slow: Sequence[Mapping[str, Any]], times: Mapping[str, Any]
) -> bytes:
    """The stats of a process; and of the receiver's tenant, slow clients and delivery times."""
    return _encode({"type": "statistics", **stats, "slow": slow, "delivery_times": times})


def intervals(
    *,
    heartbeat_timeout: float,
    receive_timeout: float,
    ping_interval: float,
    receipts: Collection[str] = (),
) -> bytes:
    """The gateway's timeouts and ping interval in seconds (``WS_HEARTBEAT_TIMEOUT`` and so on), and
    the types of events that clients confirm at once, if there are any.
    """
    tracked = {"receipts": sorted(receipts)} if receipts else {}
    return _encode(
        {
            "type": "intervals",
            "heartbeat_timeout": heartbeat_timeout,
            "receive_timeout": receive_timeout,
            "ping_interval": ping_interval,
            **tracked,
        }
    )


def resumed(*, recovered: bool, count: int, last_event_id: str) -> bytes:
    """The answer to a resume; ``count`` is how many events were missed."""
    return _encode(
        {"type": "resumed", "recovered": recovered, "count": count, "last_event_id": last_event_id}
    )


def presence_state(branch: BranchId, state: Items) -> bytes:
    """Who is present in a branch now."""
    return _encode(
        {"type": "presence", "branch_id": branch, "users": state.users, "sessions": state.sessions}
    )


def presence_change(branch: BranchId, joined: Sequence[Item], left: Sequence[Item]) -> bytes:
    """Who has come to a branch, or is known differently, and who has left it."""
    return _encode({"type": "presence", "branch_id": branch, "joined": joined, "left": left})
