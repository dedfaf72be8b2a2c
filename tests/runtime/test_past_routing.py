"""Past events are routed in one way, wherever they were kept."""

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.support.resume_world import A, World, at, place
from trio_gateway.core.audiences import BranchId, SectorId, floor, waiters
from trio_gateway.core.events import Event
from trio_gateway.runtime.past_routing import PastRouting
from trio_gateway.testing import make_event, make_payload, make_principal

OF_FIVE = make_event(sector_id=5)
WAITER = make_principal(sectors=[5])
SECTOR = waiters(WAITER.tenant, BranchId(1), SectorId(5))
BRANCH = floor(WAITER.tenant, BranchId(1))


@pytest.mark.parametrize(
    ("to_branch", "event", "has_branch"),
    [
        (False, OF_FIVE, False),
        (True, OF_FIVE, True),
        (True, make_event("TICKET_READY", sector_id=5), True),
        (True, make_event("ENTITY_CREATED", sector_id=5), False),  # not for waiters
        (True, make_event("ENTITY_CREATED"), False),
    ],
)
def test_event_of_a_sector_counts_as_uncovered(
    to_branch: bool, event: Event, has_branch: bool
) -> None:
    found = PastRouting(uncovered_to_branch=to_branch).audiences(event)
    assert (BRANCH in found) is has_branch


@pytest.mark.parametrize("payload", [b"{", make_payload("CART_SYNC"), make_payload(tenant_id=0)])
def test_invalid_payloads_and_events_that_are_not_durable_are_left_out(payload: bytes) -> None:
    assert PastRouting().route(A, at(1), payload, 0.0) is None


def test_event_has_the_place_of_its_entry() -> None:
    found = PastRouting().route(A, at(7), OF_FIVE.payload, 3.0)
    assert found is not None
    event, audiences = found
    assert (event.stream, event.position, event.received_at) == (A, at(7), 3.0)
    assert place(7).encode() in event.frame
    assert SECTOR in audiences


@pytest.mark.parametrize("kept", ["raw", "stream", "warm"])
@pytest.mark.parametrize("to_branch", [False, True])
async def test_waiter_of_another_sector_resumes_with_what_perhaps_nobody_got(
    autojump_clock: MockClock, nursery: trio.Nursery, kept: str, to_branch: bool
) -> None:
    """The waiter of the sector came only afterwards, and has not missed anything."""
    events = 1 if kept == "stream" else 100
    world = World(nursery, most_scanned=100, uncovered_to_branch=to_branch, events=events)
    other = make_principal(user=22, sectors=[6])
    if kept == "warm":
        world.history.extent.advance(A, at(1))
        await world.connect(principal=WAITER)
        for n in (2, 3):
            event = make_event(sector_id=5, data=n, stream=A, position=at(n))
            world.dispatch.remember(event)
        world.history.extent.advance(A, at(3))
    else:
        await world.publish(1, 2, 3, sector_id=5)
        await world.connect(principal=WAITER)
    client = await world.connect(place(1), principal=other)
    await trio.sleep(1)
    await wait_all_tasks_blocked()
    assert client.resumed[0]["recovered"]
    assert client.heard == ([2, 3] if to_branch else [])
