"""Ingest: received payloads are checked, counted, and made events."""

from collections import Counter
from collections.abc import Callable, Container

import structlog
import trio

from ..core.event_ids import Position, Stream, entry_id
from ..core.events import Event, InvalidEvent, parse_event
from .throttled_log import ThrottledLog

log = structlog.get_logger()

# Keeps an invalid stream entry: stream name, entry id, reason, error, payload. Never waits.
PutAside = Callable[[str, str, str, str, bytes], None]


class Ingest:
    """Makes events of the payloads from Pub/Sub and the streams, and counts invalid ones."""

    def __init__(self, put_aside: PutAside | None = None) -> None:
        self.received: Counter[str] = Counter()  # by source
        self.invalid: Counter[str] = Counter()  # by reason
        self._put_aside = put_aside
        self._throttled_log = ThrottledLog(log)

    def parse(
        self,
        payload: bytes,
        *,
        source: str,
        channel: str,
        stream: Stream | None = None,
        position: Position | None = None,
        durable_types: Container[str] = (),
        received_at: float | None = None,
    ) -> Event | None:
        """Return the event in a payload that was just received.

        Returns None if the payload is invalid: then it is counted and logged, and put aside if it
        is a stream entry. ``source`` is ``pubsub`` or ``stream``; ``channel`` is the name of the
        channel or stream. The other arguments are those of :func:`parse_event`; ``received_at`` is
        the present by default.
        """
        self.received[source] += 1
        now = trio.current_time() if received_at is None else received_at
        try:
            return parse_event(
                payload,
                channel=channel,
                received_at=now,
                stream=stream,
                position=position,
                durable_types=durable_types,
            )
        except InvalidEvent as invalid:
            reason, text = invalid.reason, str(invalid)
        self._count_invalid(
            reason, text, source=source, channel=channel, position=position, payload=payload
        )
        return None

    def reject_empty(self, *, channel: str, position: Position) -> None:
        """Count, log and put aside a stream entry without the field ``data``."""
        self.received["stream"] += 1
        text = "entry has no field data"
        self._count_invalid("no_data", text, source="stream", channel=channel, position=position)

    def _count_invalid(
        self,
        reason: str,
        text: str,
        *,
        source: str,
        channel: str,
        position: Position | None,
        payload: bytes = b"",
    ) -> None:
        """Each reason is logged once a second at most."""
        self.invalid[reason] += 1
        where = {} if position is None else {"entry_id": entry_id(position)}
        if where and self._put_aside is not None:
            self._put_aside(channel, where["entry_id"], reason, text, payload)
        self._throttled_log.warning(
            "invalid event",
            kind=reason,
            source=source,
            channel=channel,
            reason=reason,
            error=text,
            **where,
        )
