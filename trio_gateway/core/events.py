"""Events: the only place that looks inside the JSON that backends publish."""

import re
from collections.abc import Callable, Container
from typing import Annotated, Final

import msgspec

from .audiences import BranchId, SectorId, SessionId, TableId, TenantId
from .escalation import OVERHEAD, Escalation, may_be_wrapper, read_escalation
from .event_ids import Position, Stream, event_id
from .frames import deflated_frame, split, text_frame

MAX_EVENT_BYTES: Final = 65_536
MAX_ID: Final = 2**63 - 1
WORTH_DEFLATING: Final = 1024  # bytes
WHITE_SPACE: Final = b" \t\r\n"  # JSON's (RFC 8259, 2)

_EVENT_ID: Final = b',"event_id":"'

_POSITIVE: Final = msgspec.Meta(gt=0, le=MAX_ID)


class Keys(msgspec.Struct, gc=False):
    """The keys of an event that have rules; all others pass through unread."""

    type: Annotated[str, msgspec.Meta(min_length=1)]
    tenant_id: Annotated[TenantId, _POSITIVE]
    branch_id: Annotated[BranchId, msgspec.Meta(ge=0, le=MAX_ID)]
    sector_id: Annotated[SectorId, _POSITIVE] | None = None
    session_id: Annotated[SessionId, _POSITIVE] | None = None
    table_id: Annotated[TableId, _POSITIVE] | None = None
    id: str | None = None


class _Envelope(Keys, gc=False):
    ts: msgspec.Raw = msgspec.Raw()


class _Whose(msgspec.Struct, gc=False):
    tenant_id: Annotated[TenantId, _POSITIVE]


_decode: Final[Callable[[bytes], _Envelope]] = msgspec.json.Decoder(_Envelope).decode
_KEYS: Final = _Envelope.__struct_fields__

# An escape in a JSON string; group 1 if it is half of a surrogate pair, without the other half.
_ESCAPE: Final = re.compile(
    rb"\\(?:u[dD][89abAB]..\\u[dD][c-fC-F]..|(u[dD][89a-fA-F][0-9a-fA-F]{2})|.)", re.DOTALL
)


class InvalidEvent(Exception):  # noqa: N818 - reads better where it is raised
    """A payload is not a valid event.

    ``reason`` is one of a small fixed set and fits a metric label. The text names the broken rule
    and never contains the payload.
    """

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(text)
        self.reason = reason


class Event(msgspec.Struct, gc=False, eq=False):
    """One event on its way through the gateway.

    ``received_at`` is when it was received, on the runtime's clock. ``stream`` and ``position`` are
    None for an event from Pub/Sub. ``durable``: it was read from a stream, and its type is durable.
    ``escalation``: it is an event that others were sent before; clients get what is inside.
    """

    type: str
    tenant: TenantId
    branch: BranchId
    sector: SectorId | None
    session: SessionId | None
    id: str | None
    ts: msgspec.Raw  # as published, JSON; empty if there is none
    payload: bytes  # as published, byte for byte
    channel: str
    received_at: float
    stream: Stream | None
    position: Position | None
    durable: bool
    escalation: Escalation | None = None
    _frame: bytes | None = None
    _deflated: bytes | None = None

    @property
    def event_id(self) -> str | None:
        """The id that clients get with it; None unless the event is durable."""
        if not self.durable:
            return None
        if self.escalation is not None:
            return self.escalation.event_id
        assert self.stream is not None
        assert self.position is not None
        return event_id(self.stream, self.position)

    @property
    def text(self) -> bytes:
        """The JSON that clients get: the payload, with ``event_id`` appended if it is durable."""
        if (found := self.event_id) is None:
            return self.payload
        # The object is not empty, so a comma is needed; ids need no escapes.
        payload = self.payload if self.escalation is None else bytes(self.escalation.event)
        open_end = payload.rstrip(WHITE_SPACE)[:-1]
        return b'%b%b%b"}' % (open_end, _EVENT_ID, found.encode())

    @property
    def frame(self) -> bytes:
        """The WebSocket frame for all recipients, encoded once (RFC 6455, 5.2)."""
        if (found := self._frame) is None:
            found = self._frame = text_frame(self.text if self.durable else self.payload)
        return found

    @property
    def deflated(self) -> bytes:
        """The compressed frame for recipients that negotiated compression, encoded once.

        A payload below :data:`WORTH_DEFLATING` bytes is not compressed: this is ``frame`` then.
        """
        if self._deflated is None:
            big = len(self.payload) >= WORTH_DEFLATING
            self._deflated = deflated_frame(self.text) if big else self.frame
        return self._deflated

    def __repr__(self) -> str:
        return f"<Event {self.type} tenant={self.tenant} branch={self.branch}>"


