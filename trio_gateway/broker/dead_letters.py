"""Dead letters: invalid stream entries are copied to a stream of their own, with the reason."""

from collections import Counter
from typing import Final, NamedTuple, NoReturn

import structlog
import trio

from ..core.slots import hash_tag
from ..runtime.throttled_log import ThrottledLog
from .commands import Commands, Unavailable

log = structlog.get_logger()

MAX_LENGTH: Final = 10_000  # entries, about; the oldest are trimmed
_MOST_WAITING: Final = 100
_MOST_BYTES: Final = 131_072  # of a payload; a longer one is invalid for its size alone
_REMEMBERED: Final = 86_400  # seconds in which no other process copies the same entry


class DeadLetter(NamedTuple):
    """An invalid stream entry, and why it is invalid."""

    stream: str
    entry_id: str
    reason: str
    error: str
    data: bytes


class DeadLetters:
    """Copies invalid stream entries to the dead-letter stream.

    It delays nothing: an entry is counted as lost if too many wait, or if Redis is unavailable.
    The entry was logged with its id, and is still in its stream.
    """

    def __init__(self, commands: Commands, stream: str) -> None:
        self._commands = commands
        self._stream = stream
        self._put, self._take = trio.open_memory_channel[DeadLetter](_MOST_WAITING)
        self.outcomes = Counter(copied=0, lost=0)  # of the entries that no other process copied

    def offer(self, stream: str, entry_id: str, reason: str, error: str, data: bytes) -> None:
        """Have an entry copied, unless too many are waiting. Never waits."""
        try:
            self._put.send_nowait(DeadLetter(stream, entry_id, reason, error, data))
        except trio.WouldBlock:
            self.outcomes["lost"] += 1

    async def run(self) -> NoReturn:
        """Copy what is offered; returns only when cancelled."""
        throttled_log = ThrottledLog(log)
        slot = f"{{{hash_tag(self._stream)}}}"  # one script writes the key and the stream
        while True:
            letter = await self._take.receive()
            try:
                # Every process reads every entry: the first one copies it.
                key = f"gateway:dlq:{slot}:{letter.stream}:{letter.entry_id}"
                self.outcomes["copied"] += await self._commands.add_once(
                    key, _REMEMBERED, self._stream, _fields(letter), MAX_LENGTH
                )
            except Unavailable as error:
                self.outcomes["lost"] += 1
                throttled_log.warning(
                    "dead letter lost", entry_id=letter.entry_id, error=str(error)
                )


def _fields(letter: DeadLetter) -> dict[str, str | bytes]:
    return {
        "stream": letter.stream,
        "entry_id": letter.entry_id,
        "reason": letter.reason,
        "error": letter.error,
        "size": str(len(letter.data)),
        "data": letter.data[:_MOST_BYTES],
    }
