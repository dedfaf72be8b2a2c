"""Sending to the primary: which server is tried, and whether another attempt is safe."""

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Final

import redis

from ..core.primaries import KnownReplicas
from ..core.slots import read_node
from ..redis_url import RedisAddress, RedisKind, RedisUrl
from .errors import InDoubt, PublishFailed
from .links import TIMEOUT, Link, Links, NoReply, NotReached, Refused, T
from .nodes import open_nodes

# Seconds to connect to a primary that others know of: they may name another one meanwhile.
_CONNECT: Final = 1.0
_REDIRECTIONS: Final = 3


class Sender:
    """Sends commands to the server that has a key. Threads may share it."""

    def __init__(self, url: RedisUrl, *, counts_replicas: bool = False) -> None:
        self._follows = url.kind is not RedisKind.SINGLE
        self._url = url
        self._links = Links(connect=_CONNECT if self._follows else TIMEOUT)
        self._nodes = open_nodes(url, counts_replicas=counts_replicas)

    def close(self) -> None:
        """Close all connections; a later command connects again."""
        self._links.close()
        self._nodes.close()

    def replicas_of(self, primary: RedisAddress) -> KnownReplicas | None:
        """What :meth:`Nodes.replicas_of` says, if ``counts_replicas``."""
        return self._nodes.replicas_of(primary)

    def send(self, key: str, attempt: Callable[[Link], T], *, again: bool) -> T:
        """Make the attempt on a connection to the primary of the key; return what it returns.

        It is made once more on the primary that there is then, if the first server refused because
        it is not the primary; if it was not reached and another one is primary now; and, with
        ``again``, if its reply was lost. Redirections of a Cluster are followed.

        Raises :exc:`PublishFailed` if nothing was executed, and :exc:`InDoubt` if that is unknown.
        """
        left = Counter(unreached=1, refused=1, lost=int(again), redirected=_REDIRECTIONS)
        redirection: tuple[RedisAddress, bool] | None = None
        doubt: InDoubt | None = None
        while True:
            address, asking = redirection or (None, False)
            redirection = None
            try:
                address = address or self._nodes.primary_of(key)
                with self._links.to(address, partial(self._is_primary, address, key)) as link:
                    if asking:
                        link.send(("ASKING",))
                        link.receive(bytes)
                    return attempt(link)
            except NotReached as error:
                outcome, failed = "unreached", PublishFailed(str(error))
                if address is None or self._is_primary(address, key):
                    left[outcome] = 0
            except Refused as refused:
                assert address is not None
                failed = PublishFailed(str(refused))
                redirection = self._redirection(refused.error, address)
                if redirection is not None:
                    outcome = "redirected"
                    self._nodes.suspect(address)
                elif refused.is_wrong_server:
                    outcome = "refused"
                    self._nodes.suspect(address)
                    self._links.discard(address)  # they would lead there for ever
                else:
                    raise _with_doubt(failed, doubt) from None
            except InDoubt:
                assert address is not None
                self._nodes.suspect(address)  # a primary without its replicas may be a former one
                raise
            except NoReply as error:
                assert address is not None
                self._nodes.suspect(address)
                outcome = "lost"
                failed = doubt = InDoubt(str(error), entry=error.entry)
            if not left[outcome]:
                raise _with_doubt(failed, doubt)
            left[outcome] -= 1

    def _is_primary(self, address: RedisAddress, key: str) -> bool:
        """Whether those who know the primaries say so now; True while they say nothing."""
        if not self._follows:
            return True
        self._nodes.suspect(address)
        try:
            return self._nodes.primary_of(key) == address
        except NotReached:
            return True

    def _redirection(
        self, error: redis.RedisError, asked: RedisAddress
    ) -> tuple[RedisAddress, bool] | None:
        """Where a Cluster says that the key is, and whether only for now (ASK)."""
        if self._url.kind is not RedisKind.CLUSTER:
            return None
        if not isinstance(error, redis.exceptions.AskError):  # MovedError is one, too
            return None
        try:
            node = read_node(f"{error.host}:{error.port}", asked.host)
        except ValueError:
            return None
        return self._url.node(*node), not isinstance(error, redis.exceptions.MovedError)


def _with_doubt(failed: PublishFailed, doubt: InDoubt | None) -> PublishFailed:
    """This failure, in doubt if an earlier attempt may have succeeded."""
    if doubt is None or failed.in_doubt:
        return failed
    return InDoubt(str(failed), entry=doubt.entry)