def parse_event(
    payload: bytes,
    *,
    channel: str,
    received_at: float,
    stream: Stream | None = None,
    position: Position | None = None,
    durable_types: Container[str] = (),
) -> Event:
    """Return the event in a published payload, or raise :exc:`InvalidEvent`.

    ``received_at`` is in seconds on the runtime's clock. An event that was read from a stream has
    its ``stream`` and ``position``, and an event id if its type is one of ``durable_types``.

    Every event is checked here: from Pub/Sub, from streams, and in the publisher before it sends.
    """
    is_wrapper = may_be_wrapper(payload)
    if is_wrapper and stream is None:
        raise InvalidEvent("type", "EVENT_ESCALATED is made by the gateway alone")
    if len(payload) > MAX_EVENT_BYTES + (OVERHEAD if is_wrapper else 0):
        raise InvalidEvent("too_big", f"event is over {MAX_EVENT_BYTES} bytes")
    try:
        # msgspec does not check what it skips, and a browser drops the connection when it gets
        # invalid UTF-8: one bad event would disconnect every client.
        if not payload.isascii():
            payload.decode()
        keys = _decode_envelope(payload)
    except UnicodeDecodeError:
        raise InvalidEvent("not_utf8", "event is not UTF-8") from None
    except msgspec.ValidationError as error:
        raise InvalidEvent(_reason(str(error)), str(error)) from None
    except RecursionError:
        raise InvalidEvent("too_deep", "event is nested too deeply") from None
    except msgspec.DecodeError:
        raise InvalidEvent("not_json", "event is not JSON") from None
    escalation = read_escalation(payload) if is_wrapper else None
    # By position: at this place names would cost a tenth of all that an event costs.
    return Event(
        keys.type, keys.tenant_id, keys.branch_id, keys.sector_id, keys.session_id, keys.id or None,
        keys.ts, payload, channel, received_at, stream, position,
        stream is not None and position is not None
        and (keys.type in durable_types or escalation is not None),
        escalation,
    )  # fmt: skip


def payload_of(held: bytes) -> bytes:
    """The payload of a valid event, without white space at its end if that was in its frame.

    ``held`` is the payload, or the frame of a durable event.
    """
    if held[0] < 0x80:  # JSON begins with an ASCII character, a frame with the bit FIN
        return held
    [(_, text)] = split(held)
    return bytes(text).rpartition(_EVENT_ID)[0] + b"}"


def tenant_of(payload: bytes) -> TenantId | None:
    """The tenant of an event that may be invalid, or None if it can't be read."""
    try:
        return msgspec.json.decode(with_whole_pairs(payload), type=_Whose).tenant_id
    except (ValueError, RecursionError):
        return None


def with_whole_pairs(payload: bytes) -> bytes:
    """A copy of JSON in which U+FFFD replaces each half of a surrogate pair that is alone."""
    return _ESCAPE.sub(_repaired, payload)


def ts_of(payload: bytes) -> bytes:
    """The JSON value of ``ts`` in the payload of a valid event; empty if there is none."""
    try:
        return bytes(_decode_envelope(payload).ts)
    except (msgspec.DecodeError, RecursionError):  # nested too deeply at this depth of the stack
        return b""


def _decode_envelope(payload: bytes) -> _Envelope:
    try:
        return _decode(payload)
    except msgspec.ValidationError:
        raise
    except msgspec.DecodeError:
        # JSON allows half of a surrogate pair (RFC 8259, 8.2), such as a text that was cut inside
        # an emoji; msgspec does not. The payload passes through as it is; only a repaired copy of
        # it is decoded here.
        return _decode(with_whole_pairs(payload))


def _repaired(escape: re.Match[bytes]) -> bytes:
    return rb"\ufffd" if escape[1] else escape[0]


def _reason(text: str) -> str:
    """Which key broke its rule, from msgspec's ``… - at `$.key` `` or ``missing … `key` ``."""
    for key in _KEYS:
        if f"$.{key}`" in text or f"field `{key}`" in text:
            return key
    return "not_object"
