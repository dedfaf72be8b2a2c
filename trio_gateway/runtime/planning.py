"""Planning: which frames are written to which connections, one write for each of them."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import compress
from typing import Final

from ..core.events import Event
from .connection import Connection
from .hub import Hub
from .members import Members, by_mask, union

# An event to be delivered, who is in its audiences, and the last connection that has heard a copy.
Planned = tuple[Event, list[Members], int]
# Frames, which of them (bit i: the i-th), and who gets those.
Write = tuple[list[bytes], int, list[Connection]]


def plan_writes(planned: list[Planned], hub: Hub) -> list[Write]:
    """Say what is written for the events of a batch, of which there is at least one."""
    writes = _of_one(*planned[0], hub) if len(planned) == 1 else _of_many(planned, hub)
    if writes and hub.deflate_count:
        deflated = [event.deflated for event, _, _ in planned]
        if any(event.frame is not event.deflated for event, _, _ in planned):
            return _with_deflated(writes, deflated)
    return writes


def _of_one(event: Event, groups: list[Members], delivered_up_to: int, hub: Hub) -> list[Write]:
    members = union(groups)
    if delivered_up_to:
        members = [connection for connection in members if connection.number > delivered_up_to]
    if not event.durable:
        if hub.lagging:
            members = _without_lagging(members, hub)
    elif held := hub.held:
        members = [connection for connection in members if connection not in held]
    return [([event.frame], 1, members)] if members else []


def _of_many(planned: list[Planned], hub: Hub) -> list[Write]:
    """Plan with one bit mask per audience (bit i: the i-th event).

    The work per connection is to or the masks of its audiences, and equal masks share one
    joined byte string.
    """
    heard: list[Members] = []
    durable = 0
    copies: list[tuple[int, int]] = []  # a bit, and the last connection that has the event
    bit = 1
    for event, groups, delivered_up_to in planned:
        for members in groups:
            if not members.mask:
                heard.append(members)
            members.mask |= bit
        if event.durable:
            durable |= bit
        if delivered_up_to:
            copies.append((bit, delivered_up_to))
        bit <<= 1
    found: Mapping[int, list[Connection]] = by_mask(heard)
    if copies or (hub.held and (durable or hub.lagging)):
        found = _without(found, durable, copies, hub)
    frames = [event.frame for event, _, _ in planned] if found else []
    # Small groups first: they do not wait for the writes to a large one.
    writes = [(frames, mask, members) for mask, members in found.items()]
    writes.sort(key=_crowd)
    return writes


def _without(
    sorted_out: Mapping[int, list[Connection]],
    durable: int,
    copies: Sequence[tuple[int, int]],
    hub: Hub,
) -> Mapping[int, list[Connection]]:
    """Without events that a connection has already, gets from the history, or skips."""
    found: defaultdict[int, list[Connection]] = defaultdict(list)
    held, lagging = hub.held, hub.lagging
    for mask, members in sorted_out.items():
        for connection in members:
            left = mask & ~durable if connection in held else mask
            if connection in lagging:
                connection.resume_state.has_skipped |= left > 0
                left = 0
            for bit, delivered_up_to in copies:
                if connection.number <= delivered_up_to:
                    left &= ~bit
            found[left].append(connection)
    found.pop(0, None)
    return found


def _without_lagging(members: Sequence[Connection], hub: Hub) -> list[Connection]:
    """The connections that do not lag; the others skip an event that is not durable."""
    found = []
    for connection in members:
        if connection in hub.lagging:
            connection.resume_state.has_skipped = True
        else:
            found.append(connection)
    return found


def _crowd(write: Write) -> int:
    return len(write[2])


def _with_deflated(writes: list[Write], deflated: list[bytes]) -> list[Write]:
    """Split each write: connections that can read compressed frames get those."""
    found: list[Write] = []
    for frames, mask, members in writes:
        if plain := [connection for connection in members if not connection.supports_deflate]:
            found.append((frames, mask, plain))
        if can := [connection for connection in members if connection.supports_deflate]:
            found.append((deflated, mask, can))
    return found


_AS_BITS: Final = bytes(byte == ord("1") for byte in range(256))


def join(frames: Sequence[bytes], mask: int) -> tuple[bytes, int]:
    """Join the frames whose bits are set, in order; also return their number."""
    count = mask.bit_count()
    if count == 1:
        return frames[mask.bit_length() - 1], 1
    bits = bin(mask)[:1:-1].encode().translate(_AS_BITS)  # the lowest first
    return b"".join(compress(frames, bits)), count
