"""Slots of a Redis Cluster."""

from typing import Any

import pytest

from trio_gateway.core.shards import stream_name
from trio_gateway.core.slots import SlotMap, read_node, slot_of


@pytest.mark.parametrize(
    ("key", "slot"),
    [
        # As CLUSTER KEYSLOT says.
        ("foo", 12182),
        ("{foo}:1", 12182),
        ("a{foo}b{bar}", 12182),
        ("events:critical", 11560),
        ("{}foo", 9500),
        ("{foo", 13308),
        ("foo}{", 8134),
        ("ñ{é}", 10180),
        ("", 0),
    ],
)
def test_slot_is_that_of_redis(key: str, slot: int) -> None:
    assert slot_of(key) == slot


def test_all_keys_of_a_shard_share_a_slot() -> None:
    name = stream_name("events:critical", 64, 3)
    assert slot_of(name) == slot_of("other:{3}") == slot_of("3")


REPLY: list[Any] = [
    [8192, 16383, [b"10.0.0.2", 7002, b"id2", []], [b"10.0.0.4", 7004, b"id4", []]],
    [0, 100, [b"10.0.0.1", 7001, b"id1", []]],
]


def test_primary_of_a_slot_is_the_first_node_of_its_range() -> None:
    slots = SlotMap.from_reply(REPLY, "asked")
    assert [slots.primary_of(slot) for slot in (0, 100, 8192, 16383)] == [
        ("10.0.0.1", 7001), ("10.0.0.1", 7001), ("10.0.0.2", 7002), ("10.0.0.2", 7002),
    ]  # fmt: skip
    assert slots.primaries == {("10.0.0.1", 7001), ("10.0.0.2", 7002)}


def test_slot_that_nobody_owns_has_no_primary() -> None:
    slots = SlotMap.from_reply(REPLY, "asked")
    assert slots.primary_of(101) is slots.primary_of(8191) is SlotMap().primary_of(0) is None
    assert not slots.covers_all
    assert SlotMap(((0, 100, ("a", 1)), (101, 16383, ("b", 1)))).covers_all


def test_replicas_are_known() -> None:
    assert SlotMap.from_reply(REPLY, "asked").replicas == {("10.0.0.4", 7004)}


@pytest.mark.parametrize("slot", [0, 50, 100, 101, 8192, 16383])
def test_slot_that_moved_has_the_new_primary_and_all_others_the_same(slot: int) -> None:
    before, new = SlotMap.from_reply(REPLY, "asked"), ("10.0.0.4", 7004)
    after = before.moved(slot, new)
    assert after.primary_of(slot) == new
    assert new not in after.replicas
    for other in {0, 49, 50, 51, 99, 100, 101, 102, 8191, 8192, 8193, 16382, 16383} - {slot}:
        assert after.primary_of(other) == before.primary_of(other)
    assert after.moved(slot, new).ranges == after.ranges


@pytest.mark.parametrize("unknown", [None, b"", "", b"?"])
def test_node_of_unknown_host_is_at_the_host_that_was_asked(unknown: Any) -> None:
    assert SlotMap.from_reply([[0, 5, [unknown, 7001]]], "asked").primary_of(0) == ("asked", 7001)


@pytest.mark.parametrize("reply", [b"OK", None, 5, [5], [[0, 1]], [[0, 1, [b"a", b"x"]]]])
def test_other_replies_are_refused(reply: Any) -> None:
    with pytest.raises(ValueError, match="CLUSTER SLOTS"):
        SlotMap.from_reply(reply, "asked")


@pytest.mark.parametrize(
    ("text", "node"),
    [
        ("10.0.0.1:7001", ("10.0.0.1", 7001)),
        (":7001", ("asked", 7001)),
        ("?:7001", ("asked", 7001)),
        ("::1:7001", ("::1", 7001)),
        ("[::1]:7001", ("::1", 7001)),
        ("redis-2.example:7001", ("redis-2.example", 7001)),
    ],
)
def test_address_of_a_redirection_is_read(text: str, node: tuple[str, int]) -> None:
    assert read_node(text, "asked") == node


@pytest.mark.parametrize("text", ["", "host", "host:", "host:x"])
def test_invalid_address_of_a_redirection_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="invalid literal"):
        read_node(text, "asked")
