"""The probe: it is missed only if it was published and can still come."""

import math

import hiredis

from trio_gateway.broker.probe import PATIENCE, Probe


def listening() -> Probe:
    probe = Probe()
    probe.listens(True)
    return probe


def sent(probe: Probe) -> bytes:
    """Send the next one; return its payload."""
    _, _, number = probe.next_command()
    return b"%d" % number


def test_probe_that_does_not_come_back_is_due_some_time_after_the_reply() -> None:
    probe = listening()
    sent(probe)
    assert probe.due == math.inf  # Redis may be slow to publish it
    probe.published(1, 5.0)
    assert probe.due == 5.0 + PATIENCE
    sent(probe)
    probe.published(1, 7.0)
    assert probe.due == 5.0 + PATIENCE


def test_probe_may_come_back_before_or_after_the_reply() -> None:
    probe = listening()
    first = sent(probe)
    probe.came_back(first)
    probe.published(1, 5.0)
    assert probe.due == math.inf
    second = sent(probe)
    probe.published(1, 7.0)
    probe.came_back(second)
    assert probe.due == math.inf


def test_probe_that_was_sent_before_the_subscription_is_not_missed() -> None:
    probe = Probe()
    sent(probe)
    probe.listens(True)
    probe.published(0, 5.0)
    assert probe.due == math.inf
    sent(probe)
    probe.listens(False)
    probe.listens(True)  # another connection
    probe.published(0, 7.0)
    assert probe.due == math.inf


def test_message_of_somebody_else_is_no_probe() -> None:
    probe = listening()
    sent(probe)
    probe.published(1, 5.0)
    probe.came_back(b"?")
    assert probe.due == 5.0 + PATIENCE


def test_probe_is_given_up_without_the_right_to_it() -> None:
    probe = listening()
    sent(probe)
    probe.published(hiredis.ReplyError("NOPERM no access"), 5.0)
    assert not probe.is_wanted
    assert probe.due == math.inf
