"""The client has each call of the API, with its parameters and with what it answers."""

import inspect
from collections.abc import Iterator
from typing import Any, Final, get_args

import msgspec
import msgspec.inspect
import pytest

from trio_gateway.api_client import ApiClient, AsyncApiClient
from trio_gateway.web.api.calls import CALLS
from trio_gateway.web.api.guard import Call

# Answers that a method returns as something else than the JSON object.
TRANSLATED: Final = {"publish", "history"}
ELSEWHERE: Final = {"confirm"}  # arguments of the client


def calls_of(client: type) -> dict[str, inspect.Signature]:
    """The methods that make a call."""
    return {
        name: inspect.signature(method)
        for name, method in vars(client).items()
        if inspect.isfunction(method) and not name.startswith("_")
    }


def keys_of(kind: Any) -> set[str]:
    """The keys of a JSON value of this type, and those of the objects in it."""

    def walk(node: msgspec.inspect.Type, path: str) -> Iterator[str]:
        match node:
            case msgspec.inspect.StructType():
                for each in node.fields:
                    yield f"{path}.{each.encode_name}"
                    yield from walk(each.type, f"{path}.{each.encode_name}")
            case msgspec.inspect.UnionType():
                for part in node.types:
                    yield from walk(part, path)
            case msgspec.inspect.ListType() | msgspec.inspect.VarTupleType():
                yield from walk(node.item_type, path)

    return set(walk(msgspec.inspect.type_info(kind), ""))


@pytest.mark.parametrize(("client", "close"), [(ApiClient, "close"), (AsyncApiClient, "aclose")])
def test_client_has_a_method_for_each_call(client: type, close: str) -> None:
    assert set(calls_of(client)) == {call.name for call in CALLS} | {"publish_many", close}


def test_both_clients_have_the_same_arguments() -> None:
    asynchronous = calls_of(AsyncApiClient)
    for call in CALLS:
        assert calls_of(ApiClient)[call.name].parameters == asynchronous[call.name].parameters


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.name)
def test_method_has_each_parameter_of_its_call(call: Call) -> None:
    wanted = {each.name for each in call.query}
    if call.body is not None and call.name not in TRANSLATED:
        wanted |= {each.encode_name for each in msgspec.structs.fields(call.body)}
    assert wanted - ELSEWHERE <= set(calls_of(ApiClient)[call.name].parameters)


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.name)
def test_value_has_each_key_of_its_answer(call: Call) -> None:
    if call.name in TRANSLATED:
        return
    value = calls_of(ApiClient)[call.name].return_annotation
    if call.name == "nodes":  # it returns the list alone
        (node,) = get_args(value)
        assert keys_of(call.reply) == {".nodes"} | {f".nodes{key}" for key in keys_of(node)}
    else:
        assert keys_of(call.reply) <= keys_of(value)
