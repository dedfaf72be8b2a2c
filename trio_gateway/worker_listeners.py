"""The listening sockets of workers: all workers share them, or each has a port of its own.

A proxy can address one worker only if that worker has a port of its own.
"""

import copy
import socket
from collections.abc import Sequence
from contextlib import suppress
from typing import Final, Self

import structlog
from hypercorn.config import Config

from .transports.accepting import WorkerLoads

log = structlog.get_logger()

_LAST_PORT: Final = 65_535


class BadAddress(ValueError):  # noqa: N818 - reads better where it is raised
    """Workers can't have ports of their own from this address on; the text says why."""


def own_addresses(binds: Sequence[str], workers: int) -> list[list[str]]:
    """For each worker, its addresses: ``host:port`` with the ports counted up from those given.

    Raises :exc:`BadAddress`.
    """
    found: list[list[str]] = [[] for _ in range(workers)]
    for bind in binds:
        host, _, port = bind.rpartition(":")
        if not host or bind.startswith(("unix:", "fd:")) or not port.isdecimal() or port == "0":
            raise BadAddress(f"--own-ports counts ports up, and needs host:port, not {bind}")
        if int(port) + workers - 1 > _LAST_PORT:
            raise BadAddress(
                f"{workers} workers need the ports {port} to {int(port) + workers - 1},"
                f" and the last port is {_LAST_PORT}: use a lower port in {bind}"
            )
        for number in range(workers):
            found[number].append(f"{host}:{int(port) + number}")
    every = [address for addresses in found for address in addresses]
    if twice := [address for address in every if every.count(address) > 1]:
        raise BadAddress(f"two workers would have {twice[0]}: the ports of --bind are too close")
    return found


class Listeners:
    """Listening sockets, and the loads of the workers that accept on them."""

    def __init__(
        self,
        secure: Sequence[socket.socket],
        insecure: Sequence[socket.socket],
        slots: int,
        *,
        shared: bool,
    ) -> None:
        self._sockets = [*secure, *insecure]
        self._main = secure or insecure
        self._insecure = insecure if secure else []
        self._shared = shared
        self._free = set(range(slots))
        self._loads: WorkerLoads | None = None
        try:
            self._loads = WorkerLoads.create(slots)
        except OSError as error:
            log.warning("connections are not balanced among workers", error=error.strerror)

    @classmethod
    def open_shared(cls, config: Config, workers: int) -> Self:
        """Open the sockets of ``config``, which all workers share. Raises :exc:`OSError`."""
        # While a worker is replaced, there are two of it.
        return cls._open(config, 2 * workers, shared=True)

    @classmethod
    def open_own(cls, config: Config, workers: int) -> list[Self]:
        """Open ports for each worker. Raises :exc:`OSError`, which names the address."""
        found: list[Self] = []
        main = len(config.bind)
        try:
            for addresses in own_addresses([*config.bind, *config.insecure_bind], workers):
                own = copy.copy(config)
                own.bind, own.insecure_bind = addresses[:main], addresses[main:]
                own.workers = 1  # no SO_REUSEPORT: a port that is in use must be an error
                found.append(cls._open(own, 2, shared=False))
        except OSError:
            for each in found:
                each.close()
            raise
        return found

    @classmethod
    def _open(cls, config: Config, slots: int, *, shared: bool) -> Self:
        try:
            sockets = config.create_sockets()
            for each in [*sockets.secure_sockets, *sockets.insecure_sockets]:
                each.listen(config.backlog)
                each.set_inheritable(True)
        except OSError as error:
            where = ", ".join([*config.bind, *config.insecure_bind])
            raise OSError(error.errno, error.strerror, where) from None
        return cls(sockets.secure_sockets, sockets.insecure_sockets, slots, shared=shared)

    def take_slot(self) -> int | None:
        """A slot for the load of a worker; None if all are taken."""
        return self._free.pop() if self._free else None

    def free_slot(self, slot: int | None) -> None:
        """Free the slot of a worker that has ended."""
        if slot is not None:
            self._free.add(slot)
            if self._loads is not None:
                self._loads.clear(slot)

    def arguments(self, slot: int | None) -> tuple[list[str], list[int]]:
        """The arguments of a worker's command, and the descriptors that it inherits."""
        command: list[str] = []
        for each in self._main:
            command += ["--bind", f"fd://{each.fileno()}"]
        for each in self._insecure:
            command += ["--insecure-bind", f"fd://{each.fileno()}"]
        descriptors = [each.fileno() for each in self._sockets]
        if self._loads is not None and slot is not None:
            command += ["--loads", f"{self._loads.descriptor}:{slot}"]
            descriptors.append(self._loads.descriptor)
        return command, descriptors

    def refuse(self) -> None:
        """Refuse connections until the next worker listens; sockets that are shared stay open.

        Otherwise they would wait here for a worker, and no proxy would go to another one.
        """
        if self._shared:
            return
        for each in self._sockets:
            with suppress(OSError):  # it does not listen
                each.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the sockets."""
        for each in self._sockets:
            each.close()
