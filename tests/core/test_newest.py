from trio_gateway.core.newest import Newest, is_event_id


def at(number: int, tag: str = "4723") -> str:
    return f"1790000000000-{number}-{tag}"


def test_positions_are_compared_as_numbers_and_in_their_own_stream() -> None:
    newest = Newest(at(9))
    for event_id, is_newer in [
        (at(10), True), (at(2**60), True), ("999-5-4723", False), (at(1, "0abc"), True),
        (at(11), False), ("own id of a backend", True), (at(1, "0abc"), False),
    ]:  # fmt: skip
        assert newest.advance(event_id) is is_newer
    assert newest.event_id == "own id of a backend"


def test_position_in_several_streams_is_that_in_each() -> None:
    newest = Newest(f"{at(2)}.{at(5, '0abc')}")
    assert [newest.advance(each) for each in (at(2), at(4, "0abc"), at(3))] == [False, False, True]
    assert newest.event_id == at(3)


def test_event_ids_are_those_of_one_event() -> None:
    assert is_event_id(at(1))
    for other in ("", "7", f"{at(1)}.{at(1, '0abc')}", "0-0-none", "0-0-none-x", "1-2"):
        assert not is_event_id(other)
