"""A connection: one client's reader, its writer when it is slow, and its one ending."""

from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any, Final, Protocol

import structlog
import trio

from ..core.audiences import Audience, Principal
from ..core.close_codes import Close
from ..core.delivery_times import Owed
from ..core.event_ids import Cursor, Stream
from ..core.frames import PING_FRAME, PONG, frame, text_frame
from ..core.limits import RateLimit
from ..core.messages import PONG as PONG_TEXT
from ..core.messages import Command, Confirm, Message, Resume, Seen, read_message
from .deadlines import Deadlines
from .liveness import ConnectionLimits as ConnectionLimits
from .liveness import Liveness
from .outbox import Outbox
from .resume_state import Phase, ResumeState
from .side_tasks import SideTasks
from .socket import Disconnected, Ping, Pong, ProtocolViolation, Socket
from .tracked import Forgotten, Sent
from .writer import Writer

log = structlog.get_logger()

_PONG_TEXT = text_frame(PONG_TEXT)
OUTBOX_FULL: Final = "too slow: outbox is full"
_OVERHEAD: Final = 64  # bytes of memory for a message in the outbox, besides its own
DRAIN_TIMEOUT: Final = 2.0  # seconds for what waits in the outbox when a connection ends


Handler = Callable[["Connection", Message], Awaitable[None]]


async def ignore(_connection: "Connection", _message: Message) -> None:
    """A handler that does nothing."""
    await trio.lowlevel.checkpoint()


class Membership(Protocol):
    """What a connection needs of the hub."""

    def join(self, connection: "Connection") -> None:
        """Deliver events to it from now on."""

    def leave(self, connection: "Connection") -> None:
        """Deliver nothing to it any more; its close has yet to go through."""

    def finish(self, connection: "Connection") -> None:
        """Its close has gone through."""


class Resuming(Protocol):
    """What a connection needs of the history: to begin where an earlier one ended, and to lag."""

    async def feed(self, connection: "Connection") -> None:
        """It has taken all that it was sent, and is fed from the history: send what comes next."""

    def hold(self, connection: "Connection", now: float) -> None:
        """It has just joined: hold back durable events until it is decided how it begins."""

    def go_live(self, connection: "Connection") -> None:
        """It does not ask to resume: send it what came since it joined, then live events."""

    def ask(self, connection: "Connection", wish: Resume) -> None:
        """It asks in a message to resume after an event."""

    def lag(self, connection: "Connection") -> None:
        """Its outbox is over its bound: send it durable events from the history from now on."""


class Confirming(Protocol):
    """What a connection needs of the receipts."""

    def confirm(self, connection: "Connection", event_id: str) -> None:
        """The client says that it has everything up to this event."""

    def see(self, connection: "Connection", event_id: str) -> None:
        """The client's application confirms this event."""

    def taken(self, connection: "Connection") -> None:
        """The kernel has taken all that waited for the client."""


