"""Splitting a body of events that can't be decoded as a whole, so that one costs no other.

msgspec refuses a document with half of a surrogate pair, or nested too deeply, anywhere.
"""

import re
from typing import Final

import trio

from ...core.events import WHITE_SPACE

_START: Final = re.compile(rb'[ \t\r\n]*\{[ \t\r\n]*"events"[ \t\r\n]*:[ \t\r\n]*\[')
_END: Final = re.compile(rb"[ \t\r\n]*\}[ \t\r\n]*")
# What is between two tokens is not looked at: each event is parsed afterwards.
_TOKEN: Final = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|[\[\]{},]', re.DOTALL)
_PER_CHECKPOINT: Final = 1000  # tokens, in less than a millisecond


async def split_events(body: bytes) -> list[bytes]:
    """The text of each event in ``{"events":[…]}``, which may be invalid itself.

    Raises :exc:`ValueError` if this is not the body's form.
    """
    if (start := _START.match(body)) is None:
        raise ValueError("not an object with events")
    found: list[bytes] = []
    begin, depth = start.end(), 0
    for n, token in enumerate(_TOKEN.finditer(body, begin)):
        match token[0]:
            case b"[" | b"{":
                depth += 1
            case b"]" | b"}" if depth:
                depth -= 1
            case b"," if not depth:
                found.append(body[begin : token.start()].strip(WHITE_SPACE))
                begin = token.end()
            case b"]":
                found.append(body[begin : token.start()].strip(WHITE_SPACE))
                if _END.fullmatch(body, token.end()) is None:
                    break
                return [] if found == [b""] else found
            case b"}":
                break
        if n % _PER_CHECKPOINT == 0:
            await trio.lowlevel.checkpoint()
    raise ValueError("not a list of events, and nothing else")
