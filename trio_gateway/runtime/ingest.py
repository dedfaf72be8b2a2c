"""Ingest: received payloads are checked, counted, and made events."""

from collections import Counter
from collections.abc import Callable, Container, Sequence

import structlog
import trio

from ..core.event_ids import Stream, entry_id
from ..core.events import Event, InvalidEvent, parse_event
from .source import Entry
from .throttled_log import ThrottledLog

log = structlog.get_logger()

Message = tuple[str, bytes]  # channel and payload
# Keeps an invalid stream entry: stream name, entry id, reason, error, payload. Never waits.
PutAside = Callable[[str, str, str, str, bytes], None]


class Ingest:
    """Makes events of the payloads from Pub/Sub and the streams, and counts invalid ones."""

    def __init__(self, put_aside: PutAside | None = None) -> None:
        self.received: Counter[str] = Counter()  # by source
        self.invalid: Counter[str] = Counter()  # by reason
        self._put_aside = put_aside
        self._throttled_log = ThrottledLog(log)

    def parse_messages(self, messages: Sequence[Message]) -> list[Event]:
        """Return the events in Pub/Sub messages that were just received.

        Invalid ones are left out: they are counted and logged.
        """
        self.received["pubsub"] += len(messages)
        found: list[Event] = []
        now = trio.current_time()
        for channel, payload in messages:
            try:
                found.append(parse_event(payload, channel=channel, received_at=now))
            except InvalidEvent as invalid:
                self._count_invalid(invalid, "pubsub", channel)
        return found

    def parse_entries(
        self,
        entries: Sequence[Entry],
        *,
        channel: str,
        stream: Stream,
        durable_types: Container[str],
    ) -> list[Event]:
        """Return the events in stream entries that were just received.

        Invalid ones are left out: they are counted, logged and put aside. ``channel`` is the name
        of the stream.
        """
        self.received["stream"] += len(entries)
        found: list[Event] = []
        now = trio.current_time()
        for entry in entries:
            payload, position = entry.payload, entry.position
            try:
                if payload is None:
                    raise InvalidEvent("no_data", "entry has no field data")
                event = parse_event(
                    payload, channel=channel, received_at=now,
                    stream=stream, position=position, durable_types=durable_types,
                )  # fmt: skip
                found.append(event)
            except InvalidEvent as invalid:
                if self._put_aside is not None:
                    self._put_aside(
                        channel, entry_id(position), invalid.reason, str(invalid), payload or b""
                    )
                self._count_invalid(invalid, "stream", channel, entry_id=entry_id(position))
        return found

    def _count_invalid(
        self, invalid: InvalidEvent, source: str, channel: str, **where: str
    ) -> None:
        """Each reason is logged once a second at most."""
        self.invalid[invalid.reason] += 1
        self._throttled_log.warning(
            "invalid event",
            kind=invalid.reason,
            source=source,
            channel=channel,
            reason=invalid.reason,
            error=str(invalid),
            **where,
        )
