"""Escalation: an event that nobody has confirmed in time goes to the next audience.

The gateway adds an entry to the stream of the event, a wrapper with the event inside. Every process
reads it there, in order, and delivers what is inside with the id of the original. So all processes
know of each step, and it is replayed like any other event.
"""

from typing import Annotated, Final

import msgspec

ESCALATED: Final = "EVENT_ESCALATED"
OVERHEAD: Final = 1024  # bytes of a wrapper besides the event, at most
_BEGIN: Final = b'{"type":"EVENT_ESCALATED",'


class Escalation(msgspec.Struct, frozen=True, gc=False):
    """What a wrapper says besides whom it concerns.

    ``event_id`` and ``of`` are the id and the type of the original, ``event`` is its payload. It
    goes to the audience ``to``, without those who have it because they were in one of the audiences
    ``unless``, which it went to before.
    ``step`` is the number of this step, from 1; the original is step 0.
    """

    event_id: str
    of: str
    to: str
    unless: tuple[str, ...]
    step: Annotated[int, msgspec.Meta(ge=1, le=9)]
    event: msgspec.Raw


_decode: Final = msgspec.json.Decoder(Escalation).decode


def may_be_wrapper(payload: bytes) -> bool:
    """Whether a payload begins as a wrapper does."""
    return payload.startswith(_BEGIN)


def read_escalation(payload: bytes) -> Escalation | None:
    """What a wrapper says; None if it is not a wrapper."""
    try:
        return _decode(payload)
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        return None
