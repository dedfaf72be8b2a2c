"""The processes of a service, for commands: through Redis, with the gateways' settings."""

from collections.abc import Awaitable, Callable, Collection
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Any, Final, NoReturn, Protocol, TypeVar

import click

from .errors import FAILED, Failure

if TYPE_CHECKING:
    from ..broker.commands import Commands
    from ..cluster.observing import Service
    from ..cluster.questions import Answers
    from ..redis_url import RedisUrl
    from ..settings import Settings

S = TypeVar("S")
T = TypeVar("T")

IDS: Final = click.IntRange(1, 2**63 - 1)  # up to core.events.MAX_ID, without its imports


def ask_service(settings: "Settings", ask: Callable[["Service"], Awaitable[T]]) -> T:
    """Run ``ask`` with a connection to the processes on the Redis of these settings.

    Raises :exc:`Failure` if Redis does not answer.
    """
    from ..broker.topologies import make_topology
    from ..cluster.observing import open_service
    from ..redis_url import RedisUrl

    url = RedisUrl.from_url(settings.redis_url)
    stream, database = settings.ws_presence_stream, url.data.db
    return _ask(url, lambda: open_service(make_topology(url), stream, database), ask)


def ask_redis(settings: "Settings", ask: Callable[["Commands"], Awaitable[T]]) -> T:
    """Run ``ask`` with commands for the Redis of these settings; errors as of ask_service."""
    from ..broker.topologies import make_topology
    from ..cluster.observing import open_commands
    from ..redis_url import RedisUrl

    url = RedisUrl.from_url(settings.redis_url)
    return _ask(url, lambda: open_commands(make_topology(url)), ask)


def _ask(
    url: "RedisUrl",
    opened: Callable[[], AbstractAsyncContextManager[S]],
    ask: Callable[[S], Awaitable[T]],
) -> T:
    import structlog
    import trio

    from ..broker.commands import Unavailable
    from ..core.exception_groups import first_leaf
    from ..runtime.supervision import ConnectionLost

    problem = ""

    async def run() -> list[T]:
        nonlocal problem
        found: list[T] = []
        try:
            async with opened() as connected:
                found.append(await ask(connected))
        except* (ConnectionLost, Unavailable) as group:
            leaf = first_leaf(group)
            refusal = getattr(leaf, "refusal", "")
            problem = f"{leaf} ({refusal})" if refusal else str(leaf)
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
    return len({*answers.by_node, *answers.missing})


class FromProcesses(Protocol):
    """What processes have told."""

    @property
    def complete(self) -> bool:
        """Whether all of them have."""


R = TypeVar("R", bound=FromProcesses)


def print_report(report: R, show: Callable[[R], None], as_json: bool) -> None:
    """Print a report as JSON, or by ``show``; exit with status 1 if it is not complete."""
    if as_json:
        show_json(report)
    else:
        show(report)
    if not report.complete:
        raise SystemExit(FAILED)


def show_json(value: Any) -> None:
    """Print one JSON object on one line."""
    import msgspec

    click.echo(msgspec.json.encode(value))
