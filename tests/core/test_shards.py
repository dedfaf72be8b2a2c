"""Shards: which stream holds the events of a tenant."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trio_gateway.core.event_ids import DEFAULT_STREAM, tag
from trio_gateway.core.events import MAX_ID
from trio_gateway.core.shards import MAX_SHARDS, Sharding, shard_of, stream_name

tenants = st.integers(1, MAX_ID)


def test_shard_of_known_tenants_never_changes() -> None:
    found = [shard_of(tenant, 64) for tenant in (1, 2, 3, 4, 100, MAX_ID)]
    assert found == [50, 17, 48, 23, 19, 45]


@given(tenants, st.integers(1, MAX_SHARDS))
def test_shard_is_within_the_number_of_shards(tenant: int, shards: int) -> None:
    assert 0 <= shard_of(tenant, shards) < shards


def test_tenants_spread_over_the_shards() -> None:
    counts = [0] * 64
    for tenant in range(1, 6401):
        counts[shard_of(tenant, 64)] += 1
    assert 50 < min(counts) <= max(counts) < 200


def test_one_shard_keeps_the_name_and_more_add_a_hash_tag() -> None:
    assert stream_name("events:critical", 1, 0) == "events:critical"
    assert stream_name("events:critical", 8, 3) == "events:critical:{3}"


def test_streams_of_all_shards_have_different_tags() -> None:
    names = [DEFAULT_STREAM, *(stream_name(DEFAULT_STREAM, MAX_SHARDS, k) for k in range(256))]
    assert len({tag(name) for name in names}) == len(names)


def test_without_shards_a_tenant_is_in_every_configured_stream() -> None:
    sharding = Sharding(("a", "b", "a"))
    assert sharding.names == sharding.names_of(7) == ("a", "b")
    assert sharding.name_for_new(7) == "a"
    assert not sharding.by_tenant
    assert not sharding.ranks


def test_memory_for_tenants_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trio_gateway.core.shards._MOST_KNOWN", 10)
    sharding = Sharding(("s",), shards=8)
    for _ in range(2):
        for tenant in range(1, 100):
            assert sharding.streams_of(tenant) == tuple(map(tag, sharding.names_of(tenant)))
            assert len(sharding._known) <= 10


def test_tenant_is_in_its_shard_and_in_the_stream_before_the_shards() -> None:
    sharding = Sharding(("s",), shards=8)
    assert sharding.names_of(1) == ("s", f"s:{{{shard_of(1, 8)}}}")
    assert sharding.names == ("s", *(f"s:{{{k}}}" for k in range(8)))
    assert sharding.old_streams == {tag("s")}


numbers = st.integers(1, 16)


@given(tenants, numbers, numbers, st.booleans())
def test_while_the_number_changes_both_shards_are_read_and_the_old_one_first(
    tenant: int, number: int, factor: int, grows: bool
) -> None:
    old, new = (number, number * factor) if grows else (number * factor, number)
    sharding = Sharding(("s",), shards=new, previous=old)
    found = sharding.names_of(tenant)
    assert found[0] == stream_name("s", old, shard_of(tenant, old))
    assert found[-1] == stream_name("s", new, shard_of(tenant, new))
    assert set(found) <= set(sharding.names)
    ranks = [sharding.ranks[tag(name)] for name in found] if len(found) > 1 else []
    assert ranks == sorted(set(ranks))
    assert sharding.name_for_new(tenant) == found[-1]
    assert list(sharding.streams_of(tenant)) == [tag(name) for name in found]


@pytest.mark.parametrize("n", [2, 64])
def test_after_the_change_only_the_new_shard_is_read(n: int) -> None:
    sharding = Sharding(("s",), shards=n, previous=n)
    assert sharding.names_of(5) == (f"s:{{{shard_of(5, n)}}}",)
    assert not sharding.ranks
    assert not sharding.old_streams
