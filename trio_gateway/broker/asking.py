"""Asking several servers at once who is the primary: a dead one must not delay the others."""

from collections.abc import Awaitable, Callable, Iterable
from typing import Final, TypeVar

import trio

from ..redis_url import RedisAddress
from ..runtime.supervision import ConnectionLost
from .connection import RedisConnection, open_redis

ANSWER_TIMEOUT: Final = 1.5  # seconds for the first answer
GRACE: Final = 0.3  # seconds that the others have after it

Answer = TypeVar("Answer")
Question = Callable[[RedisConnection, RedisAddress], Awaitable[Answer]]


async def ask_servers(servers: Iterable[RedisAddress], question: Question[Answer]) -> list[Answer]:
    """Ask all of them; return the answers that come in time.

    Raises :exc:`ConnectionLost`, with the problem of one of them, if there is none.
    """
    answers: list[Answer] = []
    problems: list[ConnectionLost] = []
    asked = list(servers)

    async def ask(server: RedisAddress) -> None:
        try:
            async with open_redis(server, any_role=True) as redis:
                answers.append(await question(redis, server))
        except ConnectionLost as lost:
            problems.append(lost)
        else:
            scope.deadline = min(scope.deadline, trio.current_time() + GRACE)

    with trio.move_on_after(ANSWER_TIMEOUT) as scope:
        async with trio.open_nursery() as nursery:
            for server in asked:
                nursery.start_soon(ask, server)
    if not answers:
        raise problems[0] if problems else ConnectionLost("no server answers")
    return answers
