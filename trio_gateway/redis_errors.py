"""Error replies by which Redis says that another server must execute the command."""

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
# Anywhere in the text: the error of a script or transaction contains that of its command.
_WORDS: Final = re.compile(
    r"\b(?:READONLY|LOADING|MASTERDOWN|NOREPLICAS|NOAUTH|WRONGPASS|CLUSTERDOWN|MOVED|UNBLOCKED)\b"
)


def is_wrong_server(error: RedisError) -> bool:
    """Whether the command should be sent again on a new connection, maybe to another server.

    The server is a replica, still loading, cut off from its cluster, or no longer accepts our
    credentials. It refused the command and did not execute it. The old connection must be closed:
    it would give the same answer for ever.
    """
    return isinstance(error, _KINDS) or _WORDS.search(str(error)) is not None
