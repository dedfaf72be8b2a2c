"""Control: one process asks all, or gives all an order.

A question and its answers are messages on Pub/Sub. An order is kept for an hour in a stream, too,
so that a process that does not answer carries it out when it runs again.
"""

import secrets
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Any, Final, NoReturn, Protocol

import msgspec
import structlog
import trio

from ..broker.commands import Commands, Unavailable
from ..core.control_messages import (
    Answer,
    Ask,
    Hello,
    Left,
    Node,
    Ordered,
    read_control_message,
)
from ..core.control_messages import Control as Message
from ..runtime.throttled_log import ThrottledLog
from .keys import Keys
from .liveness import NAMES, RETURN_NAMES, is_list_of
from .orders import Order, Orders
from .questions import UNKNOWN, Answers, Questions

log = structlog.get_logger()

PATIENCE: Final = 1.8  # seconds, so that who asks over HTTP has an answer within 2
MOST_HANDLED: Final = 100  # questions at a time
_MOST_BYTES: Final = 8 << 20  # of an answer: Redis ends a subscriber for which 32 MiB wait
_HANDLER_TIMEOUT: Final = 10.0  # seconds
_STILL_ASKED: Final = 10.0  # seconds after which nobody waits for the answer to an order

_ASK: Final = NAMES + "redis.call('PUBLISH', ARGV[1], ARGV[2])\n" + RETURN_NAMES
_TELL: Final = "return redis.call('PUBLISH', ARGV[1], ARGV[2])"

Handler = Callable[[Any], Awaitable[Any]]
OrderHandler = Callable[[Any, float], Awaitable[Any]]


class Members(Protocol):
    """The registry, as control needs it."""

    @property
    def name(self) -> str:
        """That of this process, or of the program that asks."""

    @property
    def nodes(self) -> Mapping[str, Node]:
        """The live processes that are known to be expected."""

    @property
    def on_forgotten(self) -> list[Callable[[], None]]:
        """Functions that are called when Redis may have lost orders."""

    def forget(self, name: str) -> None:
        """A process has stopped."""


