"""Batches: each valid event is in one, in order, and each outcome is that of its event."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trio_gateway.api_client import CallFailed, Published, batches
from trio_gateway.api_client.batches import Outcomes
from trio_gateway.publisher import InDoubt, InvalidEvent, PublishFailed

EVENTS = st.lists(st.tuples(st.booleans(), st.integers(0, 30)), max_size=40)


@given(EVENTS, st.integers(0, 40))
def test_each_event_gets_its_outcome(events: list[tuple[bool, int]], fails_at: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batches, "_MOST_EVENTS", 5)
        patch.setattr(batches, "_MOST_BYTES", 300)
        outcomes = Outcomes(
            {"type": "T", "tenant_id": int(valid), "branch_id": 1, "data": "x" * size}
            for valid, size in events
        )
    sent = [payload for batch in outcomes.batches for payload in batch.payloads]
    places = [place for batch in outcomes.batches for place in batch.places]
    assert places == [n for n, (valid, _) in enumerate(events) if valid]
    assert [payload.count(b"x") for payload in sent] == [events[place][1] for place in places]
    for batch in outcomes.batches:
        assert 1 <= len(batch.payloads) <= 5
        assert sum(map(len, batch.payloads)) <= 300
    for number, batch in enumerate(outcomes.batches):
        if number == fails_at:
            outcomes.failed(batch, CallFailed("lost", in_doubt=True))
            break
        outcomes.answered(batch, [Published(str(place)) for place in batch.places])
    limits = [batch.places[0] for batch in outcomes.batches[fails_at : fails_at + 2]]
    for place, (published, (valid, _)) in enumerate(zip(outcomes.published, events, strict=True)):
        if not valid:
            assert isinstance(published.error, InvalidEvent)
        elif not limits or place < limits[0]:
            assert published == Published(str(place))
        elif len(limits) == 1 or place < limits[1]:
            assert isinstance(published.error, InDoubt)
        else:
            assert type(published.error) is PublishFailed
            assert "not sent" in str(published.error)
