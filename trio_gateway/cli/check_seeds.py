"""``check`` of the servers that ``REDIS_URL`` names: each is asked the same questions."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from .check_report import Report

if TYPE_CHECKING:
    from ..broker.connection import RedisConnection
    from ..redis_url import RedisAddress, RedisUrl

T = TypeVar("T")


@dataclass(frozen=True)
class Kind:
    """What the servers are, and how to fix what can be wrong with them."""

    label: str  # of one of them, in the report
    name: str
    rights: str  # if a question is not allowed
    other_kind: str  # if it is another kind of server
    auth: str | None = None  # if the credentials are wrong; None: as for every Redis


async def ask_seeds(
    url: "RedisUrl",
    report: Report,
    kind: Kind,
    ask: Callable[["RedisConnection", "RedisAddress", Report], Awaitable[T | None]],
) -> tuple[dict["RedisAddress", T], set["RedisAddress"]]:
    """Report on each server of the URL; return what they say, and those that do not answer.

    ``ask`` returns None after it has reported a problem. It may raise :exc:`ConnectionLost`, and
    :exc:`ValueError` for a reply of another kind of server.
    """
    from ..broker.connection import open_redis
    from ..runtime.supervision import ConnectionLost

    told, lost = dict["RedisAddress", T](), set["RedisAddress"]()
    for server in url.seeds:
        part = report.part(f"{kind.label} at {server}", quiet=False)
        is_open = False
        try:
            async with open_redis(server, any_role=True) as redis:
                is_open = True
                if (found := await ask(redis, server, part)) is not None:
                    told[server] = found
        except ValueError as error:
            part.fail(str(error), kind.other_kind)
        except ConnectionLost as error:
            problem = str(error)
            if is_open and "NOPERM" in problem:
                part.fail(problem, kind.rights)
            elif kind.auth and any(s in problem for s in ("NOAUTH", "WRONGPASS", "AUTH failed")):
                part.fail(problem, kind.auth)
            elif is_open and "ERR" in problem:
                part.fail(f"{problem}: the server is not a {kind.name}", kind.other_kind)
            else:
                part.fail_to_connect(problem)
                lost.add(server)
    return told, lost
