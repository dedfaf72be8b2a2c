"""Publishing: events of backends, many at once, each with its own outcome.

The commands of one request go to each server in few pieces: a thousand small events take one round
trip. What matters is to know of each event whether it was certainly not published. redis-py does
not tell, so this uses the connections of the readers.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any, Final, NoReturn

import hiredis
import structlog
import trio
from redis.exceptions import RedisError

from ..core.primaries import ConnectedReplicas
from ..core.resilience import Breaker
from ..core.slots import read_node, slot_of
from ..redis_errors import is_wrong_server
from ..redis_url import RedisAddress
from ..runtime.supervision import ConnectionLost, Demoted
from ..runtime.throttled_log import ThrottledLog
from .connection import Command, RedisConnection, connect_redis
from .publications import Confirm, Outcome, Problem, Publication, pieces
from .sentinel_replicas import SentinelReplicas
from .topology import Topology

log = structlog.get_logger()

CONFIRM_WITHIN: Final = 1.0  # seconds for the replicas
_CONNECT: Final = 2.0  # seconds to connect and authenticate
_REPLY: Final = 3.0  # seconds to send the commands and receive their replies
_TRIES: Final = 3
_FRESH: Final = 1.0  # seconds of idleness within which a connection is used without a check
_IDLE: Final = 30.0  # seconds of idleness after which a connection is closed
_TIDY: Final = 10.0  # seconds
# Failures in a row, and seconds until a server that could not be reached is tried again.
_BREAKER: Final = 3, 1.0


class _Server:
    """The idle connections to one server, and whether to try it."""

    def __init__(self) -> None:
        self.idle: deque[tuple[float, RedisConnection]] = deque()  # since when
        self.breaker = Breaker(*_BREAKER)


class Publishing:
    """Publishes events on the primaries of a topology. Callers limit how many do at once."""

    def __init__(self, topology: Topology, replicas: SentinelReplicas | None = None) -> None:
        """With Sentinels, ``replicas`` tells how many a primary must have."""
        self._topology = topology
        self._replicas = replicas
        self._servers: dict[RedisAddress, _Server] = {}
        self._throttled_log = ThrottledLog(log)

    async def run(self) -> NoReturn:
        """Close connections that were not used for a while; returns only when cancelled."""
        try:
            while True:
                await trio.sleep(_TIDY)
                await self._close_idle(trio.current_time() - _IDLE)
        finally:
            with trio.CancelScope(shield=True):  # closing forcefully does not wait
                await self._close_idle(trio.current_time())

    async def _close_idle(self, since: float) -> None:
        for address, server in list(self._servers.items()):
            while server.idle and server.idle[0][0] <= since:
                await server.idle.popleft()[1].close()
            if not server.idle and not server.breaker.failures:
                del self._servers[address]

    async def publish(self, publications: Sequence[Publication], confirm: Confirm = 0) -> None:
        """Give each publication its outcome.

        An event goes once more to another server if the first one is not a primary any more, and to
        any if its reply was lost and it has an id. Entries are in doubt if fewer than ``confirm``
        replicas have them after :data:`CONFIRM_WITHIN` seconds; "all" are those that are connected,
        at least one, and not fewer than the Sentinels know. Takes a few seconds at most, and raises
        nothing.
        """
        left: list[Publication] = list(publications)
        for _ in range(_TRIES):
            async with trio.open_nursery() as nursery:
                for server, group in (await self._groups(left)).items():
                    nursery.start_soon(self._send, server, group, confirm)
            left = [each for each in left if each.outcome is None]
            if not left:
                return
        for each in left:
            each.failed(Problem.UNAVAILABLE)

    async def _groups(
        self, publications: Iterable[Publication]
    ) -> dict[tuple[RedisAddress, bool], list[Publication]]:
        """The publications by server, and whether it must be told that it is asked for once."""
        primaries: dict[str, RedisAddress | None] = {}
        found: dict[tuple[RedisAddress, bool], list[Publication]] = {}
        for each in publications:
            if (asking := each.asking) is not None:
                each.asking = None
                found.setdefault((asking, True), []).append(each)
                continue
            if each.key not in primaries:
                try:
                    primaries[each.key] = await self._topology.primary(slot_of(each.key))
                except ConnectionLost:
                    primaries[each.key] = None
            primary = primaries[each.key]
            if primary is None or primary == each.unreached:
                each.failed(Problem.UNAVAILABLE)
            else:
                found.setdefault((primary, False), []).append(each)
        return found

    async def _send(
        self, place: tuple[RedisAddress, bool], group: Sequence[Publication], confirm: Confirm
    ) -> None:
        """Send all of a group; those without an outcome after this may be sent once more."""
        address, asking = place
        try:
            connection = await self._connect(address)
        except Demoted:
            self._topology.suspect(address)
            return
        except ConnectionLost:
            self._topology.suspect(address)
            for each in group:
                each.unreached = address
            return
        is_usable = False
        try:
            is_usable = await self._send_on(connection, address, group, asking=asking)
            entries = [each for each in group if each.outcome and each.outcome.entry is not None]
            if confirm != 0 and entries:
                is_confirmed = is_usable and await self._is_confirmed(connection, address, confirm)
                is_usable &= is_confirmed
                for each in entries if not is_confirmed else ():
                    assert each.outcome is not None
                    each.outcome = each.outcome._replace(problem=Problem.IN_DOUBT)
        finally:
            server = self._servers.setdefault(address, _Server())
            server.idle.append((trio.current_time(), connection))
            if not is_usable:
                # No answer, no primary, or one without its replicas, which may be a former one.
                self._topology.suspect(address)
                if self._replicas is not None:
                    self._replicas.forget()
                with trio.CancelScope(shield=True):  # closing forcefully does not wait
                    while server.idle:
                        await server.idle.pop()[1].close()

    async def _connect(self, address: RedisAddress) -> RedisConnection:
        """A connection to a server that is a primary now. Raises :exc:`ConnectionLost`."""
        server = self._servers.setdefault(address, _Server())
        while server.idle:
            since, connection = server.idle.pop()
            try:
                # PUBLISH on a replica is not an error, but reaches only those who listen to that.
                if trio.current_time() - since > _FRESH:
                    await connection.check_role(timeout=_CONNECT)
            except ConnectionLost:
                await connection.close()
            else:
                return connection
        breaker = server.breaker
        if not breaker.try_now(trio.current_time()):
            raise ConnectionLost("breaker is open")
        try:
            with trio.move_on_after(_CONNECT):
                connection = await connect_redis(address)
                breaker.succeeded()
                return connection
            raise ConnectionLost(f"no answer in {_CONNECT:g} s")
        except ConnectionLost as lost:
            breaker.failed(trio.current_time())
            self._throttled_log.warning("can't publish", error=str(lost))
            raise
        except BaseException:
            breaker.abandoned(trio.current_time())
            raise

    async def _send_on(
        self,
        connection: RedisConnection,
        address: RedisAddress,
        group: Sequence[Publication],
        *,
        asking: bool,
    ) -> bool:
        """Send a group in pieces; return whether the connection is usable.

        After a piece that fails the others are not sent, so nothing about them is in doubt.
        """
        deadline = trio.current_time() + _REPLY
        for piece in pieces(group):
            if trio.current_time() >= deadline or not await self._send_piece(
                connection, address, piece, deadline, asking=asking
            ):
                return False
        return True

    async def _send_piece(
        self,
        connection: RedisConnection,
        address: RedisAddress,
        group: Sequence[Publication],
        deadline: float,
        *,
        asking: bool,
    ) -> bool:
        """Send commands at once and read the replies; return whether the connection is usable."""
        commands: list[Command] = [each.command for each in group]
        if asking:
            commands = [each for command in commands for each in (("ASKING",), command)]
        replies: list[Any] = []
        is_usable = False
        try:
            with trio.CancelScope(deadline=deadline):
                await connection.ask_all(commands, replies=replies)
                is_usable = True
        except ConnectionLost as lost:
            self._throttled_log.warning("lost while publishing", error=str(lost))
        if asking:
            replies = replies[1::2]
        for each, reply in zip(group, replies, strict=False):
            is_usable &= self._read(each, reply, address)
        for each in group[len(replies) :]:
            each.in_doubt = True
            if not each.again:
                each.failed(Problem.IN_DOUBT)
            each.again = False  # the second time is the last
        return is_usable

    def _read(self, each: Publication, reply: Any, address: RedisAddress) -> bool:
        """Read a reply; return whether the server that sent it is the right one."""
        if not isinstance(reply, hiredis.ReplyError):
            if each.is_entry and not isinstance(reply, bytes):
                each.failed(Problem.IN_DOUBT)
                return False
            each.outcome = Outcome(reply.decode() if each.is_entry else None)
            return True
        text = str(reply)
        word, *words = text.split(" ")
        if word in ("MOVED", "ASK") and len(words) == 2:
            try:
                node = read_node(words[1], address.host)
                slot = int(words[0])
            except ValueError:
                return False
            if word == "ASK":
                each.asking = self._topology.address(node)
            else:
                self._topology.moved(slot, node)
            return True
        if is_wrong_server(RedisError(text)):
            return False
        each.failed(Problem.REFUSED, word)
        self._throttled_log.warning("Redis refuses to publish", error=word)
        return True

    async def _is_confirmed(
        self, connection: RedisConnection, address: RedisAddress, confirm: Confirm
    ) -> bool:
        """Whether this many replicas have all that was written on this connection."""
        try:
            with trio.move_on_after(CONFIRM_WITHIN + _REPLY):
                wanted = 0 if confirm == "all" else confirm
                if confirm == "all":
                    info = await connection.call("INFO", "replication")
                    connected = ConnectedReplicas.read(info)
                    if not (wanted := connected.number):
                        return False
                    if self._replicas is not None:
                        if (known := await self._replicas.of(address)) is None:
                            return False
                        wanted = known.wanted(connected)
                reply = await connection.call("WAIT", wanted, int(1000 * CONFIRM_WITHIN))
                return isinstance(reply, int) and reply >= wanted
        except (ConnectionLost, ValueError) as error:
            self._throttled_log.warning("not confirmed", error=str(error))
        return False
