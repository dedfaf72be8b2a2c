"""Who is the primary: the newest failover is believed, whatever else is said."""

from typing import Any

import pytest

from trio_gateway.core.primaries import (
    NodeAnswer,
    SentinelAnswer,
    newest_primary,
    newest_slots,
    read_fields,
)
from trio_gateway.core.slots import SLOTS, SlotMap

OLD, NEW = ("10.0.0.1", 6379), ("10.0.0.2", 6379)


def test_newest_failover_counts_more_than_the_majority() -> None:
    said = [SentinelAnswer(1, OLD), SentinelAnswer(1, OLD), SentinelAnswer(2, NEW)]
    assert newest_primary(said) == NEW


def test_majority_counts_if_the_epochs_are_equal_or_unknown() -> None:
    said = [SentinelAnswer(0, OLD), SentinelAnswer(0, NEW), SentinelAnswer(0, NEW)]
    assert newest_primary(said) == NEW


@pytest.mark.parametrize("details", [[b"name", b"m", b"config-epoch", b"7"], PermissionError()])
def test_sentinel_is_read_without_the_right_to_the_details(details: Any) -> None:
    epoch = 7 if isinstance(details, list) else 0
    assert SentinelAnswer.read([b"10.0.0.1", b"6379"], details, "m") == (epoch, OLD)


@pytest.mark.parametrize("address", [b"OK", 5, [b"h"], [b"h", b"x"], [5, b"1"]])
def test_other_servers_are_no_sentinels(address: Any) -> None:
    with pytest.raises(ValueError, match="not a Sentinel"):
        SentinelAnswer.read(address, [], "m")


def test_sentinel_without_the_name_says_so() -> None:
    with pytest.raises(ValueError, match="knows no primary with the name m"):
        SentinelAnswer.read(None, PermissionError(), "m")


def info(state: str, epoch: int) -> bytes:
    return f"cluster_state:{state}\r\ncluster_current_epoch:{epoch}\r\n".encode()


def slots(host: str, last: int = SLOTS - 1) -> list[Any]:
    return [[0, last, [host.encode(), 6379, b"id"]]]


@pytest.mark.parametrize(
    "worse",
    [
        NodeAnswer.read(info("ok", 6), slots(OLD[0]), "h"),  # has not heard of the failover
        NodeAnswer.read(info("fail", 8), slots(OLD[0]), "h"),  # cut off
        NodeAnswer.read(info("ok", 7), slots(OLD[0], last=9), "h"),
        NodeAnswer.read(PermissionError(), slots(OLD[0]), "h"),
    ],
)
def test_intact_cluster_with_the_newest_epoch_is_believed(worse: NodeAnswer) -> None:
    best = NodeAnswer.read(info("ok", 7), slots(NEW[0]), "h")
    assert newest_slots([worse, best, worse]).primary_of(0) == NEW


@pytest.mark.parametrize("reply", [b"OK", [[1]], None])
def test_other_servers_are_no_nodes(reply: Any) -> None:
    with pytest.raises(ValueError, match="not a node of a Cluster"):
        NodeAnswer.read(info("ok", 1), reply, "h")


def test_map_of_nothing_has_no_primary() -> None:
    assert NodeAnswer.read(info("fail", 0), [], "h").slots == SlotMap()


def test_fields_are_pairs() -> None:
    assert read_fields([b"ip", b"10.0.0.1", b"port", b"1"]) == {"ip": "10.0.0.1", "port": "1"}
    with pytest.raises(ValueError):
        read_fields([b"ip"])
