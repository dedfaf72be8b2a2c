"""Failures of commands: which say that another server must execute it, and what to log."""

import re
from typing import Final

from redis.exceptions import (
    AuthenticationError,
    BusyLoadingError,
    ClusterDownError,
    InvalidResponse,
    MasterDownError,
    MovedError,
    NoPermissionError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
)

_KINDS: Final = (
    AuthenticationError,
    BusyLoadingError,
    ClusterDownError,
    MasterDownError,
    MovedError,
    ReadOnlyError,
)
_REFUSALS: Final = {NoPermissionError: "NOPERM", OutOfMemoryError: "OOM"}
# Anywhere in the text: the error of a script or transaction contains that of its command.
_WORDS: Final = re.compile(
    r"\b(?:READONLY|LOADING|MASTERDOWN|NOREPLICAS|NOAUTH|WRONGPASS|CLUSTERDOWN|MOVED|UNBLOCKED)\b"
)
# By these a server begins to quote a command that it does not know.
_ARGUMENTS: Final = re.compile(r",? with args beginning with|\n")


def refusal(error: BaseException) -> str:
    """The first word of an error by which Redis refuses a command, or "" if it is another one."""
    if not isinstance(error, ResponseError) or is_wrong_server(error):
        return ""
    for kind, word in _REFUSALS.items():  # redis-py has removed the word
        if isinstance(error, kind):
            return word
    word, _, _ = str(error).partition(" ")
    return word if word.isupper() else "ERR"


def is_wrong_server(error: RedisError) -> bool:
    """Whether the command should be sent again on a new connection, maybe to another server.

    The server is a replica, still loading, cut off from its cluster, or no longer accepts our
    credentials. It refused the command and did not execute it. The old connection must be closed:
    it would give the same answer for ever.
    """
    return isinstance(error, _KINDS) or _WORDS.search(str(error)) is not None


def describe(error: Exception) -> str:
    """What to log of a failure: without the arguments of the command, which may be secrets."""
    name = type(error).__name__
    if isinstance(error, InvalidResponse):  # it quotes what was received
        return name
    reply = str(error).rpartition(" of pipeline caused error: ")[2]
    found = _ARGUMENTS.split(reply, maxsplit=1)[0].strip()
    return f"{name}: {found}" if found else name
