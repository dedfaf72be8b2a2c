"""Questions: what this process has asked others, until they have answered or it waits no longer."""

import bisect
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Final, TypeVar

import msgspec
import structlog
import trio

from ..broker.commands import Unavailable
from ..core.control_messages import Answer, read_control_message

log = structlog.get_logger()

T = TypeVar("T")

UNKNOWN: Final = "unknown"  # the error of a process that has no handler for this kind
# Seconds in which a process reads what came while it was paused, and what is late for it to call
# that a pause: its machine gave it no time. Answers that lie in its socket are not missing ones.
_AFTER_PAUSE: Final = 0.2
_PAUSED: Final = 0.1


@dataclass
class Answers:
    """What the live processes answered, as JSON by name, and which of them did not."""

    by_node: dict[str, msgspec.Raw] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    #: Those of the missing that said that they cannot answer such a question: another version, or
    #: a setting that they do not have.
    unknown: list[str] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        return not self.missing

    def decoded(self, kind: type[T]) -> Iterator[tuple[str, T]]:
        """The answers by the names of their processes.

        One that has another form, as another version may give it, counts as missing from then on.
        """
        for name, answer in self.by_node.items():
            try:
                found = read_control_message(answer, kind)
            except ValueError:
                log.warning("invalid answer", node=name)
                bisect.insort(self.missing, name)
                continue
            yield name, found


class Question:
    """A question that waits for its answers."""

    def __init__(self) -> None:
        self.expected: set[str] | None = None  # not known yet
        self.answers: dict[str, msgspec.Raw] = {}
        self.failed: set[str] = set()
        self.unknown: set[str] = set()
        self.settled = trio.Event()

    def settle(self) -> None:
        if self.expected is not None and self.expected <= self.answers.keys() | self.failed:
            self.settled.set()


class Questions:
    """The questions that wait for answers. ``is_listening`` says whether those can be received."""

    def __init__(self, is_listening: Callable[[], bool]) -> None:
        self._is_listening = is_listening
        self._heard = trio.lowlevel.ParkingLot()
        self.waiting: dict[str, Question] = {}  # by number

    async def ask(
        self,
        number: str,
        publish: Callable[[], Awaitable[set[str]]],
        timeout: float,
    ) -> Answers:
        """Publish a question or an order, and wait ``timeout`` seconds for the answers to it.

        ``publish`` returns who is expected to answer. It is called once answers can be received.
        Raises :exc:`Unavailable` if it has not returned in time, and what it raises.
        """
        question = self.waiting[number] = Question()
        try:
            with trio.move_on_after(timeout) as scope:
                while not self._is_listening():
                    await self._heard.park()
                question.expected = await publish()
                question.settle()
                await question.settled.wait()
            if question.expected is None:
                raise Unavailable("no answer in time")
            if trio.current_time() > scope.deadline + _PAUSED:
                with trio.move_on_after(_AFTER_PAUSE):
                    await question.settled.wait()
            missing = question.expected - question.answers.keys()
            found = {n: a for n, a in question.answers.items() if n in question.expected}
            return Answers(found, sorted(missing), sorted(missing & question.unknown))
        finally:
            del self.waiting[number]

    def ask_now(self) -> None:
        """Publish the questions that waited until answers can be received."""
        self._heard.unpark_all()

    def take(self, answer: Answer) -> None:
        """Note an answer that has come."""
        question = self.waiting.get(answer.id)
        if question is None:  # it came too late
            return
        if answer.error is None:
            question.answers[answer.node] = answer.answer
        else:
            question.failed.add(answer.node)
            if answer.error == UNKNOWN:
                question.unknown.add(answer.node)
        question.settle()

    def forget(self, name: str) -> None:
        """Expect no answer of a process that has stopped."""
        for question in self.waiting.values():
            if question.expected is not None:
                question.expected.discard(name)
                question.settle()
