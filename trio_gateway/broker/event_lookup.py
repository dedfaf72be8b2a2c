"""Looking up an event by its id; the id may be that of an event that tells of another one."""

from dataclasses import replace
from typing import Final

import msgspec

from ..core.event_path import Known
from ..core.events import Event
from ..core.receipts import Place, read_place
from ..core.routing import UNHEARD
from .receipt_store import ReceiptStore


class _Entity(msgspec.Struct):
    event_id: str


class _Report(msgspec.Struct):
    entity: _Entity


_read_report: Final = msgspec.json.Decoder(_Report).decode


async def look_up(store: ReceiptStore, place: Place, *, has_receipts: bool = True) -> Known:
    """What Redis knows of the event at a place; without ``has_receipts``, of its entry alone.

    If that is an escalation or a report of an event (:mod:`..core.escalation`), it is about the
    original, as long as something is known of it. Raises as :meth:`ReceiptStore.look_up`.
    """
    look = store.look_up if has_receipts else store.look_up_entry
    known = await look(place)
    if (event := known.event) is None or (original := _original(event)) is None:
        return known
    try:
        found = await look(original)
    except KeyError:
        return known
    about = found.about
    # Anybody may publish such an event: it leads nobody to those of another tenant or branch.
    if about is None or (about.tenant_id, about.branch_id) != (event.tenant, event.branch):
        return known
    return replace(found, asked=event)


def _original(event: Event) -> Place | None:
    """The place of the event that this one tells of, if it does."""
    if event.escalation is not None:
        return read_place(event.escalation.event_id)
    if event.type != UNHEARD:
        return None
    try:
        return read_place(_read_report(event.payload).entity.event_id)
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        return None
