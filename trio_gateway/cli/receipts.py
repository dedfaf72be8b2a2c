"""``receipts``: who has received an event."""

from time import time
from typing import TYPE_CHECKING

import click

from ..core.printable import printable
from .errors import Failure, settings_or_exit
from .event_asking import EVENT_ID, ask_about
from .rendering import print_table
from .service import print_report

if TYPE_CHECKING:
    from ..core.receipt_report import ReceiptsReply


@click.command()
@EVENT_ID
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def receipts(event_id: str, as_json: bool) -> None:
    """List who has received an event, of the types that have receipt = true.

    Exit status 1 if no receipts are known of it, or if a process did not answer.
    """
    from ..broker.receipt_store import ReceiptStore
    from ..core.receipt_report import describe_receipts, is_kept

    settings = settings_or_exit()
    routes, ttl = settings.routes, settings.ws_receipt_ttl
    place, found, missing = ask_about(
        settings, event_id, ReceiptStore.read, lambda found: found is not None
    )
    if found is None or not (found.by or is_kept(found.event, routes, ttl, time())):
        raise Failure(f"no receipts are known of this event: see trio-gateway why {event_id}")
    reply = describe_receipts(place, found, routes, missing)
    print_report(reply, _show, as_json)


def _show(reply: "ReceiptsReply") -> None:
    from ..core.path_words import seconds

    click.echo(
        f"{printable(reply.type)}: written to {reply.written}, delivered to {reply.delivered},"
        f" seen by {reply.seen}"
    )
    for step in reply.steps:
        click.echo(f"sent to {step.to} after {seconds(step.at - reply.at)}")
    if reply.by:
        click.echo()
        print_table(
            ("endpoint", "user", "session", "state", "after"),
            [
                (
                    each.endpoint,
                    each.user_id or "-",
                    str(each.session_id or "-"),
                    each.state,
                    "-" if each.at is None else seconds(max(0.0, each.at - reply.at)),
                )
                for each in reply.by
            ],
        )
