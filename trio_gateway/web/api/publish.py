"""``POST /ws/api/publish``: check events, publish those that are valid, and answer for each."""

from collections.abc import Sequence
from typing import Annotated, Final

import msgspec
import trio
from quart import Response, request

from ...broker.publications import Confirm, Problem, Publication
from ...core.api_keys import ApiKey
from ...core.decimals import is_decimal
from ...core.event_ids import event_id, read_position, tag
from ...core.events import Event, InvalidEvent, parse_event, tenant_of
from ...core.routing import channel_for
from ...core.shards import STREAM_LENGTH
from ...parts import Api, Parts
from ..responses import Answer, problem
from .guard import Invalid
from .reading import NOT_JSON, check_tenant, decode, read_bytes
from .splitting import split_events

MAX_EVENTS: Final = 1000
MAX_BYTES: Final = 8_388_608
_PER_CHECKPOINT: Final = 50  # events that are parsed at a time


class PublishRequest(msgspec.Struct, forbid_unknown_fields=True):
    """Events, of any tenants that the key is for."""

    events: Annotated[list[msgspec.Raw], msgspec.Meta(max_length=MAX_EVENTS)]


class Published(msgspec.Struct, omit_defaults=True):
    """What became of one event.

    ``event_id`` is the id that clients get with it; null for an event that is not durable. An event
    with an ``error`` does not count as published.
    """

    event_id: str | msgspec.UnsetType | None = msgspec.UNSET
    error: str | msgspec.UnsetType = msgspec.UNSET


class PublishReply(msgspec.Struct):
    """One entry for each event, in order."""

    published: list[Published]


async def publish(parts: Parts, key: ApiKey) -> Answer:
    """Publish up to 1,000 events, durable ones on the stream; each has an outcome of its own."""
    confirm = _read_confirm(request.args.get("confirm", "0"))
    found: list[Publication | str] = []  # or what is wrong with the event
    for n, payload in enumerate(await _read_events()):
        try:
            event = parse_event(payload, channel="", received_at=0)
        except InvalidEvent as invalid:
            if invalid.reason == "not_json":  # and so the body is not, either
                raise Invalid(422, NOT_JSON) from None
            if (tenant := tenant_of(payload)) is not None:
                check_tenant(key, tenant, f"events[{n}].tenant_id")
            found.append(f"invalid: {invalid}")
        else:
            check_tenant(key, event.tenant, f"events[{n}].tenant_id")
            found.append(_publication(parts, event))
        if n % _PER_CHECKPOINT == 0:
            await trio.lowlevel.checkpoint()
    assert parts.api is not None
    valid = [each for each in found if isinstance(each, Publication)]
    await parts.api.publishing.publish(valid, confirm)
    if (refusal := _refusal(valid)) is not None:
        _count(parts.api, found)
        return problem(503, f"nothing was published: {refusal}")
    _count(parts.api, found)
    reply = PublishReply([_published(each) for each in found])
    return Response(msgspec.json.encode(reply), content_type="application/json")


async def _read_events() -> list[bytes]:
    body = await read_bytes()
    try:
        return [bytes(each) for each in decode(body, PublishRequest).events]
    except (msgspec.DecodeError, RecursionError):
        try:
            found = await split_events(body)
        except ValueError:
            raise Invalid(422, NOT_JSON) from None
    if len(found) > MAX_EVENTS:
        raise Invalid(422, f"Expected `array` of length <= {MAX_EVENTS} - at `$.events`")
    return found


def _read_confirm(text: str) -> Confirm:
    if text == "all":
        return "all"
    if not is_decimal(text, 3):
        raise Invalid(422, 'confirm must be a number of replicas or "all"')
    return int(text)


def _publication(parts: Parts, event: Event) -> Publication:
    settings = parts.settings
    if settings.routes.is_durable(event.type) and settings.redis_streams:
        stream = settings.sharding.name_for_new(event.tenant)
        return Publication.to_stream(
            stream, event.payload, STREAM_LENGTH, again=event.id is not None
        )
    return Publication.on_channel(channel_for(event, settings.routes), event.payload)


def _refusal(publications: Sequence[Publication]) -> str | None:
    """Why nothing was published, or None if something was or may have been."""
    outcomes = [each.outcome for each in publications if each.outcome is not None]
    failed = (Problem.REFUSED, Problem.UNAVAILABLE)
    if not outcomes or any(outcome.problem not in failed for outcome in outcomes):
        return None
    details = sorted({outcome.detail for outcome in outcomes if outcome.detail})
    return f"Redis refuses ({', '.join(details)})" if details else "Redis does not answer"


def _published(found: Publication | str) -> Published:
    if isinstance(found, str):
        return Published(error=found)
    assert found.outcome is not None
    entry, problem_, detail = found.outcome
    its_id = event_id(tag(found.key), read_position(entry)) if entry is not None else None
    match problem_:
        case None:
            return Published(event_id=its_id)
        case Problem.IN_DOUBT:
            return Published(event_id=its_id, error=problem_)
        case _:
            return Published(error=f"{problem_}: {detail}" if detail else str(problem_))


def _count(api: Api, found: Sequence[Publication | str]) -> None:
    for each in found:
        if isinstance(each, str):
            api.events["invalid"] += 1
        elif each.outcome is not None:
            api.events[each.outcome.problem or "published"] += 1
