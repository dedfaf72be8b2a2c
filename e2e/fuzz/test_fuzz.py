"""Five seconds of ``nox -s fuzz``, which runs for minutes, and the inputs that it found."""

import random
from collections.abc import Iterator

import pytest
import structlog
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from e2e.fuzz.fuzz_run import mutated
from e2e.fuzz.fuzz_targets import TARGETS, quiet


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    before = structlog.get_config()
    quiet()
    yield
    structlog.configure(**before)


@pytest.mark.parametrize("name", TARGETS)
def test_target_handles_mutations_of_valid_input(name: str) -> None:
    target, seeds = TARGETS[name]
    dice = random.Random(name)
    for seed in seeds:
        target(seed)
    for _ in range(60 if name == "heads_in_pieces" else 300):
        target(mutated(dice, seeds))


@pytest.mark.parametrize("name", TARGETS)
@given(data=st.binary(max_size=300))
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_target_handles_any_bytes(name: str, data: bytes) -> None:
    TARGETS[name][0](data)


FOUND = {  # by nox -s fuzz
    "symmetric key without a key": ("key_sets", b'{"keys":[{"kty":"oct","{":"AAAo~"}]}'),
    "algorithm that is an object": ("key_sets", b'{"keys":[{"kty":"oct","k":"AA","alg":{}}]}'),
    "key set that is a list": ("key_sets", b"[]"),
    "map by a list": ("replies", b"\0%1\r\n*0\r\n+a\r\n"),
    "channel that is a list": ("replies", b"\0*4\r\n$8\r\npmessage\r\n*0\r\n*0\r\n:1\r\n"),
    "payload that is a number": (
        "replies",
        b"\0*4\r\n$8\r\npmessage\r\n$1\r\n*\r\n$1\r\nc\r\n:1\r\n",
    ),
    "message on a list": ("replies", b"\0*3\r\n$7\r\nmessage\r\n*0\r\n$1\r\nx\r\n"),
}


@pytest.mark.parametrize("name", FOUND)
def test_input_that_once_failed_is_handled(name: str) -> None:
    target, data = FOUND[name]
    TARGETS[target][0](data)
