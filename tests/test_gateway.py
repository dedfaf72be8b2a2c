"""The lifespan: a bug in the background ends the server, whatever becomes of its log line."""

from collections.abc import Iterator
from typing import Any, NoReturn

import pytest
import structlog
import trio
from hypercorn.utils import LifespanFailureError

import trio_gateway.gateway
from tests.support.gateways import make_settings, running
from trio_gateway.core.exception_groups import leaves


class Unwritable:
    """The log handler of an embedding program whose disk is full."""

    def __getattr__(self, name: str) -> Any:
        def fail(*_: Any, **__: Any) -> NoReturn:
            raise OSError(28, "No space left on device")

        return fail


@pytest.fixture
def _unwritable_log() -> Iterator[None]:
    yield
    structlog.reset_defaults()


@pytest.mark.usefixtures("_unwritable_log")
async def test_bug_ends_the_server_although_its_log_line_raises(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def buggy(*_: Any, **__: Any) -> NoReturn:
        structlog.configure(
            processors=[structlog.processors.KeyValueRenderer()],
            logger_factory=lambda *_: Unwritable(),
        )
        raise ZeroDivisionError

    monkeypatch.setattr(trio_gateway.gateway, "reap", buggy)
    with trio.fail_after(5), pytest.raises(ExceptionGroup) as raised:
        async with running(make_settings("redis://127.0.0.1:1"), wait_ready=False):
            await trio.sleep_forever()
    assert [type(each) for each in leaves(raised.value)] == [LifespanFailureError]
