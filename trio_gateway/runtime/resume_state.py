"""The resume state of one connection: by which of two ways a durable event reaches it.

A durable event reaches a connection live, from dispatch, or from the history. Which of the two
is a question of its phase:

- CONNECTING: it is not in the hub yet, or nobody resumes.
- HELD: it has joined, and may still ask to resume: by its first message, or in its handshake.
  Live events that were sent before an answer would come out of order, so durable ones wait in
  the history. Any other first message decides, or half a second of silence.
- REPLAYING: it is sent what it missed, no faster than it reads.
- LIVE: it is sent durable events as they are dispatched.
- LAGGING: more waited in its outbox than the bound allows. It is sent durable events from the
  history, no faster than it reads, and events that are not durable are skipped.
- CLOSED: it has left the hub, and is sent nothing. No step changes that.

The cursor is the place in the history up to which it has everything; what is in its outbox counts
as sent. These three are one fact: the phase is HELD, REPLAYING or LAGGING; there is a cursor; the
connection is in ``hub.held``, by which dispatch passes it over. :meth:`ResumeState.step` keeps the
first two together, and ``Hub.step``, through which alone a phase changes, the third.

Nothing is lost or doubled at the seams, because these happen in one synchronous step each:

- Dispatch adds a batch to the history and takes its snapshot of the members.
- A connection finds that nothing is left to replay and becomes LIVE.
- A LIVE connection becomes LAGGING, with the end of the history as its cursor.

So a batch comes either before the second, and is replayed, or after it, and is sent live. A batch
comes either before the third, and is put into the outbox as a whole, at the latest when dispatch
comes to this connection, or after it, and waits in the history. Dispatch plans the next batch only
when it has written this one to every connection, so the two cannot overtake each other.

A client may ask to resume once, and only before anything was replayed to it: ``may_resume``. One
that asks when it is LIVE already, after half a second of silence, is looked up while it stays
LIVE; it is REPLAYING once its place is found, and only if no durable event was sent to it.

A lag ends when the outbox is empty and the history holds nothing more. If anything was skipped, a
gap is sent then, once. The connection's writer asks for what comes next from the history while
``is_fed``.
"""

from collections.abc import Mapping
from enum import Enum, auto
from typing import Final

from ..core.event_ids import Cursor, Stream


class Phase(Enum):
    """Where a connection stands between joining and live events."""

    __hash__ = object.__hash__  # Enum's own is in Python

    CONNECTING = auto()
    HELD = auto()
    REPLAYING = auto()
    LIVE = auto()
    LAGGING = auto()
    CLOSED = auto()


class Step(Enum):
    """What changes the phase of a connection, or its cursor."""

    __hash__ = object.__hash__

    JOIN = auto()  # the hub, and it has not said yet how it begins
    JOIN_RESUMING = auto()  # its handshake named the last event that it has
    ASK = auto()  # to resume, in its first message
    REPLAY = auto()  # its place was found, or what it missed is too much for one write
    CATCH_UP = auto()  # nothing is left to replay
    OWE = auto()  # a stream was read for the first time, and it is owed events of that
    LAG = auto()  # more waits in its outbox than the bound allows
    GAP = auto()  # events were lost, and what came before is over
    LEAVE = auto()  # the hub


