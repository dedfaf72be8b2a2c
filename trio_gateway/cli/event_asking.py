"""What the receipts in Redis say of an event, for commands: with the gateways' settings."""

from collections.abc import Awaitable, Callable, Iterable
from typing import TYPE_CHECKING, TypeVar

import click

from .errors import MISUSED, Failure
from .service import ask_redis, ask_service, asked, tell_missing

if TYPE_CHECKING:
    from ..broker.commands import Commands
    from ..broker.receipt_store import ReceiptStore
    from ..cluster.observing import Service
    from ..cluster.questions import Answers
    from ..core.event_ids import Stream
    from ..core.receipts import Place
    from ..settings import Settings

T = TypeVar("T")

EVENT_ID = click.argument("event_id", metavar="EVENT_ID")


def ask_about(
    settings: "Settings",
    event_id: str,
    look: "Callable[[ReceiptStore, Place], Awaitable[T]]",
    is_known: Callable[[T], bool],
) -> "tuple[Place, T, list[str]]":
    """The place of an event, what ``look`` finds of it, and which processes did not write their
    receipts before. Those are asked only if they know each other.

    The id may be that of the entry in Redis, too: then each stream is looked at. Raises
    :exc:`Failure` if it is not an id, or if it is of no stream of the gateway.
    """
    from ..broker.receipt_store import ReceiptStore
    from ..core.control_messages import FlushReceipts
    from ..core.event_ids import tag
    from ..core.path_words import UNKNOWN_STREAM

    names = {tag(name): name for name in settings.sharding.names}
    places = _places_of(event_id, names)
    if not all(place.stream in names for place in places):
        raise Failure(f"nothing is known of this event: {UNKNOWN_STREAM}")

    async def find(commands: "Commands") -> "tuple[Place, T]":
        store = ReceiptStore(commands, names)
        for place in places:
            if is_known(found := await look(store, place)):
                break
        return place, found

    async def flush_and_find(service: "Service") -> "tuple[Answers, tuple[Place, T]]":
        answers = await service.control.ask("flush_receipts", FlushReceipts())
        return answers, await find(service.registry.commands)

    if not settings.has_cluster:  # nobody can ask the processes
        return *ask_redis(settings, find), []
    answers, found = ask_service(settings, flush_and_find)
    tell_missing(answers.missing, asked(answers))
    return *found, answers.missing


def _places_of(text: str, streams: "Iterable[Stream]") -> "list[Place]":
    from ..core.event_ids import read_position
    from ..core.receipts import Place, read_place

    if (place := read_place(text)) is not None:
        return [place]
    try:
        position = read_position(text)
    except ValueError:
        raise Failure(
            "EVENT_ID must be the event_id that clients get with an event, such as"
            " 1790000000000-0-4723, or the id of the entry in Redis, 1790000000000-0",
            MISUSED,
        ) from None
    return [Place(stream, position) for stream in streams]
