"""The JSON of an event that is to be published."""

from collections.abc import Mapping
from typing import Any

import msgspec

from ..core.events import InvalidEvent

EventToPublish = Mapping[str, Any] | bytes | str


def encode(event: EventToPublish, id: str | None) -> bytes:  # noqa: A002 - the event's key
    """The JSON of a mapping, with the ``id`` unless it has one; JSON is returned as it is.

    Raises :exc:`InvalidEvent` for what can't be JSON, and :exc:`TypeError` for JSON with an ``id``.
    """
    if not isinstance(event, Mapping):
        if id is not None:
            raise TypeError("id can't be added to JSON: pass the event as a mapping")
        try:
            return event.encode() if isinstance(event, str) else bytes(event)
        except UnicodeEncodeError:
            raise InvalidEvent("not_utf8", "event is not UTF-8") from None
    found = dict(event)
    if id is not None:
        found.setdefault("id", id)
    try:
        return msgspec.json.encode(found)
    except UnicodeEncodeError:
        raise InvalidEvent("not_utf8", "event is not UTF-8") from None
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise InvalidEvent("not_json", f"event can't be JSON: {error}") from None
