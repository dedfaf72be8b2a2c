"""Members: masks of audiences become masks of connections."""

from hypothesis import given
from hypothesis import strategies as st

from trio_gateway.runtime.connection import Connection, ConnectionLimits
from trio_gateway.runtime.members import Members, by_mask
from trio_gateway.testing import make_principal

CONNECTIONS = [Connection(make_principal(), ConnectionLimits()) for _ in range(5)]


@given(st.lists(st.tuples(st.sets(st.integers(0, 4)), st.integers(1, 7)), max_size=5))
def test_connection_gets_the_events_of_all_its_audiences(
    audiences: list[tuple[set[int], int]],
) -> None:
    groups = []
    for numbers, mask in audiences:
        groups.append(members := Members())
        members.update(CONNECTIONS[n] for n in numbers)
        members.mask = mask

    found = by_mask(groups)

    for n, connection in enumerate(CONNECTIONS):
        expected = 0
        for numbers, mask in audiences:
            expected |= mask if n in numbers else 0
        assert [mask for mask, them in found.items() if connection in them] == (
            [expected] if expected else []
        )
        assert sum(them.count(connection) for them in found.values()) == (expected > 0)
    assert not any(members.mask for members in groups)
    assert not any(connection.mask for connection in CONNECTIONS)
