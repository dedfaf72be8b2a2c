"""The outbox: whole frames that one client's kernel buffer would not take yet."""

import math
from typing import Final

from ..core.delivery_times import Owed
from ..core.frames import boundary

_JOINED: Final = 1 << 16  # bytes handed to the kernel in one write, about
_BURST: Final = 262_144  # bytes a second: what fills it so fast is a burst


class Outbox:
    """Frames in order, of which the first may be partly written.

    ``max_bytes`` and ``max_frames`` bound what waits; :meth:`put` tells when it is more.
    """

    __slots__ = (
        "_added", "_chunks", "_max_bytes", "_max_frames", "_owed", "_written", "began_at", "bytes",
        "frames",
    )  # fmt: skip

    def __init__(self, max_bytes: float = math.inf, max_frames: float = math.inf) -> None:
        self._max_bytes = max_bytes
        self._max_frames = max_frames
        self._chunks: list[tuple[bytes, int]] = []  # joined frames, and how many
        self._written = 0  # of the first chunk
        self._added = 0  # bytes, since it was empty
        self._owed: list[tuple[int, Owed]] = []  # with where they end, in bytes
        self.began_at = 0.0  # when it was empty last
        self.bytes = 0
        self.frames = 0

    def put(self, data: bytes, frames: int, written: int = 0) -> bool:
        """Add joined whole frames, of which the kernel has already taken ``written`` bytes.

        They are added in any case. Returns whether more waits now than the bounds allow.
        """
        assert written == 0 or not self._chunks
        if not self._chunks:
            self._added = 0
        self._added += len(data)
        self._chunks.append((data, frames))
        self._written += written
        self.bytes += len(data) - written
        self.frames += frames
        return self.bytes > self._max_bytes or self.frames > self._max_frames

    def fills_fast(self, now: float) -> bool:
        """Whether more than half of the bounds are in use, because of a burst."""
        if 2 * self.bytes <= self._max_bytes and 2 * self.frames <= self._max_frames:
            return False
        return self._added >= _BURST * (now - self.began_at)

    def head(self) -> memoryview:
        """The bytes to write next, if any: many small chunks are joined into one write."""
        if not self._chunks:
            return memoryview(b"")
        head = memoryview(self._chunks[0][0])[self._written :]
        if len(self._chunks) == 1 or len(head) >= _JOINED:
            return head
        parts, size = [head], len(head)
        for data, _ in self._chunks[1:]:
            parts.append(memoryview(data))
            size += len(data)
            if size >= _JOINED:
                break
        return memoryview(b"".join(parts))

    def took(self, size: int) -> None:
        """Remove the first ``size`` bytes of :meth:`head`: the transport has taken them."""
        chunks = self._chunks
        if not chunks:  # they were discarded while they were being sent
            return
        self.bytes -= size
        self._written += size
        whole = 0
        while whole < len(chunks) and self._written >= len(chunks[whole][0]):
            data, frames = chunks[whole]
            self._written -= len(data)
            self.frames -= frames
            whole += 1
        del chunks[:whole]

    def owe(self, owed: Owed) -> None:
        """These events are the last of what waits."""
        self._owed.append((self._added, owed))

    def settle(self, now: float) -> None:
        """Tell which events of those have been taken."""
        taken, done = self._added - self.bytes, 0
        for end, owed in self._owed:
            if end > taken:
                break
            owed.written(now)
            done += 1
        del self._owed[:done]

    @property
    def partial(self) -> bool:
        """Whether a frame is partly written: nothing else can go out before its rest."""
        if not self._written:
            return False
        data = self._chunks[0][0]
        return boundary(data, self._written) != self._written

    def discard(self) -> None:
        """Drop everything but the rest of a frame that is partly written."""
        rest = b""
        if self._written:
            data = self._chunks[0][0]
            rest = data[: boundary(data, self._written)]
        written = self._written
        self._chunks.clear()
        self._owed.clear()
        self._written = self.bytes = self.frames = 0
        if len(rest) > written:
            self.put(rest, 1, written)
