"""Asking servers one after the other: Sentinels, or nodes of a Cluster."""

import time
from collections.abc import Iterable, Iterator
from typing import Any, Final

from ..redis_url import RedisAddress
from .links import Command, Link, Links, NoReply, NotReached, Refused

_ANSWER: Final = 0.5  # seconds to connect to one of them, and again for its answer
_ROUND: Final = 2.0  # seconds after which no further one is asked
_FRESH: Final = 1.0  # seconds for which the answers are believed
PATIENCE: Final = 5.0  # the same if one did not answer, which can take long


def asking_links() -> Links:
    """Connections for questions."""
    return Links(connect=_ANSWER, reply=_ANSWER)


class Round:
    """The same questions to several servers, and what has failed."""

    def __init__(self, links: Links, *questions: Command) -> None:
        self._links = links
        self._questions = questions
        self._end = time.monotonic() + _ROUND
        self.failed: dict[RedisAddress, str] = {}

    def ask(self, servers: Iterable[RedisAddress]) -> Iterator[tuple[RedisAddress, list[Any]]]:
        """Each server and its replies. The caller may stop when it has heard enough.

        The reply to a command that the server refuses is the error.
        """
        for server in servers:
            if time.monotonic() > self._end:
                return
            try:
                with self._links.to(server) as link:
                    link.send(*self._questions)
                    replies = [_reply(link) for _ in self._questions]
            except (NotReached, NoReply) as error:
                self.failed[server] = str(error)
            else:
                yield server, replies

    def fresh_until(self) -> float:
        """When to ask again, on the monotonic clock."""
        return time.monotonic() + (PATIENCE if self.failed else _FRESH)

    def __str__(self) -> str:
        return "; ".join(self.failed.values())


def _reply(link: Link) -> object:
    try:
        return link.receive(object)
    except Refused as refused:
        return refused


def no_error(reply: Any) -> Any:
    """The reply, if it is none of the server's errors; raises :exc:`ValueError` with its text."""
    if isinstance(reply, Refused):
        raise ValueError(str(reply))
    return reply
