"""Adding an entry to a stream, and waiting until replicas have it."""

from collections.abc import Callable
from typing import Final, Literal

from ..core.primaries import ConnectedReplicas, KnownReplicas
from ..redis_url import RedisAddress
from .errors import InDoubt
from .links import Command, Link, NoReply, Refused

_WAIT: Final = 1.0  # seconds for the replicas

Confirm = int | Literal["all"]


def check_confirm(confirm: object) -> None:
    """Raise :exc:`ValueError` for anything but a number of replicas or ``"all"``."""
    if confirm == "all":
        return
    if isinstance(confirm, bool) or not isinstance(confirm, int) or confirm < 0:
        raise ValueError('confirm must be a number of replicas or "all"')


def add(
    command: Command,
    confirm: Confirm,
    replicas: Callable[[RedisAddress], KnownReplicas | None],
    link: Link,
) -> str:
    """Run the XADD, and return the entry's id as soon as ``confirm`` replicas have the entry.

    ``"all"`` are those that are connected, and what :class:`KnownReplicas` adds to them.

    WAIT is about what its own connection has written to its own server, so an entry is confirmed
    only where it was written: if another server becomes the primary in between, the connection
    breaks, or WAIT is refused.

    Raises :exc:`Refused` if the entry was not added, :exc:`NoReply` if that is unknown or if the
    server stopped being the primary, and :exc:`InDoubt` if replicas do not have the entry in time.
    """
    if confirm == 0:
        link.send(command)
        return link.receive(bytes).decode()
    is_all = confirm == "all"
    wanted = 0 if confirm == "all" else confirm
    link.send(command, ("INFO", "replication") if is_all else _waiting(wanted))
    entry = link.receive(bytes).decode()
    try:
        if is_all:
            if not (connected := _connected(link)).number:
                raise InDoubt(f"{link} has no replica", entry=entry)
            if (known := replicas(link.address)) is None:
                raise NoReply(f"{link} is not the primary any more")
            wanted = known.wanted(connected)
            link.send(_waiting(wanted))
        confirmed = link.receive(int)
    except NoReply as failed:
        raise NoReply(str(failed), entry=entry) from None
    except Refused as refused:
        # The entry was added: for the caller this is never a refusal.
        if refused.is_wrong_server:
            raise NoReply(str(refused), entry=entry) from None
        raise InDoubt(f"{refused} (to confirm an entry)", entry=entry) from None
    if confirmed < wanted:
        raise InDoubt(
            f"{confirmed} of {wanted} replicas of {link} have the event after {_WAIT:g} s",
            entry=entry,
        )
    return entry


def _waiting(replicas: int) -> Command:
    return "WAIT", replicas, int(1000 * _WAIT)


def _connected(link: Link) -> ConnectedReplicas:
    try:
        return ConnectedReplicas.read(link.receive(bytes))
    except ValueError:
        raise NoReply(f"{link} sent an invalid reply") from None