class Connection:
    """One client that was let in.

    ``answer`` is called with the messages that need more than the connection knows.
    ``expires_at`` is the end of the credential, on Trio's clock. ``replays`` lets it begin where
    an earlier connection left off, with the places that :class:`ResumeState` describes.
    ``receipts`` is told what it confirms. ``deadlines`` close it in time if its socket is plain;
    otherwise, and without them, it has a cancel scope for that. ``supports_deflate`` says that the
    client can read compressed messages.

    A client that reads slowly lags, see :mod:`.resume_state`; without ``replays`` it is closed.
    """

    __slots__ = (
        "__weakref__",
        "_answer",
        "_answering",
        "_code",
        "_deadlines",
        "_limits",
        "_liveness",
        "_nursery",
        "_outbox",
        "_postponed",
        "_rate",
        "_reading",
        "_receipts",
        "_replays",
        "_side_tasks",
        "_socket",
        "_unread",
        "_writer",
        "acks",
        "audiences",
        "chose_its_code",
        "close_reason",
        "confirmed",
        "confirmed_id",
        "ended_at",
        "events_sent",
        "forgotten",
        "joined_at",
        "mask",
        "messages",
        "number",
        "principal",
        "resume_state",
        "sent_at",
        "supports_deflate",
        "timer",
        "unconfirmed",
    )  # fmt: skip

    def __init__(
        self,
        principal: Principal,
        terms: ConnectionLimits,
        answer: Handler = ignore,
        expires_at: float = float("inf"),
        *,
        replays: Resuming | None = None,
        receipts: Confirming | None = None,
        deadlines: Deadlines | None = None,
        resume_from: str | None = None,
        accepted_at: Cursor | None = None,
        accepted_time: float | None = None,
        supports_deflate: bool = False,
    ) -> None:
        self.principal = principal
        self.audiences: frozenset[Audience] = frozenset()
        self.messages = self.acks = 0
        self.events_sent = 0
        self.confirmed_id: str | None = None  # the last event id that it named, or was named
        self.unconfirmed: deque[Sent] | None = None  # made with the first tracked event
        self.forgotten: dict[Stream, Forgotten] | None = None  # of the unconfirmed ones
        self.confirmed: deque[Sent] | None = None  # the last ones
        self.joined_at = self.sent_at = 0.0
        self.close_reason = ""
        self.chose_its_code = False  # the client did, and may have sent any
        self.ended_at: float | None = None
        self.supports_deflate = supports_deflate
        self.number = 0  # the hub's, from 1 in the order of joining
        self.mask = 0  # the hub's, while it looks for who hears a batch
        self.resume_state = ResumeState(accepted_at, resume_from, accepted_time)
        self._replays = replays
        self._receipts = receipts
        self._deadlines = deadlines
        self.timer = 0  # of deadlines, while they watch it
        self._answer = answer
        self._limits = terms
        self._liveness = Liveness(terms, expires_at)
        self._rate: RateLimit | None = None  # made with the first message
        self._code: int | None = None
        self._socket: Socket | None = None
        self._outbox: Outbox | None = None  # while the client is slow
        self._nursery: trio.Nursery | None = None
        self._reading: trio.CancelScope | None = None
        self._answering = False  # a message, and not reading meanwhile
        self._postponed: Message | None = None  # to be answered when it is read on
        self._unread = 0  # bytes of answers that wait behind others in the outbox, about
        self._side_tasks: SideTasks | None = None
        self._writer: Writer | None = None  # while anything waits for the client to take it

    @property
    def code(self) -> int:
        """The close code: the one that the client sent, or that it was sent."""
        return int(Close.ABNORMAL) if self._code is None else self._code

    @property
    def ending(self) -> bool:
        return self._code is not None

    @property
    def rate_limited(self) -> bool:
        """Whether it has sent a message yet, so that its rate is tracked."""
        return self._rate is not None

    @property
    def waiting_bytes(self) -> int:
        return 0 if self._outbox is None else self._outbox.bytes

    @property
    def waiting_frames(self) -> int:
        return 0 if self._outbox is None else self._outbox.frames

    async def run(self, socket: Socket, hub: Membership) -> None:
        """Serve the client until it leaves or is closed; returns when the close is through.

        Its place in the hub is given up at once, before a slow close is waited for.
        """
        self._socket = socket
        self._nursery = trio.lowlevel.current_task().parent_nursery  # for side tasks
        now = trio.current_time()
        self.joined_at = self.sent_at = now
        self._liveness.heard_at = self._liveness.received_at = now
        hub.join(self)
        try:
            try:
                try:
                    if self._replays is not None:  # in one step with its joining the hub
                        self._replays.hold(self, now)
                    await self._read(socket)
                except Exception:
                    self.close(Close.INTERNAL_ERROR, "internal error")
                    raise
                finally:
                    self.close(Close.ABNORMAL)  # it was cancelled, unless it is ending already
                    hub.leave(self)
                    if self._side_tasks is not None:
                        await self._end(self._side_tasks)
            finally:
                await self._finish(socket)
        finally:
            socket.abort()
            hub.finish(self)
        side_tasks, self._side_tasks = self._side_tasks, None  # it refers to this connection, too
        if side_tasks is not None and side_tasks.bug is not None:
            raise side_tasks.bug

    def write(self, data: bytes, frames: int, now: float) -> bool:
        """Send joined frames. Never waits: what the kernel does not accept goes to the outbox.

        If that is more than the bounds allow then, the connection lags. Returns whether anything
        waits in the outbox now.
        """
        if self._code is not None or self._socket is None:
            return False
        self.sent_at = now
        self.events_sent += frames
        outbox = self._outbox
        if outbox is None or not outbox.bytes:
            try:
                written = self._socket.try_write(data)
            except OSError:
                self.close(Close.ABNORMAL)
                return False
            if written == len(data):
                return False
            if outbox is None:
                limits = self._limits
                outbox = self._outbox = Outbox(limits.outbox_bytes, limits.outbox_messages)
            outbox.began_at = now
            overflowed = outbox.put(data, frames, written)
        else:
            overflowed = outbox.put(data, frames)
        self.start_writing()
        if overflowed:
            if self._replays is None:
                self.close(Close.SLOW_CONSUMER, OUTBOX_FULL)
            else:
                self._replays.lag(self)
        return True

    def owe(self, owed: Owed) -> None:
        """These events wait in its outbox, behind all others: tell when its client takes them."""
        if self._outbox is not None:
            self._outbox.owe(owed)

    def fills_fast(self, now: float) -> bool:
        """Whether its outbox is half full or more, because of a burst."""
        return self._outbox is not None and self._outbox.fills_fast(now)

    @property
    def taken(self) -> int:
        """How many bytes its client has taken, from whenever; less exact if the kernel does not
        tell.
        """
        acknowledged = 0 if self._socket is None else self._socket.traffic()[0]
        return acknowledged or -self.waiting_bytes

    @property
    def is_behind(self) -> bool:
        """Whether it is open, and anything waits for it in the outbox, or in a lag."""
        lags = self.resume_state.phase is Phase.LAGGING
        return self._code is None and (lags or self.waiting_bytes > 0)

    def write_stored(self, data: bytes, frames: Sequence[bytes], now: float) -> int:
        """Send frames of the history; ``data`` are the frames joined. Call it when nothing waits.

        Returns how many of them are on their way. If the kernel does not accept all, the others
        are not: the client is to be fed them when it has taken these.
        """
        if self._code is not None or self._socket is None:
            return 0
        self.sent_at = now
        self.events_sent += len(frames)
        try:
            written = self._socket.try_write(data)
        except OSError:
            self.close(Close.ABNORMAL)
            return 0
        if written == len(data):
            return len(frames)
        outbox = self._outbox = Outbox(self._limits.outbox_bytes, self._limits.outbox_messages)
        self.start_writing()
        if not self._socket.is_plain:  # it sends them one by one, or has no room to speak of
            outbox.put(data, len(frames), written)
            return len(frames)
        begun = 0
        while written >= len(frames[begun]):
            written -= len(frames[begun])
            begun += 1
        outbox.put(frames[begun], 1, written)  # not copied: the history and others share it
        return begun + 1

    def send(self, text: bytes) -> None:
        """Send one text message that is not an event."""
        self._answer_with(text_frame(text), trio.current_time())

    def _answer_with(self, data: bytes, now: float) -> None:
        """Send one frame that is not an event. As many bytes of these may wait as of events."""
        waits = self.waiting_bytes > 0
        self.write(data, 1, now)
        self.events_sent -= 1
        if waits and self._code is None:
            self._unread += len(data) + _OVERHEAD
            if self._unread > self._limits.outbox_bytes:
                self.close(Close.SLOW_CONSUMER, OUTBOX_FULL)

    def start_task(self, task: Callable[..., Awaitable[None]], *arguments: Any) -> None:
        """Run a task next to the reader, until it is done or the connection ends."""
        if self._nursery is not None and self._code is None:
            self._beside(self._nursery).start(partial(task, *arguments))

    def start_writing(self) -> None:
        """Start the writer task, unless it runs."""
        if self._writer is None and self._nursery is not None:
            assert self._socket is not None
            self._writer = Writer(self._socket, self._limits.write_timeout)
            self._beside(self._nursery).start_unscoped(self._write_out)

    def _beside(self, nursery: trio.Nursery) -> SideTasks:
        if self._side_tasks is None:
            on_bug = partial(self.close, Close.INTERNAL_ERROR, "internal error")
            self._side_tasks = SideTasks(nursery, on_bug)
        return self._side_tasks

    def ping(self, now: float) -> None:
        self._answer_with(PING_FRAME, now)

    def ask(self, now: float) -> None:
        """Ping the client to see whether it is alive, see :attr:`is_there`."""
        assert self._socket is not None
        self.ping(now)
        self._liveness.ask(self._socket, self.waiting_bytes)

    @property
    def is_there(self) -> bool:
        """Whether the client has shown since :meth:`ask` that it is there."""
        if self.ending or self._socket is None:
            return False
        return self._answering or self._liveness.is_there(self._socket, self.waiting_bytes)

    @property
    def received_at(self) -> float:
        """When anything was received last, a pong included."""
        return self._liveness.received_at

    def close(self, code: int, reason: str = "") -> None:
        """End the connection; the first reason wins. Returns at once."""
        if self._code is not None:
            return
        self._code, self.close_reason = int(code), reason
        self.ended_at = trio.current_time()
        if self._reading is not None:
            self._reading.cancel()
        elif self.timer:
            assert self._socket is not None
            self._socket.interrupt()

    def abort(self) -> None:
        """End the connection without a close that the client could see. Returns at once."""
        self.close(Close.ABNORMAL)
        if self._socket is not None:
            self._socket.abort()
        self._stop_side_tasks()

    def renew(self, expires_at: float) -> None:
        """Set another end of the credential, on Trio's clock."""
        self._liveness.expires_at = expires_at
        self._set_deadline()

    async def _read(self, socket: Socket) -> None:
        """Read until the connection ends."""
        if self._deadlines is None or not socket.is_plain:
            await self._read_in_scope(socket)
            return
        self._deadlines.watch(self)
        try:
            while self._code is None:
                await self._hear(await socket.receive())
        except Disconnected as left:
            self.timer = 0  # nobody is to be interrupted
            self.chose_its_code = self._code is None
            self.close(left.code, left.reason)
        except ProtocolViolation as violation:
            self.close(violation.close, violation.reason)
        finally:
            self.timer = 0

    async def _read_in_scope(self, socket: Socket) -> None:
        """Read until the connection ends, with a cancel scope for its deadline."""
        while self._code is None:  # again if a message came since the deadline was set
            with trio.CancelScope(deadline=self.deadline) as self._reading:
                try:
                    if (message := self._postponed) is not None:
                        self._postponed = None
                        await self._answer_slowly(message)
                    while self._postponed is None:
                        await self._hear(await socket.receive())
                except Disconnected as left:
                    self.chose_its_code = self._code is None
                    self.close(left.code, left.reason)
                except ProtocolViolation as violation:
                    self.close(violation.close, violation.reason)
            self.close_on_time(trio.current_time())

    async def _hear(self, said: str | Ping | Pong) -> None:
        now = trio.current_time()
        if self._liveness.receive(said, now):
            return
        message = read_message(said) if isinstance(said, str) else None
        if not (isinstance(message, Confirm) and self._is_free_ack(message)):
            if self._rate is None:
                self._rate = RateLimit(self._limits.rate_limit, self._limits.rate_window)
            if self._rate.exceeded(now):
                raise ProtocolViolation(Close.RATE_LIMITED, "too many messages")
        if isinstance(said, Pong):
            return
        self._liveness.heard_at = now
        if isinstance(said, Ping):
            self._answer_with(frame(PONG, said.payload), now)
            return
        assert message is not None
        self.messages += 1
        if self.resume_state.phase is Phase.HELD and not isinstance(message, Resume):
            assert self._replays is not None
            self._replays.go_live(self)
        match message:
            case Command.PING:
                self._answer_with(_PONG_TEXT, now)
            case Command.UNKNOWN:
                pass
            case Confirm(last_event_id, is_ping):
                if self._receipts is not None:
                    self._receipts.confirm(self, last_event_id)
                if is_ping:
                    self._answer_with(_PONG_TEXT, now)
            case Seen(event_id):
                if self._receipts is not None:
                    self._receipts.see(self, event_id)
            case Resume() if self._replays is not None:
                self._replays.ask(self, message)
            case _ if self.timer:
                with trio.CancelScope() as self._reading:
                    await self._answer_slowly(message)
                self._reading = None
            case _:
                self._set_deadline()  # the one that was set may be over before the answer is
                assert self._reading is not None
                if self._reading.cancel_called:  # it is read on in another scope
                    self._postponed = message
                else:
                    await self._answer_slowly(message)

    def _is_free_ack(self, message: Confirm) -> bool:
        """Whether it does not count as a message: there are no more acks than events sent."""
        if message.is_ping:
            return False
        self.acks += 1
        return self.acks <= self.events_sent

    async def _answer_slowly(self, message: Message) -> None:
        self._answering = True
        await self._answer(self, message)
        self._answering = False

    @property
    def deadline(self) -> float:
        """When it is closed if nothing more is received."""
        return self._liveness.deadline

    def _set_deadline(self) -> None:
        # A deadline that moves back is not set each time a client says something: when the old one
        # is over, the reader looks again. This one may be sooner.
        if self.timer:
            assert self._deadlines is not None
            self._deadlines.watch(self)
        elif self._reading is not None:
            self._reading.deadline = self.deadline

    def close_on_time(self, now: float) -> None:
        """Close it if a deadline has passed, with the code for that one."""
        if (overdue := self._liveness.overdue(now)) is not None:
            self.close(*overdue)

    async def _write_out(self) -> None:
        """The writer task: lives while something waits for the client to take it, in the outbox or
        in the history.
        """
        writer = self._writer
        assert writer is not None
        try:
            while not writer.is_stopped:
                if self._outbox is not None and self._outbox.bytes:
                    try:
                        await writer.write_some(self._outbox)
                        self._outbox.settle(trio.current_time())
                    except OSError as error:
                        if isinstance(error, TimeoutError):
                            self.close(Close.SLOW_CONSUMER, "too slow: no byte accepted")
                        self.abort()
                    continue
                self._outbox = None
                self._unread = 0
                if self.unconfirmed and self._receipts is not None:
                    self._receipts.taken(self)
                if self._code is not None or not self.resume_state.is_fed:
                    break
                assert self._replays is not None
                await writer.run(partial(self._replays.feed, self))
        finally:
            self._writer = None

    async def _end(self, side_tasks: SideTasks) -> None:
        """End the side tasks; the writer may first write what waits."""
        side_tasks.cancel()
        try:
            with trio.move_on_after(self._last_write_timeout()):
                await side_tasks.wait()
        finally:
            self._stop_side_tasks()
            with trio.CancelScope(shield=True):
                await side_tasks.wait()

    def _stop_side_tasks(self) -> None:
        if self._side_tasks is not None:
            self._side_tasks.cancel()
        if self._writer is not None:
            self._writer.stop()

    def _last_write_timeout(self) -> float:
        """Return the seconds for what the outbox holds at the end; nothing is added any more."""
        if self.code != Close.SLOW_CONSUMER:
            return DRAIN_TIMEOUT
        if self._outbox is not None:
            self._outbox.discard()
        return self._limits.write_timeout

    async def _finish(self, socket: Socket) -> None:
        """Send the close frame, unless a frame is partly written: then nothing can follow it."""
        assert self._code is not None
        if self._outbox is not None and self._outbox.partial:
            return
        with trio.CancelScope(shield=True):  # bounded by the socket
            await socket.close(self._code, self.close_reason)
