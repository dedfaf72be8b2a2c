"""``why``: the path of an event."""

from collections.abc import Iterator
from datetime import datetime
from typing import TYPE_CHECKING, Final

import click

from ..core.printable import printable
from .errors import Failure, settings_or_exit
from .event_asking import EVENT_ID, ask_about
from .explain import audience_words
from .nodes import duration
from .rendering import steps_words, table_lines
from .service import print_report

if TYPE_CHECKING:
    from ..broker.receipt_store import ReceiptStore
    from ..core.event_path import EventPath, Known, PathClient
    from ..core.receipts import Place

_COLUMNS: Final = ("client", "sent", "written", "delivered", "seen", "must reach")


@click.command()
@EVENT_ID
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, as /ws/api/why does.")
def why(event_id: str, as_json: bool) -> None:
    """Print the path of an event: whom it was sent to, who has confirmed it, what follows.

    It reads Redis with the settings here: WS_ROUTES_FILE must be that of the gateways. The id of
    an EVENT_UNHEARD leads to the event that it is about. Exit status 1 if nothing is known of the
    event, or if a process did not answer.
    """
    from ..broker.commands import Unavailable
    from ..broker.event_lookup import look_up
    from ..core.event_path import trace
    from ..core.path_words import tell, why_unknown

    settings = settings_or_exit()

    async def look(store: "ReceiptStore", place: "Place") -> "Known":
        try:
            return await look_up(store, place)
        except Unavailable as error:
            if settings.routes.tracked_types or not error.refusal:
                raise
            return await look_up(store, place, has_receipts=False)  # the right is not needed

    _, known, missing = ask_about(settings, event_id, look, lambda known: known.about is not None)
    if known.about is None:
        raise Failure(f"nothing is known of this event: {why_unknown(known)}")
    path = trace(known, settings.routes, settings.ws_receipt_ttl, missing)
    print_report(tell(path, known, settings.routes, settings.ws_receipt_ttl), _show, as_json)


def _show(path: "EventPath") -> None:
    for line in path_lines(path):
        click.echo(printable(line))


def path_lines(path: "EventPath") -> Iterator[str]:
    """The path of an event, for people."""
    from ..core.path_words import seconds

    at = datetime.fromtimestamp(path.at).astimezone()
    heads = {
        "entered": [f"{at:%Y-%m-%d %H:%M:%S.%f}"[:-3] + f", {duration(path.now)} ago"],
        "goes to": map(audience_words, path.audiences),
        "must reach": filter(None, [steps_words((step.to, step.within) for step in path.steps)]),
    }
    yield f"{path.type}  {path.event_id}"
    for label, texts in heads.items():
        for number, text in enumerate(texts):
            yield f"  {'' if number else label:<11} {text}"
    yield ""
    yield from path.summary
    yield ""
    for moment in path.timeline:
        text = f"({moment.text})" if moment.lies_ahead else moment.text
        yield f"{seconds(moment.after):>8}  {text}"
    if path.clients:
        yield ""
        yield from table_lines(_COLUMNS, map(_row, path.clients))


def _row(client: "PathClient") -> tuple[str, ...]:
    from ..core.path_words import seconds

    times = (client.sent, client.written, client.delivered, client.seen)
    return (
        client.name,
        *("-" if time is None else seconds(time) for time in times),
        ", ".join(client.must_reach) or "-",
    )
