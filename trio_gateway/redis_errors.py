"""What an error reply of Redis says about the server that sent it."""

import re
from typing import Final

from redis.exceptions import (
    AuthenticationError,
    BusyLoadingError,
    ClusterDownError,
    MasterDownError,
    MovedError,
    ReadOnlyError,
    RedisError,
)

_KINDS: Final = (
    AuthenticationError,
    BusyLoadingError,
    ClusterDownError,
    MasterDownError,
    MovedError,
    ReadOnlyError,
)
# Also in the middle of a text: a script's or a transaction's error holds the one of its command.
_WORDS: Final = re.compile(
    r"\b(?:READONLY|LOADING|MASTERDOWN|NOREPLICAS|NOAUTH|WRONGPASS|CLUSTERDOWN|MOVED|UNBLOCKED)\b"
)


def is_wrong_server(error: RedisError) -> bool:
    """Whether another server has to be asked, or this one on a new connection: it is a replica,
    still loading, cut off, or does not know us any more. The command was refused, not executed.

    A connection that is kept would say so for ever.
    """
    return isinstance(error, _KINDS) or _WORDS.search(str(error)) is not None
