"""The receipt store, with a real Redis: what several processes write of one client is raised."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from tests.support.gateways import open_commands
from trio_gateway.broker.receipt_store import ReceiptStore
from trio_gateway.core.event_ids import Position, tag
from trio_gateway.core.receipts import (
    Place,
    Receipt,
    ReceiptChange,
    Receipts,
    Recipient,
    State,
    TrackedEvent,
)
from trio_gateway.core.resilience import Breaker

STREAM = "events:critical"
WHO = Recipient("waiter", "21")
AT = 1_790_000_000_000

Write = Callable[[Receipt], Awaitable[Receipts]]


@asynccontextmanager
async def after_writing(redis_url: str, sequence: int) -> AsyncIterator[Write]:
    """A function that writes a receipt of one event, and reads what is known after that."""
    breaker = Breaker(5, 30.0)
    async with open_commands(redis_url, breaker, breaker, max_connections=2) as commands:
        store = ReceiptStore(commands, {tag(STREAM): STREAM})
        place = Place(tag(STREAM), Position((AT, sequence)))
        about = TrackedEvent("SERVICE_CALL_CREATED", 1, 1, AT)

        async def after(receipt: Receipt) -> Receipts:
            assert await store.write({place: ReceiptChange(about, 2 * AT, {WHO: receipt})})
            found = await store.read(place)
            assert found is not None
            return found

        yield after


async def test_client_that_was_sent_an_event_by_one_process_confirms_it_on_another(
    redis_url: str,
) -> None:
    async with after_writing(redis_url, 0) as after:

        async def raised(receipt: Receipt) -> Receipt | None:
            return (await after(receipt)).by.get(WHO)

        found = await raised(Receipt(steps=1, sent=AT + 2))
        assert found == Receipt(1, AT + 2)
        assert found.state is State.SENT
        assert await raised(Receipt(delivered=AT + 9)) == Receipt(1, AT + 2, AT + 9, AT + 9)
        assert await raised(Receipt(2, AT + 3, AT + 3)) == Receipt(3, AT + 2, AT + 9, AT + 9)


async def test_confirmation_counts_also_if_it_is_written_before_that_the_event_was_sent(
    redis_url: str,
) -> None:
    """Two processes write at the same time: the one that sent it, and the one that was told."""
    async with after_writing(redis_url, 1) as after:
        before = await after(Receipt(delivered=AT + 1))
        assert (before.by, before.confirmed) == ({}, {})
        found = await after(Receipt(steps=2, sent=AT, written=AT))
        assert found.by == {WHO: Receipt(2, AT, AT + 1, AT + 1)}
        assert found.confirmed == {1: AT + 1}


@pytest.mark.parametrize("is_sent_first", [False, True])
@pytest.mark.parametrize("step", [0, 1, 2])
async def test_confirmation_is_not_of_what_a_later_step_brought(
    redis_url: str, step: int, is_sent_first: bool
) -> None:
    """The client came back when this many steps had been taken; step 1 brought it the event."""
    sent, confirmed = Receipt(2, AT, AT, step=1), Receipt(delivered=AT + 1, seen=AT + 2, step=step)
    async with after_writing(redis_url, 10 + 2 * step + is_sent_first) as after:
        for each in (sent, confirmed) if is_sent_first else (confirmed, sent):
            found = await after(each)
    if step:
        assert found.by == {
            WHO: Receipt(2, AT, AT if is_sent_first else AT + 1, AT + 1, AT + 2, step=1)
        }
        assert found.confirmed == {1: AT + 1}
    else:
        assert (found.by, found.confirmed) == ({WHO: sent}, {})
    joined = sent.joined(confirmed)
    assert joined == confirmed.joined(sent)
    assert (joined.delivered, joined.step) == (found.by[WHO].delivered, 1)


async def test_later_confirmation_counts_where_the_first_was_of_an_earlier_step(
    redis_url: str,
) -> None:
    async with after_writing(redis_url, 20) as after:
        await after(Receipt(delivered=AT + 1))
        await after(Receipt(delivered=AT + 3, step=1))
        await after(Receipt(delivered=AT + 4))
        found = await after(Receipt(2, AT + 2, AT + 2, step=1))
    assert found.by[WHO].delivered == AT + 3
