"""How ``serve`` is set up."""

import inspect
from pathlib import Path

import hypercorn.trio.run
import pytest

from trio_gateway.serve import BadConfig, read_config

FILE = Path(__file__).parent.parent / "hypercorn.toml"


def test_defaults_are_those_of_the_shipped_file() -> None:
    without, shipped = read_config(None), read_config(FILE)

    named = vars(without).keys() | vars(shipped).keys()
    assert {name: getattr(without, name) for name in named} == {
        name: getattr(shipped, name) for name in named
    }


def test_only_the_trio_worker_class_is_accepted(tmp_path: Path) -> None:
    path = tmp_path / "hypercorn.toml"
    path.write_text('worker_class = "asyncio"\n')

    with pytest.raises(BadConfig, match="Trio only"):
        read_config(path)


def test_invalid_port_is_named() -> None:
    with pytest.raises(BadConfig, match="a port is at most 65535"):
        read_config(None, ("127.0.0.1:99999",))
    read_config(None, ("127.0.0.1:65535", "unix:/tmp/99999", "localhost"))


def test_hypercorn_serves_by_the_name_that_is_replaced() -> None:
    worker, serve = hypercorn.trio.run.trio_worker, hypercorn.trio.run.worker_serve
    assert vars(hypercorn.trio.run)["worker_serve"] is serve
    assert "partial(worker_serve, app, config, " in inspect.getsource(worker)
    assert "shutdown_trigger = None" in inspect.getsource(worker)
    assert inspect.signature(serve).parameters["shutdown_trigger"].default is None
