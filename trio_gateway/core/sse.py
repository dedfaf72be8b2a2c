"""Frames as Server-Sent Events (WHATWG HTML, 9.2), for those who can't have a WebSocket."""

import json
import re
from typing import Final

from .close_codes import parse_retry_hint
from .frames import PING, TEXT, split

MEDIA_TYPE: Final = "text/event-stream"
HELLO: Final = b"retry: 3000\n\n"  # milliseconds; an earlier close may have said something else
_COMMENT: Final = b": ping\n\n"

_LINE_END: Final = re.compile(rb"\r\n|\r|\n")
# As Event.text splices it, and nowhere but at the end; JSON has no bare quote inside a string.
_EVENT_ID: Final = re.compile(rb',"event_id":"(\d{1,20}-\d{1,20}-[0-9a-f]{4})"\}\Z')
_TAIL: Final = 64  # bytes that it fits into
# No event looks like that: it would name its tenant.
_RESUMED: Final = re.compile(
    rb'\{"type":"resumed","recovered":\w+,"count":\d+,"last_event_id":"([^"\\]+)"\}'
)


def as_events(data: bytes | memoryview) -> bytes:
    """Joined whole frames as events; pings become comments, and pongs nothing.

    What names a place to resume from has it as its ``id``: the browser gives that back by itself.
    """
    return b"".join(_as_event(opcode, payload) for opcode, payload in split(data))


def close_event(code: int, reason: str) -> bytes:
    """What stands for a close frame. After it browsers come again by themselves: not before the
    moment that the reason may name.
    """
    said = json.dumps({"code": code, "reason": reason}, separators=(",", ":"))
    after = parse_retry_hint(reason)
    retry = b"" if after is None else b"retry: %d\n" % round(after * 1000)
    return b"event: close\n%bdata: %b\n\n" % (retry, said.encode())


def _as_event(opcode: int, payload: memoryview) -> bytes:
    if opcode == PING:
        return _COMMENT
    if opcode != TEXT:
        return b""
    text = bytes(payload)
    found = _EVENT_ID.search(text[-_TAIL:]) or _RESUMED.fullmatch(text)
    place = b"id: %b\n" % found[1] if found else b""
    if b"\n" in text or b"\r" in text:  # between two tokens, where JSON allows it
        text = _LINE_END.sub(b"\ndata: ", text)
    return b"%bdata: %b\n\n" % (place, text)
