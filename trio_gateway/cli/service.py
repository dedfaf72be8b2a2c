"""The processes of a service, for commands: through Redis, with the gateways' settings."""

from collections.abc import Awaitable, Callable, Collection
from typing import TYPE_CHECKING, Any, Final, NoReturn, TypeVar

import click

from .errors import Failure

if TYPE_CHECKING:
    from ..cluster.control import Answers
    from ..cluster.observing import Service
    from ..settings import Settings

T = TypeVar("T")

IDS: Final = click.IntRange(1, 2**63 - 1)  # up to core.events.MAX_ID, without its imports


def ask_service(settings: "Settings", ask: Callable[["Service"], Awaitable[T]]) -> T:
    """Run ``ask`` with a connection to the Redis of these settings.

    Raises :exc:`Failure` if Redis does not answer.
    """
    import structlog
    import trio

    from ..broker.commands import Unavailable
    from ..broker.topologies import make_topology
    from ..cluster.observing import open_service
    from ..core.exception_groups import first_leaf
    from ..redis_url import RedisUrl
    from ..runtime.supervision import ConnectionLost

    url, problem = RedisUrl.from_url(settings.redis_url), ""

    async def run() -> list[T]:
        nonlocal problem
        found: list[T] = []
        try:
            async with open_service(
                make_topology(url), settings.ws_presence_stream, url.data.db
            ) as service:
                found.append(await ask(service))
        except* (ConnectionLost, Unavailable) as group:
            problem = str(first_leaf(group))
        return found

    # Log entries are for operators of a gateway; what matters here is the outcome.
    with structlog.testing.capture_logs():
        found = trio.run(run)
    if not found:
        raise Failure(f"Redis at {url}: {problem}; run trio-gateway check")
    return found[0]


def no_gateway(settings: "Settings", more: str = "") -> NoReturn:
    """No process is alive: raise :exc:`Failure` that says what to look at."""
    from ..redis_url import RedisKind, RedisUrl

    url = RedisUrl.from_url(settings.redis_url)
    also = ""
    if url.kind is RedisKind.CLUSTER:  # it decides where the keys are
        also = ", and WS_PRESENCE_STREAM, which must be that of the gateways"
    raise Failure(
        f"no gateway is known on Redis at {url}{more}: a gateway that runs is known if it has"
        f" WS_CLUSTER=true or WS_API_KEYS_FILE; check REDIS_URL, too{also}"
    )


def tell_missing(missing: Collection[str], asked: int) -> None:
    """Say on stderr which of the processes that were asked did not answer."""
    if missing:
        names = ", ".join(missing)
        click.echo(f"{len(missing)} of {asked} processes did not answer: {names}", err=True)


def asked(answers: "Answers") -> int:
    """How many processes were asked."""
    return len(answers.by_node) + len(answers.missing)


def show_json(value: Any) -> None:
    """Print one JSON object on one line."""
    import msgspec

    click.echo(msgspec.json.encode(value))
