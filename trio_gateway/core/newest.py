"""The newest event of each stream, and the id to resume after."""

from .event_ids import START, Position, Stream, read_cursor, read_event_id


class Newest:
    """The newest event so far; ``event_id`` is its id, or that of the position it began at."""

    def __init__(self, position: str) -> None:
        self.event_id = position
        self._positions: dict[Stream, Position] = _read(position)

    def advance(self, event_id: str) -> bool:
        """Note an event; False if it is not newer than those before it.

        It came again, or it was escalated and is older. What is not an id of the gateway counts as
        newer.
        """
        places, known = _read(event_id), self._positions
        if places and all(place <= known.get(stream, START) for stream, place in places.items()):
            return False
        self._positions |= places
        self.event_id = event_id
        return True


def is_event_id(text: str) -> bool:
    """Whether this is an id that the gateway gives to an event."""
    try:
        read_event_id(text)
    except ValueError:
        return False
    return True


def _read(position: str) -> dict[Stream, Position]:
    try:
        return dict(read_cursor(position))
    except ValueError:
        return {}
