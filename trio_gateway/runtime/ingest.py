"""The intake: what the sources hear is checked, counted, and made an event."""

from collections import Counter
from collections.abc import Callable

import structlog
import trio

from ..core.events import Event, InvalidEvent, parse_event
from ..core.limits import LogLimit

log = structlog.get_logger()


# Keeps an invalid stream entry: stream, entry id, reason, error, payload.
PutAside = Callable[[str, str, str, str, bytes], None]


class Ingest:
    """The one check that guards every way in."""

    def __init__(self, put_aside: PutAside | None = None) -> None:
        self.received: Counter[str] = Counter()  # by source
        self.invalid: Counter[str] = Counter()  # by reason
        self._put_aside = put_aside
        self._log_limit = LogLimit()

    def parse(
        self, payload: bytes, *, source: str, channel: str, entry_id: str | None = None
    ) -> Event | None:
        """The event that was heard, or None if it is invalid: then it is counted and logged."""
        self.received[source] += 1
        now = trio.current_time()
        try:
            return parse_event(payload, channel=channel, heard_at=now)
        except InvalidEvent as invalid:
            self.refuse(
                invalid.reason,
                str(invalid),
                source=source,
                channel=channel,
                entry_id=entry_id,
                payload=payload,
            )
            return None

    def refuse(
        self,
        reason: str,
        text: str,
        *,
        source: str,
        channel: str,
        entry_id: str | None = None,
        payload: bytes = b"",
    ) -> None:
        """Count and log something that is no event; one log line a second per reason."""
        self.invalid[reason] += 1
        if entry_id is not None and self._put_aside is not None:
            self._put_aside(channel, entry_id, reason, text, payload)
        if (held_back := self._log_limit.allows(reason, trio.current_time())) is not None:
            log.warning(
                "invalid event",
                source=source,
                channel=channel,
                reason=reason,
                error=text,
                held_back=held_back,
                **({} if entry_id is None else {"entry_id": entry_id}),
            )
