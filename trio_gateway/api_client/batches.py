"""Batches: events are checked, and divided among requests that the gateway accepts."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from ..core.events import parse_event
from ..publisher import InDoubt, InvalidEvent, PublishFailed
from ..publisher.payload import EventToPublish, encode
from .errors import CallFailed
from .values import Published

_MOST_EVENTS: Final = 1000
_MOST_BYTES: Final = 4 << 20  # half of what the gateway accepts


@dataclass
class Batch:
    """Events of one request, and the place of each among all of them."""

    payloads: list[bytes] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    repeatable: bool = True  # each has an id
    size: int = 0

    def has_room(self, payload: bytes) -> bool:
        """Whether it may have this event, too."""
        return len(self.payloads) < _MOST_EVENTS and self.size + len(payload) <= _MOST_BYTES

    def add(self, payload: bytes, place: int, *, has_id: bool) -> None:
        """Add an event."""
        self.payloads.append(payload)
        self.places.append(place)
        self.size += len(payload) + 1
        self.repeatable &= has_id


def check(event: EventToPublish, id: str | None = None) -> tuple[bytes, bool]:  # noqa: A002 - the event's key
    """The JSON of an event, and whether it has an id. Raises as :meth:`ApiClient.publish` does."""
    payload = encode(event, id)
    return payload, parse_event(payload, channel="", received_at=0.0).id is not None


def event_id_of(published: Published) -> str | None:
    """The event id of a published event. Raises the error of another one."""
    if published.error is not None:
        raise published.error
    return published.event_id


def not_published(failed: CallFailed) -> PublishFailed:
    """The failure to publish an event that is due to the failure of the call."""
    return InDoubt(str(failed)) if failed.in_doubt else PublishFailed(str(failed))


class Outcomes:
    """Events that are to be published in ``batches``, and what became of each, in ``published``."""

    def __init__(self, events: Iterable[EventToPublish]) -> None:
        self.batches: list[Batch] = []
        self.published: list[Published] = []
        not_sent = Published(error=PublishFailed("not sent: events before it were not published"))
        for place, event in enumerate(events):
            try:
                payload, has_id = check(event)
            except InvalidEvent as invalid:
                self.published.append(Published(error=invalid))
                continue
            self.published.append(not_sent)
            if not (self.batches and self.batches[-1].has_room(payload)):
                self.batches.append(Batch())
            self.batches[-1].add(payload, place, has_id=has_id)

    def answered(self, batch: Batch, found: Iterable[Published]) -> None:
        """The gateway said what became of a batch."""
        for place, published in zip(batch.places, found, strict=True):
            self.published[place] = published

    def failed(self, batch: Batch, failed: CallFailed) -> None:
        """The call for a batch has failed; those after it must not be sent."""
        self.answered(batch, [Published(error=not_published(failed)) for _ in batch.places])