class Control:
    """Asks the processes of this service, and answers them.

    ``is_listening`` says whether answers can be received. Handlers are registered before it runs;
    one that raises is logged, and its process counts as missing.
    """

    def __init__(
        self,
        commands: Commands,
        keys: Keys,
        registry: Members,
        is_listening: Callable[[], bool],
    ) -> None:
        self._commands = commands
        self._keys = keys
        self._registry = registry
        self._handlers: dict[str, tuple[type, Handler]] = {"hello": (Hello, _say_nothing)}
        self._order_handlers: dict[str, tuple[type, OrderHandler]] = {}
        self._questions = Questions(is_listening)
        self._orders = Orders(commands, keys)
        self._nursery: trio.Nursery | None = None
        self._handled = 0  # questions, now
        self._throttled_log = ThrottledLog(log)
        self.refused = 0
        registry.on_forgotten.append(self._orders.read_again)

    def handle(self, kind: str, request: type[msgspec.Struct], handler: Handler) -> None:
        """Answer the questions of this kind with what ``handler`` returns."""
        self._handlers[kind] = request, handler

    def handle_order(self, kind: str, request: type[msgspec.Struct], handler: OrderHandler) -> None:
        """Carry out the orders of this kind.

        ``handler`` is also told when the order was given, on Trio's clock: it concerns only
        connections that had joined by then.
        """
        self._order_handlers[kind] = request, handler

    async def ask(
        self,
        kind: str,
        request: msgspec.Struct,
        *,
        timeout: float = PATIENCE,
        only: str | None = None,
    ) -> Answers:
        """Ask all live processes, this one included, and wait for their answers, in seconds.

        ``only`` asks the process of this name alone. Raises :exc:`Unavailable` if Redis is.
        """
        ask = Ask(
            secrets.token_hex(8),
            self._registry.name,
            kind,
            msgspec.Raw(msgspec.json.encode(request)),
        )
        message = msgspec.json.encode(ask)

        async def publish() -> set[str]:
            names, doubtful = await self._commands.evaluate(
                _ASK,
                [self._keys.nodes, self._keys.gap],
                [self._keys.control, message],
                fits=is_list_of(2),
            )
            self._accept(ask)
            return self._alive(names, doubtful)

        async def publish_to(name: str) -> set[str]:
            if name == self._registry.name:
                self._accept(ask)
            else:
                await self._tell(self._keys.replies(name), message)
            return {name}

        how = publish if only is None else partial(publish_to, only)
        return await self._questions.ask(ask.id, how, timeout)

    async def order(
        self, kind: str, request: msgspec.Struct, *, timeout: float = PATIENCE
    ) -> Answers:
        """As :meth:`ask`, and a process that is missing carries it out when it runs again.

        Raises :exc:`Unavailable` if Redis is; then the order may still have been given.
        """
        order = Order(secrets.token_hex(8), self._registry.name, kind, msgspec.json.encode(request))

        async def give() -> set[str]:
            names, doubtful = await self._orders.give(order)
            self._orders.wake()
            return self._alive(names, doubtful)

        return await self._questions.ask(order.id, give, timeout)

    def _alive(self, names: list[bytes], doubtful: bool) -> set[str]:
        alive, known = {name.decode() for name in names}, self._registry.nodes.keys()
        if doubtful:  # a beat is on its way to a Redis that has lost its data
            return alive | known
        return alive | (known & {self._registry.name})  # which answers also before its first beat

    async def _tell(self, channel: str, message: bytes) -> None:
        # Told twice, if the connection is lost meanwhile, a message says no more than told once.
        await self._commands.evaluate(_TELL, [self._keys.nodes], [channel, message])

    def receive(self, payload: bytes) -> None:
        """Handle a message on the channel of all, or on that of this process."""
        try:
            message: Message = read_control_message(payload, Message)  # type: ignore[arg-type]
        except ValueError:
            self._throttled_log.warning("invalid control message")
            return
        match message:
            case Ask():
                if message.asker != self._registry.name:
                    self._accept(message)
            case Answer():
                self._questions.take(message)
            case Ordered():
                self._orders.wake(message.order)
            case Left():
                self._registry.forget(message.node)
                self._questions.forget(message.node)

    def on_subscribed(self) -> None:
        """Look for orders: messages about them may have been lost."""
        self._questions.ask_now()
        self._orders.wake()

    async def run(self) -> NoReturn:
        """Answer questions and carry out orders; returns only when cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            try:
                await self._orders.run(self._carry_out)
            finally:
                self._nursery = None
        raise AssertionError("orders are carried out for ever")

    def _accept(self, ask: Ask) -> None:
        """Answer a question in a task of its own, unless too many are being answered."""
        if self._nursery is None:  # it does not run: it is missing
            return
        if self._handled >= MOST_HANDLED:
            self.refused += 1
            self._throttled_log.warning("control message refused: too many", kind=ask.kind)
            return
        self._handled += 1
        self._nursery.start_soon(self._answer, ask)

    async def _answer(self, ask: Ask) -> None:
        try:
            await self._reply(ask.asker, await self._answer_to(ask.id, ask.kind, ask.request))
        finally:
            self._handled -= 1

    async def _answer_to(self, number: str, kind: str, request: msgspec.Raw) -> Answer:
        known = self._handlers.get(kind)
        if known is None:
            return Answer(number, self._registry.name, error=UNKNOWN)
        return await self._call(number, kind, request, *known)

    async def _carry_out(self, order: Order, given_at: float) -> None:
        known = self._order_handlers.get(order.kind)
        if known is None:
            answer = Answer(order.id, self._registry.name, error=UNKNOWN)
        else:
            kind, handler = known

            async def handle(request: Any) -> Any:
                return await handler(request, given_at)

            answer = await self._call(
                order.id, order.kind, msgspec.Raw(order.request), kind, handle
            )
        if trio.current_time() < given_at + _STILL_ASKED:
            await self._reply(order.giver, answer)

    async def _call(
        self, number: str, kind: str, request: msgspec.Raw, type_: type, handler: Handler
    ) -> Answer:
        name = self._registry.name
        try:
            with trio.fail_after(_HANDLER_TIMEOUT):
                found = await handler(read_control_message(bytes(request), type_))
            encoded = msgspec.json.encode(found)
            if len(encoded) > _MOST_BYTES:
                raise ValueError("the answer is too long")
            return Answer(number, name, msgspec.Raw(encoded))
        except Exception:
            self._throttled_log.exception("control message failed", kind=kind)
            return Answer(number, name, error="failed")

    async def _reply(self, asker: str, answer: Answer) -> None:
        if asker == self._registry.name:
            self._questions.take(answer)
            return
        try:
            await self._tell(self._keys.replies(asker), msgspec.json.encode(answer))
        except Unavailable as error:
            self._throttled_log.warning("control message not answered", error=str(error))


async def _say_nothing(_hello: Hello) -> None:
    pass
