"""API keys in force: found by secret, limited in rate, and read again when the file changes."""

import itertools
from collections.abc import Sized
from functools import partial
from hashlib import sha256
from pathlib import Path

import pytest
import structlog
import trio

from tests.support.gateways import until
from trio_gateway.access.api_keys import ApiKeys
from trio_gateway.core.api_keys import read_api_keys


def text(**rates: float) -> str:
    """A file with these keys; each secret is the key's name."""
    return "".join(
        f'[keys.{name}]\nsha256 = "{sha256(name.encode()).hexdigest()}"\n'
        f'scopes = ["read"]\nrate = {rate}\n'
        for name, rate in rates.items()
    )


def made(path: Path, document: str) -> ApiKeys:
    path.write_text(document)
    return ApiKeys(path, read_api_keys(document))


def replace(path: Path, content: bytes | None) -> None:
    """Replace the file in one step, or remove it."""
    if content is None:
        path.unlink()
    else:
        path.with_suffix(".new").write_bytes(content)
        path.with_suffix(".new").rename(path)


def has(logs: Sized, number: int) -> bool:
    return len(logs) == number


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.toml"


def test_a_key_is_found_by_its_secret_alone(path: Path) -> None:
    keys = made(path, text(orders=1, menu=1))
    for name in ("orders", "menu"):
        found = keys.find(name)
        assert found is not None
        assert found.name == name
    digest = sha256(b"orders").hexdigest()
    for other in (None, "", "order", "orders ", digest, "schl\xfcssel", "\u20ac"):
        assert keys.find(other) is None


def test_a_secret_may_be_any_bytes(path: Path) -> None:
    document = text(orders=1).replace(
        sha256(b"orders").hexdigest(), sha256(b"\xff\xe4").hexdigest()
    )
    assert made(path, document).find("\xff\xe4") is not None


@pytest.mark.parametrize("rate", [0.5, 1, 100])
def test_a_key_is_served_at_its_rate_and_its_burst_is_one_second(path: Path, rate: float) -> None:
    keys = made(path, text(orders=rate, menu=1))
    key, other = keys.find("orders"), keys.find("menu")
    assert key is not None
    assert other is not None
    burst = max(1, int(rate))
    assert [keys.try_use(key, 0.0) for _ in range(burst + 5)] == [True] * burst + [False] * 5
    assert keys.try_use(other, 0.0)  # each has its own
    steps = itertools.takewhile(lambda now: now <= 20, itertools.count(0.01, 0.01))
    served = sum(keys.try_use(key, now) for now in steps)
    assert served == pytest.approx(20 * rate, abs=1)


async def test_a_file_that_changes_changes_the_keys(path: Path) -> None:
    keys = made(path, text(orders=1))
    replace(path, text(orders=1, menu=1).encode())  # before the first look
    with structlog.testing.capture_logs() as logs:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(keys.run, 0.01)
            await until(lambda: keys.find("menu"))
            replace(path, text(menu=5).encode())
            await until(lambda: keys.find("orders") is None)
            nursery.cancel_scope.cancel()
    assert [(each["added"], each["removed"]) for each in logs] == [
        (["menu"], []),
        ([], ["orders"]),
    ]


async def test_an_invalid_file_leaves_the_keys_and_is_logged_once(path: Path) -> None:
    keys = made(path, text(orders=1))
    with structlog.testing.capture_logs() as logs:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(keys.run, 0.01)
            # The second is what an editor leaves for a moment; after the last there is no file.
            for number, content in enumerate((b"[keys.orders]\nsha256 = 5", b"", b"\xff", None), 1):
                replace(path, content)
                await until(partial(has, logs, number))
                await trio.sleep(0.05)  # some more looks
                assert keys.find("orders") is not None
            replace(path, text(menu=1).encode())
            await until(lambda: keys.find("orders") is None)
            nursery.cancel_scope.cancel()
    errors = [each["error"] for each in logs if each["log_level"] == "error"]
    assert [error.partition(":")[0] for error in errors] == [
        "keys.orders.sha256", "no key", "not UTF-8", "No such file or directory",
    ]  # fmt: skip
