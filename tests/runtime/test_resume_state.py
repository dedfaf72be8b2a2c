"""The resume state: its table, and that a cursor is there exactly in three of its phases."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trio_gateway.core.event_ids import START, Stream
from trio_gateway.runtime.connection import Connection, ConnectionLimits
from trio_gateway.runtime.hub import Hub
from trio_gateway.runtime.resume_state import FROM_HISTORY, TRANSITIONS, Phase, ResumeState, Step
from trio_gateway.testing import make_principal

CURSOR = {Stream("a"): START}


@given(st.lists(st.sampled_from(Step)))
def test_connection_is_held_exactly_while_it_has_a_cursor(steps: list[Step]) -> None:
    hub, connection = Hub(), Connection(make_principal(), ConnectionLimits())
    state = connection.resume_state
    for step in steps:
        if step in TRANSITIONS[state.phase]:
            hub.step(connection, step, CURSOR)
        has_cursor = state.cursor is not None
        assert has_cursor == (state.phase in FROM_HISTORY)
        assert has_cursor == (connection in hub.held)
        assert (state.phase is Phase.LAGGING) == (connection in hub.lagging)


def test_impossible_step_raises() -> None:
    with pytest.raises(KeyError):
        ResumeState().step(Step.CATCH_UP)


@pytest.mark.parametrize("step", Step)
def test_no_step_reopens_a_closed_state(step: Step) -> None:
    state = ResumeState()
    state.step(Step.LEAVE)

    state.step(step, CURSOR)

    assert (state.phase, state.cursor) == (Phase.CLOSED, None)


@pytest.mark.parametrize("replays", [Step.ASK, Step.REPLAY, Step.LAG])
def test_client_may_resume_until_it_has_resumed_or_was_sent_a_replay(replays: Step) -> None:
    state = ResumeState()
    state.step(Step.JOIN, CURSOR)
    assert state.may_resume
    state.step(replays)
    assert not state.may_resume
    state.step(Step.CATCH_UP)
    assert not state.may_resume


def test_silent_client_may_still_resume_when_it_is_live() -> None:
    state = ResumeState()
    state.step(Step.JOIN, CURSOR)
    state.step(Step.CATCH_UP)

    assert state.may_resume


def test_step_without_a_cursor_does_not_change_the_cursor() -> None:
    state = ResumeState()
    state.step(Step.JOIN, CURSOR)
    state.step(Step.REPLAY)

    assert state.cursor == CURSOR


@pytest.mark.parametrize("before", [Step.JOIN, Step.JOIN_RESUMING])
def test_lag_does_not_change_the_cursor(before: Step) -> None:
    state = ResumeState()
    state.step(before, CURSOR)
    state.step(Step.LAG)

    assert (state.phase, state.cursor) == (Phase.LAGGING, CURSOR)


def test_each_lag_has_a_higher_number_than_those_before() -> None:
    hub = Hub()
    first, second = (Connection(make_principal(user=n), ConnectionLimits()) for n in (1, 2))
    for each in (first, second):
        hub.join(each)
        hub.step(each, Step.JOIN, CURSOR)
    hub.step(first, Step.LAG)
    lagged_at = first.resume_state.lagged_at
    hub.step(first, Step.LAG)

    assert first.number < second.number < first.resume_state.lagged_at == lagged_at
