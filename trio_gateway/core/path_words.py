"""The path of an event in words: a summary, and what happened when."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from .escalation import ESCALATED
from .event_path import EventPath, Known, Moment, PathClient, StepState
from .receipts import State
from .routing import Routing

_KINDS: Final = {
    "sent": "sent to {}, whose connection did not take it at once",
    "written": "written to {}",
    "delivered": "delivered to {}",
    "seen": "seen by {}",
}
_OPEN: Final = {
    State.SENT: "Sent, not taken by its connection",
    State.WRITTEN: "Written, not confirmed",
}
_AT_ONCE: Final = 0.1  # seconds: what happens to clients so soon after each other is one moment
_MOST_NAMES: Final = 10
_FUTURE: Final = 60_000  # ms: more than the clocks of two servers differ
UNKNOWN_STREAM: Final = "it is of a stream that is not read here: is it an id of another Redis?"
_USUALLY: Final = 2.0  # seconds after a deadline within which a step is taken


def tell(path: EventPath, known: Known, routes: Routing, ttl: float) -> EventPath:
    """Add the words to a path that :func:`.event_path.trace` has made of the same."""
    path.summary = list(_summary(path, known, routes, ttl))
    path.timeline = sorted(_timeline(path), key=lambda moment: moment.after)
    return path


def why_unknown(known: Known) -> str:
    """Why nothing is known of an event, by its place alone.

    So it tells nothing of an event that exists and is none of the asker's business.
    """
    if known.place.position[0] > known.now + _FUTURE:
        return "it would be of the future: is it an id of another Redis?"
    if known.is_trimmed:
        return "it is older than all that its stream holds, and no receipts are kept of it"
    return "there is no such entry in its stream"


def seconds(number: float) -> str:
    """A time after the entry: the longer it is, the fewer digits."""
    return f"{number:.{2 if number < 10 else 1 if number < 100 else 0}f} s"


# The summary


def _summary(path: EventPath, known: Known, routes: Routing, ttl: float) -> Iterator[str]:
    if (asked := known.asked) is not None:
        yield f"You asked for {_role_of(asked.type)}."
    if known.event is None:
        yield "Its entry is not in the stream any more, so its sector and session are not known."
    if known.event is not None and (escalation := known.event.escalation) is not None:
        yield (
            f"It took the event {escalation.event_id} ({escalation.of}) to {escalation.to}."
            " Nothing else is known of that event any more."
        )
    elif not path.durable:
        yield (
            f"{path.type} is not a durable type: clients get it without an event_id, it is not"
            " replayed, and no receipts are kept of it."
        )
    elif not path.receipts and routes.route_of(path.type).receipt:
        yield f"Receipts are kept for {ttl:g} s (WS_RECEIPT_TTL): those of this event are gone."
    elif not path.receipts:
        yield (
            f"Receipts are not kept for {path.type}, so it is not known who was sent it and who"
            " has it: set receipt = true for this type in WS_ROUTES_FILE."
        )
    else:
        yield from _reception(path)
        if not routes.route_of(path.type).receipt:
            yield (
                f"There are receipts of it, but receipt = true is not set for {path.type} here:"
                " is WS_ROUTES_FILE that of the gateways?"
            )
    for number, step in enumerate(path.steps):
        if step.state is not StepState.NOT_BEGUN:
            outcome = _outcome(path, number)
            yield f"{step.to}: {outcome}{'' if outcome.endswith('?') else '.'}"
    if path.steps and path.steps[-1].state is StepState.UNHEARD:
        yield _end(path)
    if path.missing:
        yield f"What these processes know may be missing: {', '.join(path.missing)}."


def _role_of(type_: str) -> str:
    if type_ == ESCALATED:
        return f"the {type_} that took this event to a next audience"
    return f"the {type_} that tells of this event"


def _reception(path: EventPath) -> Iterator[str]:
    clients = path.clients
    if not path.sent:
        copy = ", or it is a copy of an earlier event" if _may_be_copy(path) else ""
        yield f"It was sent to nobody: no client of its audiences was connected{copy}."
        return
    yield (
        f"Sent to {path.sent}: written to {path.written}, delivered to {path.delivered}, seen by"
        f" {path.seen}."
    )
    if len(clients) < path.sent:
        yield f"{path.sent - len(clients)} of them are of other branches, and not named."
    for state, words in _OPEN.items():
        if found := [each for each in clients if each.state == state.label]:
            yield f"{words}: {_names(found)}."


def _outcome(path: EventPath, number: int) -> str:
    step = path.steps[number]
    assert step.deadline is not None
    left = step.deadline - path.now
    match step.state:
        case StepState.UNHEARD if not step.sent:
            return f"nobody was connected for {step.within:g} s"
        case StepState.UNHEARD:
            return f"nobody had confirmed within {step.within:g} s"
        case StepState.CONFIRMED:
            assert step.ended is not None
            spare = step.deadline - step.ended
            order = "before" if spare >= 0 else "after"
            return (
                f"confirmed after {seconds(step.ended)}, {seconds(abs(spare))} {order} the deadline"
            )
        case StepState.RUNNING:
            return f"nobody has confirmed yet; in {seconds(left)} {_consequence(path, number)}"
    late = f"nobody has confirmed, and the time was over {seconds(-left)} ago"
    if -left < _USUALLY:
        return f"{late}; now {_consequence(path, number)}"
    copy = "is it a copy of an earlier event, " if _may_be_copy(path) else ""
    return (
        f"{late}, but no step followed: {copy}does a gateway run, and can it read Redis and write"
        " to it?"
    )


def _may_be_copy(path: EventPath) -> bool:
    """A copy of an earlier event is sent to nobody and not watched: no step of it is ever over."""
    return not path.sent and all(step.state is not StepState.UNHEARD for step in path.steps)


def _consequence(path: EventPath, number: int) -> str:
    """What follows if nobody in the audience of this step confirms."""
    told = "EVENT_UNHEARD tells the admins"
    following = path.steps[number + 1 :]
    return f"{told}, and the event goes to {following[0].to}" if following else told


def _end(path: EventPath) -> str:
    if not any(step.delivered for step in path.steps):
        return "Nobody has confirmed, and no step is left."
    clients = [each for each in path.clients if each.must_reach]
    times = [each.delivered for each in clients if each.delivered is not None]
    when = f" after {seconds(min(times))}" if times else ""
    return f"Somebody confirmed{when}, but no step was left."


def _names(clients: Sequence[PathClient], most: int = _MOST_NAMES) -> str:
    names = [each.name for each in clients]
    if len(names) <= most:
        return ", ".join(names)
    return f"{', '.join(names[:most])} and {len(names) - most} others"


# What happened when


def _timeline(path: EventPath) -> Iterator[Moment]:
    yield Moment(0.0, "entered Redis")
    for kind, words in _KINDS.items():
        for after, clients in _together(path.clients, kind):
            yield Moment(after, words.format(_names(clients)))
    for number, step in enumerate(path.steps):
        assert step.deadline is not None or step.state is StepState.NOT_BEGUN
        match step.state, step.ended, step.deadline:
            case StepState.UNHEARD, float(ended), _:
                yield Moment(
                    ended, f"nobody in {step.to} had confirmed: {_consequence(path, number)}"
                )
            case StepState.CONFIRMED, float(ended), _:
                yield Moment(ended, f"{step.to}: confirmed, so no step follows")
            case StepState.RUNNING, _, float(deadline):
                text = f"if nobody in {step.to} has confirmed: {_consequence(path, number)}"
                yield Moment(deadline, text, lies_ahead=True)


def _together(
    clients: Iterable[PathClient], kind: str
) -> Iterator[tuple[float, Sequence[PathClient]]]:
    """The clients that came to this state, by when: those at about the same time together."""
    times = [(time, each) for each in clients if (time := _time_of(each, kind)) is not None]
    group: list[PathClient] = []
    begun = 0.0
    for time, client in sorted(times, key=lambda pair: pair[0]):
        if group and time - begun > _AT_ONCE:
            yield begun, group
            group = []
        if not group:
            begun = time
        group.append(client)
    if group:
        yield begun, group


def _time_of(client: PathClient, kind: str) -> float | None:
    """When a client came to this state, if that is worth telling."""
    time: float | None = getattr(client, kind)
    if kind == "sent" and time is not None and client.written is not None:
        return time if client.written - time > _AT_ONCE else None
    return time
