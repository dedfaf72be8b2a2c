"""WebSocket frames as Server-Sent Events (WHATWG HTML, 9.2)."""

import json
import re
from typing import Final

from .close_codes import parse_retry_hint
from .frames import PING, TEXT, split
from .newest import Newest

MEDIA_TYPE: Final = "text/event-stream"
HELLO: Final = b"retry: 3000\n\n"  # milliseconds; an earlier close may have set another value
_COMMENT: Final = b": ping\n\n"

_LINE_END: Final = re.compile(rb"\r\n|\r|\n")
# As Event.text appends it, so only at the end; JSON has no bare quote inside a string.
_EVENT_ID: Final = re.compile(rb',"event_id":"(\d{1,20}-\d{1,20}-[0-9a-f]{4})"\}\Z')
_TAIL: Final = 64  # bytes at the end in which it is searched
# No event has this form: an event names its tenant.
_RESUMED: Final = re.compile(
    rb'\{"type":"resumed","recovered":\w+,"count":\d+,"last_event_id":"([^"\\]+)"\}'
)


class EventWriter:
    """Converts the frames of one connection.

    The position of an event, or of a ``resumed`` message, becomes its ``id``: the browser sends the
    last one back by itself when it reconnects. So an event that is older than others, because it
    was escalated, has none.
    """

    def __init__(self) -> None:
        self._newest = Newest("")

    def convert(self, data: bytes | memoryview) -> bytes:
        """Convert whole, uncompressed frames that are joined. A text becomes an event, a ping a
        comment, a pong nothing.
        """
        return b"".join(self._event(opcode, payload) for opcode, payload in split(data))

    def _event(self, opcode: int, payload: memoryview) -> bytes:
        if opcode == PING:
            return _COMMENT
        if opcode != TEXT:
            return b""
        text = bytes(payload)
        position = self._position(text)
        id_line = b"" if position is None else b"id: %b\n" % position
        if b"\n" in text or b"\r" in text:  # between two tokens, where JSON allows it
            text = _LINE_END.sub(b"\ndata: ", text)
        return b"%bdata: %b\n\n" % (id_line, text)

    def _position(self, text: bytes) -> bytes | None:
        """The position to resume from after this text, if it has another one."""
        if found := _EVENT_ID.search(text[-_TAIL:]):
            return found[1] if self._newest.advance(found[1].decode()) else None
        if found := _RESUMED.fullmatch(text):
            self._newest = Newest(found[1].decode())
            return found[1]
        return None


def close_event(code: int, reason: str) -> bytes:
    """The event for a close. Browsers reconnect after it by themselves; if the reason has a retry
    hint, not before that time.
    """
    said = json.dumps({"code": code, "reason": reason}, separators=(",", ":"))
    after = parse_retry_hint(reason)
    retry = b"" if after is None else b"retry: %d\n" % round(after * 1000)
    return b"event: close\n%bdata: %b\n\n" % (retry, said.encode())