TRANSITIONS: Final[Mapping[Phase, Mapping[Step, Phase]]] = {
    Phase.CONNECTING: {
        Step.JOIN: Phase.HELD,
        Step.JOIN_RESUMING: Phase.REPLAYING,
        Step.LEAVE: Phase.CLOSED,
    },
    Phase.HELD: {
        Step.ASK: Phase.REPLAYING,
        Step.REPLAY: Phase.REPLAYING,
        Step.CATCH_UP: Phase.LIVE,
        Step.OWE: Phase.HELD,
        Step.LAG: Phase.LAGGING,
        Step.GAP: Phase.HELD,
        Step.LEAVE: Phase.CLOSED,
    },
    Phase.REPLAYING: {
        Step.REPLAY: Phase.REPLAYING,
        Step.CATCH_UP: Phase.LIVE,
        Step.OWE: Phase.REPLAYING,
        Step.LAG: Phase.LAGGING,
        Step.GAP: Phase.REPLAYING,
        Step.LEAVE: Phase.CLOSED,
    },
    Phase.LIVE: {
        Step.ASK: Phase.LIVE,
        Step.REPLAY: Phase.REPLAYING,
        Step.OWE: Phase.REPLAYING,
        Step.LAG: Phase.LAGGING,
        Step.LEAVE: Phase.CLOSED,
    },
    Phase.LAGGING: {
        Step.REPLAY: Phase.LAGGING,
        Step.CATCH_UP: Phase.LIVE,
        Step.OWE: Phase.LAGGING,
        Step.LAG: Phase.LAGGING,
        Step.GAP: Phase.LAGGING,
        Step.LEAVE: Phase.CLOSED,
    },
    Phase.CLOSED: dict.fromkeys(Step, Phase.CLOSED),
}

# In which a connection has a cursor, and durable events reach it from the history.
FROM_HISTORY: Final = frozenset({Phase.HELD, Phase.REPLAYING, Phase.LAGGING})
_FED: Final = frozenset({Phase.REPLAYING, Phase.LAGGING})


class ResumeState:
    """The phase of one connection, and its places in the history.

    ``resume_from`` is the last event id that its handshake named, if any. ``accepted_at`` is the
    place from which on it misses nothing: where the history stood when its upgrade was accepted,
    or, if None, when it joins. ``begun_at`` is the place after the event that it resumed with, if
    it did; ``came_back_at`` is the place that it named then, if it did not ask for the present one.
    ``accepted_time`` is the moment of ``accepted_at`` on Trio's clock, if it is known.
    ``lagged_at`` is how many connections and lags there had been when its lag began;
    ``has_skipped`` says that an event was skipped in this lag. ``is_decided`` says that its
    first message, or its silence, was not a question to resume. ``is_sought`` says that the place
    after the event that it named is being looked for. ``older`` are the streams in which its
    cursor is before the history, in :mod:`.older_events`.
    """

    __slots__ = (
        "accepted_at",
        "accepted_time",
        "begun_at",
        "came_back_at",
        "cursor",
        "has_skipped",
        "is_decided",
        "is_sought",
        "lagged_at",
        "may_resume",
        "older",
        "phase",
        "resume_from",
    )  # fmt: skip

    def __init__(
        self,
        accepted_at: Cursor | None = None,
        resume_from: str | None = None,
        accepted_time: float | None = None,
    ) -> None:
        self.phase = Phase.CONNECTING
        self.cursor: Cursor | None = None
        self.accepted_at = accepted_at
        self.begun_at: Cursor | None = None
        self.came_back_at: Cursor | None = None
        self.accepted_time = accepted_time
        self.resume_from = resume_from
        self.may_resume = True
        self.is_sought = False
        self.has_skipped = False
        self.is_decided = False
        self.lagged_at = 0
        self.older: frozenset[Stream] = frozenset()

    def step(self, step: Step, cursor: Cursor | None = None) -> None:
        """Change the phase as :data:`TRANSITIONS` says; a cursor replaces the one it has.

        Raises :exc:`KeyError` if the step is impossible in this phase, which is a bug.
        """
        self.phase = TRANSITIONS[self.phase][step]
        if self.phase in FROM_HISTORY:
            self.cursor = self.cursor if cursor is None else cursor
            assert self.cursor is not None
        else:
            self.cursor = None
        if step is Step.GAP or self.cursor is None:
            self.older = frozenset()
        if self.phase is Phase.REPLAYING or self.phase is Phase.LAGGING or step is Step.ASK:
            self.may_resume = False

    @property
    def is_fed(self) -> bool:
        """Whether it is to be sent what the history holds for it, as fast as it takes it."""
        return self.phase in _FED and not self.is_sought

    def advance(self, places: Cursor) -> None:
        """It has everything up to these places, too."""
        assert self.cursor is not None
        self.cursor = {**self.cursor, **places}
