"""What the answers to publish mean."""

import httpx
import msgspec
import pytest

from trio_gateway.api_client import CallFailed, Published, calls
from trio_gateway.api_client.attempts import read_answer
from trio_gateway.publisher import PublishFailed


def outcome(entry: object) -> Published:
    call = calls.publish([b"{}"], 0, repeatable=False)
    request = httpx.Request("POST", "https://host/ws/api/publish")
    content = msgspec.json.encode({"published": [entry]})
    [found] = read_answer(call, httpx.Response(200, content=content, request=request))
    return found


@pytest.mark.parametrize("entry", [{}, {"error": None}, {"id": "1-0-4723"}], ids=str)
def test_an_entry_without_an_outcome_is_no_success(entry: object) -> None:
    with pytest.raises(CallFailed, match="invalid answer") as failed:
        outcome(entry)
    assert failed.value.in_doubt


def test_an_entry_with_an_error_is_no_success_whatever_the_error_is() -> None:
    assert outcome({"event_id": None}) == Published()
    assert isinstance(outcome({"event_id": None, "error": ""}).error, PublishFailed)
